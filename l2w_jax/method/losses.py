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
  log_p = jax.nn.log_softmax(_at_least_float32(logits), axis=-1)
  picked = jnp.take_along_axis(log_p, labels[:, None, None], axis=-1)[..., 0]
  if label_smoothing == 0:
    return -picked
  spread = log_p.mean(axis=-1)
  return -(1 - label_smoothing) * picked - label_smoothing * spread


def self_distillation(
  logits: Float[Array, "B K C"],
  labels: Int[Array, " B"],
  label_smoothing: float,
  share: float,
  temperature: float,
) -> Float[Array, "B K"]:
  """Earlier exits also learn from the soft labels of the last one.

  With p_k = softmax(logits_k / T), and p_K detached, exit k < K has

      (1 - share) · cross-entropy + share · T² · KL(p_K ‖ p_k)

  and the last exit its cross-entropy. T² keeps both terms alike in scale
  (Hinton et al., 2015); the last exit as teacher is Phuong and Lampert's (ICCV
  2019).

  Returns:
    losses in nats.
  """
  losses = cross_entropy(logits, labels, label_smoothing)
  log_p = jax.nn.log_softmax(_at_least_float32(logits) / temperature, axis=-1)
  teacher = jax.lax.stop_gradient(log_p[:, -1:])
  divergence = (jnp.exp(teacher) * (teacher - log_p)).sum(axis=-1)
  mixed = (1 - share) * losses + share * temperature**2 * divergence
  return jnp.concatenate([mixed[:, :-1], losses[:, -1:]], axis=1)


def confidence(logits: Float[Array, "B K C"]) -> Float[Array, "B K"]:
  """Largest softmax probability of each sample at each exit, in (0, 1]."""
  return jax.nn.softmax(_at_least_float32(logits), axis=-1).max(axis=-1)


def _at_least_float32(logits: Array) -> Array:
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
