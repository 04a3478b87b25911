"""Feed for sets that fit on the devices: batches are made there.

The pixels stay on the devices as uint8; what a batch holds is said in `order`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32
from ml_collections import ConfigDict

from l2w_jax.data import augment, order
from l2w_jax.data.order import Batch
from l2w_jax.data.sources import Dataset
from l2w_jax.run import parallel
from l2w_jax.run.parallel import ONE_DEVICE, Collectives


def arrays(dataset: Dataset) -> Batch:
  """What `make_halves_fn` reads: pixels, labels and channel statistics.

  An image is a row: of images in four dimensions a TPU makes a copy of the whole
  set, in another layout, to gather a few.
  """
  images, of_meta = (
    np.asarray(split.images) for split in (dataset.train, dataset.meta)
  )
  meta = {}
  if len(dataset.meta.labels):
    meta = {
      "meta_image": of_meta.reshape(len(dataset.meta.labels), -1),
      "meta_label": dataset.meta.labels,
    }
  return meta | {
    "image": images.reshape(len(images), -1),
    "label": dataset.train.labels,
    "mean": np.asarray(dataset.mean, np.float32),
    "std": np.asarray(dataset.std, np.float32),
  }


def make_halves_fn(
  config: ConfigDict,
  image_shape: tuple[int, int, int],
  devices: Collectives = ONE_DEVICE,
) -> Callable[[Batch, UInt32[Array, "2"], Int[Array, ""]], tuple[Batch, ...]]:
  """(arrays, key data, step) -> this device's share of both halves of a batch.

  With images of their own, the meta halves of half 1 and half 2 follow.

  Draws are for the whole batch and then cut, so they do not depend on the
  number of devices.
  """
  batch = config.batch

  def halves_fn(data, key, step):
    key = jax.random.wrap_key_data(key)
    order_key, augment_key = order.keys(key)
    num_train = data["label"].shape[0]
    epoch, t = jnp.divmod(step, order.steps_per_epoch(num_train, batch))
    chosen = jax.lax.dynamic_slice_in_dim(
      order.epoch_order(order_key, epoch, num_train), t * batch, batch
    )
    augment_key = jax.random.fold_in(augment_key, step)

    def halves_of(images, labels, chosen, augment_key):
      draws = augment.draw(config.data, augment_key, batch)
      return tuple(
        augment.ready(
          config.data,
          images[rows].reshape(-1, *image_shape),
          labels[rows],
          own,
          data,
        )
        for rows, own in devices.own_halves((chosen, draws))
      )

    halves = halves_of(data["image"], data["label"], chosen, augment_key)
    if "meta_label" not in data:
      return halves
    chosen = order.meta_rows(key, step, len(data["meta_label"]), batch)
    return halves + halves_of(
      data["meta_image"],
      data["meta_label"],
      chosen,
      jax.random.fold_in(augment_key, 2),
    )

  return halves_fn


class ResidentFeed:
  """The train split on the devices; see `feeds.make_feed`."""

  def __init__(
    self, dataset: Dataset, config: ConfigDict, key: Array, num_devices: int
  ):
    self._num_devices = num_devices
    self._arguments = parallel.replicate(
      (arrays(dataset), np.asarray(jax.random.key_data(key))), num_devices
    )
    devices = parallel.collectives(num_devices, config.sync)
    self._halves = parallel.map_devices(
      make_halves_fn(config, dataset.image_shape, devices), num_devices
    )

  def halves(self, step: int) -> tuple[Batch, ...]:
    """The two halves of the batch of a step, on the devices; see `feeds`."""
    return self._halves(
      *self._arguments, parallel.replicate(np.int32(step), self._num_devices)
    )

  def close(self) -> None:
    """Nothing runs in the background."""
