"""Feed for sets that fit on the devices: batches are made inside the step.

The pixels stay on the devices as uint8; what a batch holds is said in `order`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from l2w_jax.data import augment, order
from l2w_jax.data.order import Batch
from l2w_jax.data.sources import Dataset
from l2w_jax.run import parallel
from l2w_jax.run.parallel import ONE_DEVICE, Collectives


def arrays(dataset: Dataset) -> Batch:
  """What `make_batch_fn` reads: pixels, labels and channel statistics."""
  return {
    "image": dataset.train.images,
    "label": dataset.train.labels,
    "mean": np.asarray(dataset.mean, np.float32),
    "std": np.asarray(dataset.std, np.float32),
  }


def make_batch_fn(
  config: ConfigDict, key: Array, devices: Collectives = ONE_DEVICE
) -> Callable[[Batch, Int[Array, ""]], Batch]:
  """(arrays, step) -> this device's share of the batch of that step."""
  order_key, _ = order.keys(key)
  augmented = augment.make_batch_fn(config, key, devices)

  def batch_fn(data: Batch, step: Int[Array, ""]) -> Batch:
    num_train = data["label"].shape[0]
    epoch, t = jnp.divmod(step, order.steps_per_epoch(num_train, config.batch))
    chosen = jax.lax.dynamic_slice_in_dim(
      order.epoch_order(order_key, epoch, num_train), t * config.batch, config.batch
    )
    chosen = devices.own_halves(chosen)
    own = {name: data[name][chosen] for name in ("image", "label")}
    return augmented(data | own, step)

  return batch_fn


class ResidentFeed:
  """The train split on the devices; see `feeds.make_feed`."""

  whole = True  # data serves any step
  make_batch_fn = staticmethod(make_batch_fn)

  def __init__(self, dataset: Dataset, num_devices: int):
    self._data = parallel.replicate(arrays(dataset), num_devices)

  def data(self, step: int) -> Batch:
    """The whole split, for every block of steps."""
    del step
    return self._data

  def close(self) -> None:
    """Nothing runs in the background."""
