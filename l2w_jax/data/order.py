"""Which images are in the batch of a step: the same for every feed.

The order of an epoch comes from fold_in(order key, epoch) and the augmentation of
a batch from fold_in(augmentation key, step), so batch t is a pure function of the
root key and t, and a resumed run sees what the uninterrupted one would. Each epoch
leaves out the N mod 2B images its shuffled order ends with.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Batch = dict[str, Any]  # arrays, NumPy's or JAX's


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


def check_meta(num_meta: int, batch: int) -> None:
  """Raises ValueError if `data.meta` holds fewer images than a meta half takes."""
  if 0 < num_meta < batch // 2:
    raise ValueError(
      f"config.data.meta holds {num_meta} images, fewer than the {batch // 2} of a "
      f"meta half; set it to {batch // 2} or more, or config.batch lower"
    )


def meta_rows(
  key: Array, step: Int[Array, ""] | int, num_meta: int, batch: int
) -> Int[Array, " rows"]:
  """[2B] rows of both meta halves of a step, of images that `data.meta` holds out.

  Each half is drawn without replacement, for the half itself and from all of them.

  Args:
    key: root key of the feed.
    step, num_meta, batch: the step, how many images there are, and 2B.
  """
  # `keys` splits the root in 0 and 1; this is another.
  keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2), step))
  return jnp.concatenate(
    [jax.random.permutation(k, num_meta)[: batch // 2] for k in keys]
  )


def epoch_order(
  order_key: Array, epoch: Int[Array, ""] | int, num_train: int
) -> Int[Array, " N"]:
  """The shuffled train images of an epoch."""
  return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_train)
