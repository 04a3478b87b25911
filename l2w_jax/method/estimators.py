"""Eq. 8 by how fast each loss changes along a direction in Θ.

With v = ∇ L_meta at Θ̂, and α the factor by which an SGD step scales its gradient,

    ∂L_meta/∂w[i,k] = -(α/B) ⟨∇_Θ ℓ[i,k], v⟩

is how fast ℓ[i,k] changes along the direction -α v, over B. `wpn_gradient` gives
that direction to one of three functions, (Θ -> losses, Θ, direction) -> slopes:

    jvp                exact, one forward-mode pass for the whole matrix
    finite_difference  approximate, two more forward passes
    first_order        exits told apart, samples not

Shapes: B = samples on this device, K = exits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l2w_jax.method.meta import (
  MetaGradient,
  MetaLoss,
  Params,
  Pull,
  backbone_gradient,
)

LossesFn = Callable[[Params], Float[Array, "B K"]]
FINITE_STEP = 0.01  # length in Θ of a finite difference's step


def wpn_gradient(
  wpn_params: Params,
  pull: Pull,
  weights_fn: Callable[[Params], Float[Array, "B K"]],
  sgd_step: Callable[[Params], Params],
  meta_loss_fn: MetaLoss,
  slopes_fn: Callable[[Params], Float[Array, "B K"]],
) -> MetaGradient:
  """`meta.wpn_gradient` from slopes; see there and `meta.pseudo_update`.

  The direction is v pulled back through the SGD step, which keeps -α v of it:
  momentum and weight decay do not depend on Φ. Over devices it is the mean of
  their v, the same on each.

  Args:
    wpn_params: Φ.
    pull, sgd_step: as in `meta.pseudo_update`.
    weights_fn: Φ -> sample weights [B K] of the train half.
    meta_loss_fn: as in `meta.wpn_gradient`.
    slopes_fn: direction in Θ -> how fast each loss changes along it.
  """
  weights, pull_weights = jax.vjp(weights_fn, wpn_params)
  pseudo_params, pull_step = jax.vjp(sgd_step, backbone_gradient(pull, weights))
  loss, v = jax.value_and_grad(meta_loss_fn, has_aux=True)(pseudo_params)
  (direction,) = pull_step(v)
  (gradient,) = pull_weights(slopes_fn(direction) / weights.shape[0])
  return loss, gradient


def jvp(
  losses_fn: LossesFn, params: Params, direction: Params
) -> Float[Array, "B K"]:
  """Exact slopes."""
  return jax.jvp(losses_fn, (params,), (direction,))[1]


def finite_difference(
  losses_fn: LossesFn, params: Params, direction: Params
) -> Float[Array, "B K"]:
  """Slopes as DARTS approximates them.

      (ℓ[i,k](Θ + h v) - ℓ[i,k](Θ - h v)) / 2h

  with h = 0.01/|v| (Liu et al., ICLR 2019, section 2.3). They differentiate L_tr
  at Θ ± h v by Φ; L_tr being Σ w ℓ, all that differs there are the losses. The WPN
  looks at the losses at Θ in both. Wrong by O(h²), by ReLUs that switch in
  between, and by the rounding of ℓ over h.
  """
  squares = sum(jnp.vdot(x, x) for x in jax.tree.leaves(direction))
  h = FINITE_STEP / jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares).tiny))

  def losses_at(h):
    return losses_fn(jax.tree.map(lambda p, d: p + h * d, params, direction))

  return (losses_at(h) - losses_at(-h)) / (2 * h)


def first_order(
  losses_fn: LossesFn,
  params: Params,
  direction: Params,
  average: Callable[[Array], Array] = lambda mean: mean,
) -> Float[Array, "B K"]:
  """Slopes of a look-ahead to which all samples of an exit look alike.

  Every ∇_Θ ℓ[i,k] is replaced by its mean over the batch, so the WPN learns which
  exits should weigh more, not which samples. It reads the pass of `jvp` only as
  means and saves nothing: it shows what telling samples apart is worth. Were exits
  alike, too, the gradient would be 0: centred weights keep their sum. Weights
  centred over the batch keep the sum of each exit, so there even this form gives
  0, and `config` refuses it.

  Args:
    losses_fn, params, direction: as for `jvp`.
    average: mean over devices.
  """
  slopes = jvp(losses_fn, params, direction)
  return jnp.broadcast_to(average(slopes.mean(axis=0)), slopes.shape)


# Name in config.meta.estimator -> slopes.
SLOPES = {
  "jvp": jvp,
  "finite_difference": finite_difference,
  "first_order": first_order,
}
