"""Sample weights from the weight prediction network (WPN).

The WPN g with parameters Φ looks at what the backbone did with a sample, and its
tanh output u[i,k] moves the weight of the loss ℓ[i,k] inside a ball of radius ε:

    w = 1 + ε · (u - mean u)                 Han et al. (ECCV 2022), section 3.2

so the weights average to 1 over the axis that is centred. They may be negative;
nothing is clipped. Shapes: B = samples on this device, K = exits.
"""

from __future__ import annotations

from collections.abc import Callable

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
