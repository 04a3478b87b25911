"""The losses of a half, and their derivatives, in microbatches one after another.

What a derivative keeps of a forward pass grows with its batch. Here every pass
over the half is a loop over M microbatches that keeps nothing from one to the
next; a pass in reverse computes its forward pass anew. All a step needs of the
network is linear in the loss matrix [B K], so it comes together from microbatches
exactly: losses side by side, pulled-back gradients as sums. BatchNorm is the
exception, its statistics are those of a microbatch, and so are the derivatives
through them. The running statistics after the half are the mean over microbatches.

Sample i is in microbatch i mod M: with D devices and M microbatches on each, the
samples of the m-th ones are the same for any D.

`forward` is (params, part of the half) -> (losses [b K], (running statistics,
confidence [b K])).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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


def forwards(forward: Forward, half: PyTree, num_parts: int) -> Losses:
  """Params -> (losses [B K], aux) of the whole half, for forward-mode derivatives.

  One in reverse would keep what it needs of all microbatches at once.
  """
  if num_parts == 1:
    return lambda params: forward(params, half)
  parts = cut(half, num_parts)

  def losses_fn(params):
    losses, (batch_stats, confidence) = jax.lax.map(
      lambda part: forward(params, part), parts
    )
    return _joined(losses), (
      jax.tree.map(lambda x: x.mean(axis=0), batch_stats),
      _joined(confidence),
    )

  return losses_fn


def in_reverse(forward: Forward, half: PyTree, num_parts: int) -> Losses:
  """`forwards` for `jax.vjp` and `jax.grad`; aux has no derivative.

  What `jax.vjp` gives, the transposed Jacobian of the loss matrix, is linear, and
  its own transpose is one forward-mode pass: nothing is kept there either.
  """
  if num_parts == 1:
    return lambda params: forward(params, half)
  parts = cut(half, num_parts)
  everything = forwards(forward, half, num_parts)

  def transposed(params):
    @jax.custom_vjp
    def pull(cotangent):
      def add(total, part):
        _, pull_part, _ = jax.vjp(
          lambda params: forward(params, part[0]), params, has_aux=True
        )
        (gradient,) = pull_part(part[1])
        return jax.tree.map(jnp.add, total, gradient), None

      return jax.lax.scan(
        add,
        jax.tree.map(jnp.zeros_like, params),
        (parts, cut(cotangent, num_parts)),
      )[0]

    def push(_, direction):
      return (
        jax.jvp(lambda params: everything(params)[0], (params,), (direction,))[1],
      )

    pull.defvjp(lambda cotangent: (pull(cotangent), None), push)
    return pull

  losses_fn = jax.custom_vjp(everything)
  losses_fn.defvjp(
    lambda params: (everything(params), params),
    lambda params, cotangents: (transposed(params)(cotangents[0]),),
  )
  return losses_fn


def _joined(x: Array) -> Array:
  """[M b …] -> [M·b …], the order before `cut`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
