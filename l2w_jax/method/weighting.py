"""Sample weights from the weight prediction network (WPN).

The WPN g with parameters Φ looks at what the backbone did with a sample, and its
tanh output u[i,k] moves the weight of the loss ℓ[i,k] inside a ball of radius ε:

    w = 1 + ε · (u - mean u)                 Han et al. (ECCV 2022), section 3.2

so the weights average to 1 over the axis that is centred. They may be negative;
nothing is clipped. Weights that are not learned, to compare with, are below.
Shapes: B = samples on this device, K = exits, N = samples of a half over all
devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def num_features(inputs: str, num_exits: int) -> int:
  """Width of the WPN input: K for one kind of input, 2K for both."""
  return 2 * num_exits if inputs == "both" else num_exits


def features(
  losses: Float[Array, "B K"], confidence: Float[Array, "B K"], inputs: str
) -> Float[Array, "B F"]:
  """WPN input, detached: losses, confidences, or both side by side.

  The gradient stops here, so neither Eq. 7 nor Eq. 9 differentiates a weight
  with respect to Θ.
  """
  chosen = attached_features(losses, confidence, inputs)
  return jax.lax.stop_gradient(chosen)


def attached_features(
  losses: Float[Array, "B K"], confidence: Float[Array, "B K"], inputs: str
) -> Float[Array, "B F"]:
  """`features` before the gradient stops, for a look-ahead of several steps.

  There Θ itself depends on Φ after the first step, and so do the losses.
  """
  return {
    "loss": losses,
    "confidence": confidence,
    "both": jnp.concatenate([losses, confidence], axis=1),
  }[inputs]


def sample_weights(
  output: Float[Array, "B K"],
  epsilon: float,
  center_over: str,
  average: Callable[[Array], Array] = lambda mean: mean,
) -> Float[Array, "B K"]:
  """Weights w = 1 + ε (u - mean u) of mean 1 over `center_over`.

  Args:
    output: WPN output u in (-1, 1).
    epsilon: radius ε of the perturbation, in [0, 1].
    center_over: "exits" (each sample's weights average to 1 over its exits),
      "batch" (each exit's weights average to 1 over the samples) or "all".
    average: mean of a value over devices. "batch" and "all" go through it, so
      centring is over the global batch; the identity centres over this device.
  """
  if center_over == "exits":
    mean = output.mean(axis=1, keepdims=True)
  elif center_over == "batch":
    mean = average(output.mean(axis=0, keepdims=True))
  else:
    mean = average(output.mean(keepdims=True))
  return 1 + epsilon * (output - mean)


def check_exit_weights(exit_weights: Sequence[float], num_exits: int) -> None:
  """Raises ValueError unless there is one weight for each exit."""
  if len(exit_weights) != num_exits:
    raise ValueError(
      "method fixed needs config.baseline.exit_weights with one weight for "
      f"each of the {num_exits} exits; got {tuple(exit_weights)}"
    )


def fixed(
  losses: Float[Array, "B K"], exit_weights: Sequence[float]
) -> Float[Array, "B K"]:
  """The same weight for every sample, exit_weights[k] at exit k."""
  return jnp.broadcast_to(jnp.asarray(exit_weights, losses.dtype), losses.shape)


def random_output(key: Array, losses: Float[Array, "N K"]) -> Float[Array, "N K"]:
  """In the place of the WPN output: uniform in (-1, 1), blind to the sample."""
  return jax.random.uniform(key, losses.shape, losses.dtype, -1, 1)


def easy_early_output(losses: Float[Array, "N K"]) -> Float[Array, "N K"]:
  """In the place of the WPN output: easy samples early, hard ones late.

  Samples are ranked by their mean loss over exits. The output is ease · earliness,
  where ease falls evenly from 1 to -1 from the easiest sample to the hardest,
  and earliness from the first exit to the last. Detached, like `features`.
  """
  losses = jax.lax.stop_gradient(losses)
  num_samples, num_exits = losses.shape
  rank = jnp.argsort(jnp.argsort(losses.mean(axis=1)))
  ease = jnp.linspace(1, -1, num_samples, dtype=losses.dtype)[rank]
  return ease[:, None] * jnp.linspace(1, -1, num_exits, dtype=losses.dtype)
