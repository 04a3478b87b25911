"""The losses of a half in microbatches, one after another.

What a derivative keeps of a forward pass grows with its batch. Here a half is a
loop over M microbatches that keeps nothing of the network from one to the next; a
pass in reverse computes its forward pass anew (`jax.checkpoint`). BatchNorm's
statistics are those of a microbatch, and so are the derivatives through them; all
else is as exact as in one piece. The running statistics after the half are the mean
over microbatches. XLA:CPU runs convolutions inside a loop some 25 times slower, so
this is for accelerators.

Sample i is in microbatch i mod M: with D devices and M microbatches on each, the
samples of the m-th ones are the same for any D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

Forward = Callable[[PyTree, PyTree], tuple[Float[Array, "b K"], Any]]
Losses = Callable[[PyTree], tuple[Float[Array, "B K"], Any]]


def cut(half: PyTree, num_parts: int) -> PyTree:
  """[M B/M …]: sample i is in part i mod M.

  Raises:
    ValueError: M does not divide B.
  """
  size = jax.tree.leaves(half)[0].shape[0]
  if size % num_parts:
    raise ValueError(
      f"a half of {size} samples per device does not split into {num_parts} "
      "equal parts; change the batch, config.microbatches or "
      "config.meta.estimator"
    )
  return jax.tree.map(
    lambda x: x.reshape(size // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1),
    half,
  )


def losses_fn(forward: Forward, half: PyTree, num_parts: int) -> Losses:
  """Θ -> (losses [B K], (running statistics, confidence [B K])) of a half.

  Args:
    forward: (Θ, part of the half) -> the same of the part.
    half: arrays [B …].
    num_parts: M; 1 is `forward` itself.
  """
  if num_parts == 1:
    return lambda params: forward(params, half)
  parts = cut(half, num_parts)

  def losses(params):
    found, (batch_stats, confidence) = jax.lax.map(
      lambda part: jax.checkpoint(forward)(params, part), parts
    )
    mean = jax.tree.map(lambda x: x.mean(axis=0), batch_stats)
    return _joined(found), (mean, _joined(confidence))

  return losses


def _joined(x: Array) -> Array:
  """[M b …] -> [M·b …], the order before `cut`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
