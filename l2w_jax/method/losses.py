"""Cross-entropy and confidence, per sample and exit.

Shapes: B = samples, K = exits, C = classes. Losses are in nats. All functions
stay unreduced: what a loss weighs is decided by `weighting` and `allocation`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[Array, "B K C"],
  labels: Int[Array, " B"],
  label_smoothing: float = 0.0,
) -> Float[Array, "B K"]:
  """Cross-entropy ℓ[i,k] of sample i at exit k in nats, not reduced.

  Args:
    logits: one row of class scores per sample and exit.
    labels: class of each sample, in [0, C).
    label_smoothing: probability mass s spread evenly over all C classes; the
      target is (1 - s)·onehot + s/C. A python float in [0, 1).

  Returns:
    Losses in the dtype of the logits (at least float32).
  """
  log_p = jax.nn.log_softmax(at_least_float32(logits), axis=-1)
  picked = jnp.take_along_axis(log_p, labels[:, None, None], axis=-1)[..., 0]
  if label_smoothing == 0:
    return -picked
  spread = log_p.mean(axis=-1)
  return -(1 - label_smoothing) * picked - label_smoothing * spread


def confidence(logits: Float[Array, "B K C"]) -> Float[Array, "B K"]:
  """Largest softmax probability of each sample at each exit, in (0, 1]."""
  return jax.nn.softmax(at_least_float32(logits), axis=-1).max(axis=-1)


def at_least_float32(logits: Array) -> Array:
  """Logits in float32, or in their dtype if that is wider."""
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
