"""Which meta sample is scored at which exit.

A network that exits early shows each classifier only the samples that reach it,
so Han et al. (ECCV 2022, Section 3.2) score a meta sample at one exit alone.
With q the trade-off between early and late exits,

    p_k ∝ q^k,  k = 1..K,  Σ_k p_k = 1                  `proportions`
    exit k takes the floor(B·p_k) samples it is most confident of, among
    those no earlier exit took; the last exit takes the rest   `allocate`
    L_meta = Σ_k mean of the losses at exit k over its samples  `meta_loss`

The allocation is a ranking and is never differentiated. Means are summed over
exits, not averaged: one sample left to the last exit weighs as much as sixty
at the first. Shapes: B samples, K exits, Q values of q. Losses in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int


def proportions(
  q: float | Sequence[float] | ArrayLike, num_exits: int
) -> Float[Array, "*Q K"]:
  """Exit k's share of the samples is p_k ∝ q^k; the K shares sum to 1.

  Computed by NumPy in float64 and rounded up to JAX's default float, so that
  floor(N·p_k) never loses a sample where N·p_k is a whole number. Rounded to
  nearest it would: float64 makes 4 of 9 · 5/9. The released code exponentiates
  in float32 and is up to 19 units in the last place off the true shares.

  Args:
    q: positive; below 1 favours early exits. Scalar, or [Q]. Published runs
      train at 0.75 and evaluate at 1/20 … 39/20. Fixed before tracing.
    num_exits: K, at least 1.

  Returns:
    [K] for a scalar q, [Q K] for an array.

  Raises:
    ValueError: a q that is not positive and finite, or num_exits below 1.
  """
  if num_exits < 1:
    raise ValueError(f"num_exits is {num_exits}; give at least 1.")
  q = np.asarray(q, np.float64)[..., None]
  if not np.all((q > 0) & np.isfinite(q)):
    raise ValueError(
      "q must be positive and finite, as in p_k ∝ q^k; got "
      f"{q[..., 0].tolist()}. Use q < 1 for early exits, q > 1 for late ones."
    )
  steps = np.arange(num_exits, dtype=np.float64)
  # Counted from the larger end, no power exceeds 1 and none overflows.
  powers = q ** np.where(q <= 1, steps, steps - steps[-1])
  exact = powers / powers.sum(-1, keepdims=True)
  # 2^-50 is four units in the last place: more than the lines above can err.
  shares = np.minimum(exact * (1 + 2**-50), 1).astype(jnp.result_type(float))
  above = np.nextafter(shares, shares.dtype.type(2))
  return jnp.asarray(np.where(shares < exact, above, shares))


def counts_per_exit(
  num_samples: int, proportions: Float[Array, "*Q K"]
) -> Int[Array, "*Q K"]:
  """Exit k is due floor(N·p_k) samples; the last exit gets the rest instead.

  The product is taken in the dtype of `proportions`: with the float32 values
  of the released code it gives the released counts bit for bit.

  Args:
    num_samples: N.
    proportions: [K] or [Q K].

  Returns:
    int32, the shape of `proportions`; the last entry is a share like the
    others and not what the last exit ends up with.
  """
  samples = jnp.asarray(num_samples, proportions.dtype)
  return jnp.floor(samples * proportions).astype(jnp.int32)


def allocate(
  confidence: ArrayLike, proportions: ArrayLike | Sequence[float]
) -> Bool[Array, "B K"]:
  """Every sample is allocated to exactly one exit.

  Exits choose in order, each the floor(B·p_k) most confident of the samples
  left, the lowest index first among equals; the last exit takes the rest. The
  ranking is over the samples given: gather the confidences of all devices
  first where it is to be global. NaN ranks last. Gradients stop here.

  Args:
    confidence: [B K], largest softmax probability of each sample at each exit.
    proportions: [K], from `proportions`.

  Returns:
    [B K] bool, one True per row.

  Raises:
    ValueError: shapes other than [B K] and [K] with the same K.
  """
  confidence = lax.stop_gradient(jnp.asarray(confidence))
  proportions = lax.stop_gradient(jnp.asarray(proportions))
  if confidence.ndim != 2 or proportions.shape != confidence.shape[1:]:
    raise ValueError(
      "allocate needs confidence [B K] and proportions [K] with one K; got "
      f"{confidence.shape} and {proportions.shape}."
    )
  return _allocate(confidence, proportions)


def everywhere(
  confidence: ArrayLike, proportions: ArrayLike | Sequence[float]
) -> Bool[Array, "B K"]:
  """Every sample at every exit: `meta_loss` is then the plain sum of exits.

  Takes the place of `allocate` in the ablation without the paper's objective.
  """
  return jnp.ones(jnp.shape(confidence), bool)


OBJECTIVES = {"allocated": allocate, "plain": everywhere}


@jax.jit
def _allocate(
  confidence: Float[Array, "B K"], proportions: Float[Array, " K"]
) -> Bool[Array, "B K"]:
  num_samples, num_exits = confidence.shape
  last = jnp.arange(num_exits) == num_exits - 1
  due = counts_per_exit(num_samples, proportions)
  due = jnp.where(last, num_samples, due)
  order = jnp.argsort(-confidence.T, axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)

  def choose(free, exit_k):
    order_k, rank_k, due_k = exit_k
    free_in_order = free[order_k]
    first = free_in_order & (jnp.cumsum(free_in_order) <= due_k)
    chosen = first[rank_k]
    return free & ~chosen, chosen

  free = jnp.ones(num_samples, bool)
  _, allocated = lax.scan(choose, free, (order, rank, due))
  return allocated.T


def meta_loss(
  losses: Float[Array, "B K"],
  allocated: Bool[Array, "B K"],
  counts: Int[Array, " K"] | None = None,
) -> Float[Array, ""]:
  """The meta loss sums, over exits, the mean loss of the samples they took.

  An exit that took none adds 0, and its gradient is 0.

  Args:
    losses: [B K] cross-entropy of each sample at each exit, nats.
    allocated: [B K], from `allocate`.
    counts: [K] number of samples each exit took; by default counted from
      `allocated`. With the batch spread over D devices, give the counts over
      all of them: then the mean over devices of D · meta_loss is the global
      meta loss.

  Returns:
    A scalar in nats, differentiable in `losses`.
  """
  if counts is None:
    counts = allocated.sum(0)
  totals = jnp.where(allocated, losses, 0).sum(0)
  return (totals / jnp.maximum(counts, 1).astype(losses.dtype)).sum()
