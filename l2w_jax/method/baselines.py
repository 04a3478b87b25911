"""Methods that learn no weights, to compare with.

Sample weights that are fixed, random or follow a rule, and the losses of
self-distillation; `models.equilibrium` is the one that changes gradients. Shapes:
B = samples on this device, N = samples of a half over all devices that compute as
one, K = exits, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2w_jax.method.losses import at_least_float32, cross_entropy


def fixed(
  losses: Float[Array, "B K"], exit_weights: Sequence[float]
) -> Float[Array, "B K"]:
  """The same weight for every sample, exit_weights[k] at exit k."""
  return jnp.broadcast_to(jnp.asarray(exit_weights, losses.dtype), losses.shape)


def random_output(key: Array, shape: tuple[int, int], dtype) -> Float[Array, "N K"]:
  """In the place of the WPN output: uniform in (-1, 1), blind to the sample."""
  return jax.random.uniform(key, shape, dtype, -1, 1)


def easy_early_output(losses: Float[Array, "N K"]) -> Float[Array, "N K"]:
  """In the place of the WPN output: easy samples early, hard ones late.

  Samples are ranked by their mean loss over exits. The output is ease · earliness,
  where ease falls evenly from 1 to -1 from the easiest sample to the hardest,
  and earliness from the first exit to the last. Detached, like the WPN's input.
  """
  losses = jax.lax.stop_gradient(losses)
  num_samples, num_exits = losses.shape
  rank = jnp.argsort(jnp.argsort(losses.mean(axis=1)))
  ease = jnp.linspace(1, -1, num_samples, dtype=losses.dtype)[rank]
  return ease[:, None] * jnp.linspace(1, -1, num_exits, dtype=losses.dtype)


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
  log_p = jax.nn.log_softmax(at_least_float32(logits) / temperature, axis=-1)
  teacher = jax.lax.stop_gradient(log_p[:, -1:])
  divergence = (jnp.exp(teacher) * (teacher - log_p)).sum(axis=-1)
  mixed = (1 - share) * losses + share * temperature**2 * divergence
  return jnp.concatenate([mixed[:, :-1], losses[:, -1:]], axis=1)
