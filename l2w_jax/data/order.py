"""Which images are in the batch of a step: the same for every feed.

The order of an epoch comes from fold_in(order key, epoch) and the augmentation of
a batch from fold_in(augmentation key, step), so batch t is a pure function of the
root key and t, and a resumed run sees what the uninterrupted one would. Each epoch
leaves out the N mod 2B images its shuffled order ends with.
"""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

Batch = dict[str, ArrayLike]


def steps_per_epoch(num_train: int, batch: int) -> int:
  """Loader batches in an epoch.

  Raises:
    ValueError: the train split is smaller than one batch.
  """
  if num_train < batch:
    raise ValueError(
      f"the train split has {num_train} images, fewer than one loader batch "
      f"of {batch}; set config.batch to {num_train // 2 * 2} or less"
    )
  return num_train // batch


def keys(key: Array) -> tuple[Array, Array]:
  """(order key, augmentation key) of the root key of a feed."""
  order_key, augment_key = jax.random.split(key)
  return order_key, augment_key


def epoch_order(
  order_key: Array, epoch: Int[Array, ""] | int, num_train: int
) -> Int[Array, " N"]:
  """The shuffled train images of an epoch."""
  return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_train)
