"""Feed for sets that stay on disk: Grain decodes in the background.

Images are read, decoded and cropped by threads on the host, batched, and put on
the devices two batches ahead; shift, mirror and normalisation are those of the
resident feed, inside the compiled step. What a batch holds, and its every crop, is
a function of the root key and the step (see `order`), so the position in the data
is the step that a checkpoint holds: resuming starts there, without reading what
came before. Several hosts read disjoint rows of each batch, together all of it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt32
from ml_collections import ConfigDict

from l2w_jax.data import augment, order, stored
from l2w_jax.data.order import Batch
from l2w_jax.data.sources import Dataset, LazyImages
from l2w_jax.run import parallel
from l2w_jax.run.parallel import ONE_DEVICE, Collectives

AHEAD = 2  # batches that wait on the devices


def make_halves_fn(
  config: ConfigDict, devices: Collectives = ONE_DEVICE
) -> Callable[[Batch, UInt32[Array, "2"], Int[Array, ""]], tuple[Batch, Batch]]:
  """(data, key data, step) -> both halves; `data` holds this device's images."""

  def halves_fn(data, key, step):
    _, augment_key = order.keys(jax.random.wrap_key_data(key))
    draws = augment.draw(
      config.data, jax.random.fold_in(augment_key, step), config.batch
    )
    middle = data["label"].shape[0] // 2
    return tuple(
      augment.ready(
        config.data, data["image"][rows], data["label"][rows], own, data
      )
      for rows, own in zip(
        (slice(middle), slice(middle, None)), devices.own_halves(draws), strict=True
      )
    )

  return halves_fn


class StreamingFeed:
  """Batches made in the background; see `feeds.make_feed`.

  Args:
    dataset: with lazy images.
    config: the whole config.
    key: root key of the feed.
    num_devices: of all processes.
    rows: of a loader batch that this process reads.
  """

  def __init__(
    self,
    dataset: Dataset,
    config: ConfigDict,
    key: Array,
    num_devices: int,
    rows: np.ndarray,
  ):
    self._num_devices, self._rows = num_devices, rows
    self._samples = _samples(dataset, config, key, self._rows)
    statistics = {
      "mean": np.asarray(dataset.mean, np.float32),
      "std": np.asarray(dataset.std, np.float32),
    }
    self._statistics, self._key = parallel.replicate(
      (statistics, np.asarray(jax.random.key_data(key))), num_devices
    )
    devices = parallel.collectives(num_devices, config.sync)
    self._halves = parallel.map_devices(
      make_halves_fn(config, devices), num_devices
    )
    self._batches, self._next = None, None

  def halves(self, step: int) -> tuple[Batch, Batch]:
    """The two halves of the batch of a step, on the devices.

    Asking for the steps in order is quick; any other step starts reading there.
    """
    if self._batches is None or step != self._next:
      self.close()
      self._batches = self._start(step)
    self._next = step + 1
    return self._halves(
      next(self._batches) | self._statistics,
      self._key,
      parallel.replicate(np.int32(step), self._num_devices),
    )

  def close(self) -> None:
    """Stops reading."""
    if self._batches is not None:
      self._batches.close()
    self._batches, self._next = None, None

  def _start(self, step: int) -> Any:
    from grain import experimental

    batches = pipeline(self._samples[step * len(self._rows) :], len(self._rows))
    batches = batches.map(
      lambda batch: parallel.split_rows(batch, self._num_devices)
    )
    return iter(
      experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=AHEAD)
    )


def pipeline(samples, batch: int):
  """Grain dataset of batches [≤ batch …] of a dataset of arrays, or trees of them.

  Samples are made by as many threads as there are cores, in order.
  """
  import grain

  threads = stored.num_threads()
  ahead = max(4 * threads, batch)
  return samples.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  ).batch(batch)


def batches(images: LazyImages, batch: int) -> Iterator[np.ndarray]:
  """uint8 [≤ batch H W channels], every image once and in order."""
  import grain
  from grain import experimental

  samples = grain.MapDataset.range(len(images)).map(lambda i: images.middle(int(i)))
  found = experimental.ThreadPrefetchIterDataset(
    pipeline(samples, batch), prefetch_buffer_size=1
  )
  with contextlib.closing(iter(found)) as found:
    yield from found


def _samples(dataset: Dataset, config: ConfigDict, key: Array, rows: np.ndarray):
  """Grain dataset of (image, label), one host's rows of all steps in a row."""
  import grain

  train, (order_key, augment_key) = dataset.train, order.keys(key)
  num_train = len(train.labels)
  steps = order.steps_per_epoch(num_train, config.batch)
  crops = config.data.augment == "crop_flip"
  high, low = map(int, jax.random.key_data(augment_key))
  crop_seed = high << 32 | low
  lock = threading.Lock()

  @functools.lru_cache(maxsize=2)
  def epoch_order(epoch: int) -> np.ndarray:
    return np.asarray(order.epoch_order(order_key, epoch, num_train))

  images = train.images
  assert isinstance(images, LazyImages)  # or it would not stream

  def sample(position: int) -> dict[str, np.ndarray | np.int32]:
    step, row = divmod(int(position), len(rows))
    row = int(rows[row])  # in the batch of all hosts
    epoch, t = divmod(step, steps)
    with lock:  # a hundred threads would all shuffle a new epoch
      i = int(epoch_order(epoch)[t * config.batch + row])
    if crops:
      # One stream of numbers for each image of the run, whoever reads it.
      place = [0, 0, 0, step * config.batch + row]
      rng = np.random.Generator(np.random.Philox(key=crop_seed, counter=place))
      image = images.random_crop(i, rng)
    else:
      image = images.middle(i)
    return {"image": image, "label": train.labels[i]}

  return grain.MapDataset.range(config.epochs * steps * len(rows)).map(sample)
