"""Feed for sets that fit on the devices: batches are made inside the step.

The pixels stay on the devices as uint8. Batch t is a pure function of the root
key and t: the order of an epoch comes from fold_in(key, epoch), the augmentation
from fold_in(key, t), so a resumed run sees what the uninterrupted one would.
Each epoch leaves out the N mod 2B images its shuffled order ends with.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from l2w_jax.data import augment
from l2w_jax.data.sources import Dataset
from l2w_jax.parallel import ONE_DEVICE, Collectives

Batch = dict[str, ArrayLike]


def steps_per_epoch(num_train: int, batch: int) -> int:
  """Loader batches in an epoch.

  Raises:
    ValueError: the train split is smaller than one batch.
  """
  if num_train < batch:
    raise ValueError(
        f"the train split has {num_train} images, fewer than one loader batch "
        f"of {batch}; set config.batch to {num_train // 2 * 2} or less")
  return num_train // batch


def arrays(dataset: Dataset) -> Batch:
  """What `make_batch_fn` reads: pixels, labels and channel statistics."""
  return {
      "image": dataset.train.images, "label": dataset.train.labels,
      "mean": np.asarray(dataset.mean, np.float32),
      "std": np.asarray(dataset.std, np.float32)}


def make_batch_fn(
    config: ConfigDict, key: Array, devices: Collectives = ONE_DEVICE,
) -> Callable[[Batch, Int[Array, ""]], Batch]:
  """(arrays, step) -> this device's share of the batch of that step.

  Draws are for the whole batch and then cut, so they do not depend on the
  number of devices.
  """
  order_key, augment_key = jax.random.split(key)
  batch = config.batch

  def batch_fn(data: Batch, step: Int[Array, ""]) -> Batch:
    num_train = data["label"].shape[0]
    epoch, t = jnp.divmod(step, steps_per_epoch(num_train, batch))
    order = jax.random.permutation(
        jax.random.fold_in(order_key, epoch), num_train)
    chosen = jax.lax.dynamic_slice_in_dim(order, t * batch, batch)
    draws = _draws(config, jax.random.fold_in(augment_key, step), batch)
    chosen, draws = jax.tree.map(devices.own_halves, (chosen, draws))
    images = data["image"][chosen]
    if "offsets" in draws:
      images = augment.shift(images, draws["offsets"], config.data.pad)
    if "mirrored" in draws:
      images = augment.flip(images, draws["mirrored"])
    return {"image": augment.normalize(images, data["mean"], data["std"]),
            "label": data["label"][chosen]}

  return batch_fn


def _draws(config: ConfigDict, key: Array, batch: int) -> dict[str, Array]:
  offsets_key, flip_key = jax.random.split(key)
  draws = {}
  if config.data.augment in ("shift", "shift_flip"):
    draws["offsets"] = jax.random.randint(
        offsets_key, (batch, 2), 0, 2 * config.data.pad + 1)
  if config.data.augment == "shift_flip":
    draws["mirrored"] = jax.random.bernoulli(flip_key, shape=(batch,))
  return draws
