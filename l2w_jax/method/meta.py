"""The three updates of one L2W step.

Θ is the backbone, Φ the weight prediction network (WPN), L_tr the weighted loss on
the train half of a batch and L_meta the loss on its meta half, each meta sample
scored only at the exit it would leave from. Han et al. (ECCV 2022) alternate

    Θ̂(Φ) = Θ - α ∇_Θ L_tr(Θ, Φ)        Eq. 7   `pseudo_update`
    Φ⁺    = Φ - β ∇_Φ L_meta(Θ̂(Φ))      Eq. 8   `wpn_gradient`
    Θ⁺    = Θ - α ∇_Θ L_tr(Θ, Φ⁺)       Eq. 9   `backbone_gradient`

where "- α ∇" stands for one step of the backbone's own optimizer, momentum and
weight decay included, and "- β ∇" for one of the WPN's.

The weights enter ∇_Θ L_tr linearly: with L_tr = Σ_k mean_i w[i,k] ℓ[i,k] it is
the vector-Jacobian product of the loss matrix with w / B. So a caller forms

    losses, pull = jax.vjp(losses_fn, params)

once, and Eqs. 7 and 9 share that one forward pass: `pull` is all they need of
the network. `jax.grad` with respect to Φ through `pull` transposes a linear map;
no second derivative of the network is ever formed, and the gradient is exact.
`config.meta.estimator` chooses it, or another function of `ESTIMATORS`, all of
which take the same `LookAhead`.

Networks, optimizers and devices come in as functions; nothing here knows them.
Shapes: B = samples on this device, K = exits. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Params = PyTree
Pull = Callable[[Float[Array, "B K"]], tuple[Params]]
FINITE_STEP = 0.01  # length in Θ of a finite difference's step


def backbone_gradient(pull: Pull, weights: Float[Array, "B K"]) -> Params:
  """∇_Θ L_tr for given weights: the gradient of Eqs. 7 and 9.

  L_tr = Σ_k mean_i w[i,k] ℓ[i,k]: summed over exits, averaged over the samples
  of this device. Weights are data here; nothing flows from them back to Θ.
  """
  (gradient,) = pull(weights / weights.shape[0])
  return gradient


def pseudo_update(
  pull: Pull,
  weights: Float[Array, "B K"],
  sgd_step: Callable[[Params], Params],
  average: Callable[[Params], Params],
) -> Params:
  """Θ̂, the look-ahead backbone of Eq. 7.

  Args:
    pull: transposed Jacobian of the loss matrix at Θ, from `jax.vjp`.
    weights: sample weights, a function of Φ when differentiated.
    sgd_step: gradient -> parameters after one step of the real optimizer
      (current learning rate, momentum buffer, weight decay). What that step
      does to the optimizer's state is dropped.
    average: mean of a gradient over devices.
  """
  return sgd_step(average(backbone_gradient(pull, weights)))


class LookAhead(NamedTuple):
  """One look-ahead, as functions: all that an estimator of Eq. 8 is given.

  params: Θ.
  losses_fn: Θ -> loss matrix [B K] of the train half.
  pull: its transposed Jacobian at Θ, from `jax.vjp`.
  weights_fn: Φ -> sample weights [B K] of the train half.
  sgd_step, average: as in `pseudo_update`.
  meta_loss_fn: Θ̂ -> (L_meta on the meta half, anything else worth keeping). It
    decides inside which exit scores which sample, without a gradient.
  again: Θ for a second pass over the network, which may begin when a second value
    is known; see `train_step.after`.
  opt_state, parts, inner_step: where a look-ahead of T steps begins beside Θ, its
    T pieces of the train half, stacked [T …], and the whole step on one of them,
    (Φ, (Θ, opt_state), part) -> (Θ, opt_state). Only `wpn_gradient_unroll` reads
    them.
  """

  params: Params
  losses_fn: Callable[[Params], Float[Array, "B K"]]
  pull: Pull
  weights_fn: Callable[[Params], Float[Array, "B K"]]
  sgd_step: Callable[[Params], Params]
  meta_loss_fn: Callable[[Params], tuple[Float[Array, ""], Any]]
  average: Callable[[Params], Params] = lambda mean: mean
  again: Callable[[Params, PyTree], Params] = lambda params, known: params
  opt_state: PyTree = None
  parts: PyTree = None
  inner_step: Callable[[Params, tuple, PyTree], tuple] | None = None


MetaGradient = tuple[tuple[Float[Array, ""], Any], Params]


def wpn_gradient(wpn_params: Params, look: LookAhead) -> MetaGradient:
  """((L_meta, aux), ∇_Φ L_meta(Θ̂(Φ))): Eq. 8 as it is defined, exact."""

  def pseudo_params(wpn_params):
    return pseudo_update(
      look.pull, look.weights_fn(wpn_params), look.sgd_step, look.average
    )

  return _differentiate(pseudo_params, wpn_params, look)


def wpn_gradient_jvp(wpn_params: Params, look: LookAhead) -> MetaGradient:
  """`wpn_gradient` by another road: one forward-mode pass over the train half.

  With v = ∇ L_meta at Θ̂, and α the factor by which an SGD step scales its
  gradient,

      ∂L_meta/∂w[i,k] = -(α/B) ⟨∇_Θ ℓ[i,k], v⟩

  is how fast ℓ[i,k] changes along -α v, which `jax.jvp` gives for the whole
  matrix at once. Exact.
  """

  def slopes(direction):
    params = look.again(look.params, direction)
    return jax.jvp(look.losses_fn, (params,), (direction,))[1]

  return _from_slopes(slopes, wpn_params, look)


def wpn_gradient_finite_difference(
  wpn_params: Params, look: LookAhead
) -> MetaGradient:
  """`wpn_gradient` by two more forward passes, as DARTS approximates it.

      ∂L_meta/∂w[i,k] ≈ -(α/B) (ℓ[i,k](Θ + h v) - ℓ[i,k](Θ - h v)) / 2h

  with h = 0.01/|v| (Liu et al., ICLR 2019, section 2.3). They differentiate L_tr
  at Θ ± h v by Φ; L_tr being Σ w ℓ, all that differs there are the losses. The WPN
  looks at the losses at Θ in both. Wrong by O(h²), by ReLUs that switch in
  between, and by the rounding of ℓ over h.
  """

  def slopes(direction):
    squares = sum(jnp.vdot(x, x) for x in jax.tree.leaves(direction))
    h = FINITE_STEP / jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares).tiny))

    def losses_at(h):
      return look.losses_fn(
        jax.tree.map(lambda p, d: p + h * d, look.params, direction)
      )

    return (losses_at(h) - losses_at(-h)) / (2 * h)

  return _from_slopes(slopes, wpn_params, look)


def wpn_gradient_first_order(wpn_params: Params, look: LookAhead) -> MetaGradient:
  """`wpn_gradient` for a look-ahead to which all samples of an exit look alike.

  Every ∇_Θ ℓ[i,k] is replaced by its mean over the batch:

      ∂L_meta/∂w[i,k] ≈ -(α/B) ⟨∇_Θ mean_j ℓ[j,k], v⟩

  so the WPN learns which exits should weigh more, not which samples. It reads
  the pass of `wpn_gradient_jvp` only as means and saves nothing: it shows what
  telling samples apart is worth. Were exits alike, too, as where only
  ⟨∇_Θ L_tr, v⟩ is known because that pass is left out, the gradient would be 0:
  centred weights keep their sum. Weights centred over the batch keep the sum of
  each exit, so there even this form gives 0, and `config` refuses it.
  """

  def slopes(direction):
    per_sample = jax.jvp(look.losses_fn, (look.params,), (direction,))[1]
    return jnp.broadcast_to(look.average(per_sample.mean(axis=0)), per_sample.shape)

  return _from_slopes(slopes, wpn_params, look)


def _from_slopes(
  slopes: Callable[[Params], Float[Array, "B K"]],
  wpn_params: Params,
  look: LookAhead,
) -> MetaGradient:
  """Eq. 8 from how fast each loss changes along a direction in Θ.

  The direction is v pulled back through the SGD step, which keeps -α v of it:
  momentum and weight decay do not depend on Φ. Over devices it is the mean of
  their v, the same on each; a device gives the slopes of its own samples, whose
  gradients by Φ are averaged at the end.
  """
  weights, pull_weights = jax.vjp(look.weights_fn, wpn_params)
  pseudo_params, pull_step = jax.vjp(
    lambda gradient: look.sgd_step(look.average(gradient)),
    backbone_gradient(look.pull, weights),
  )
  (meta_loss, aux), v = jax.value_and_grad(look.meta_loss_fn, has_aux=True)(
    pseudo_params
  )
  (direction,) = pull_step(v)
  (gradient,) = pull_weights(slopes(direction) / weights.shape[0])
  return (look.average(meta_loss), aux), look.average(gradient)


def wpn_gradient_unroll(wpn_params: Params, look: LookAhead) -> MetaGradient:
  """∇_Φ L_meta(Θ_T(Φ)), exact through T steps on T parts of the train half.

      Θ_0 = Θ,  Θ_t = one SGD step from Θ_(t-1) on part t, weighted by Φ

  momentum carried along. Each step is differentiated whole: Φ also moves the
  losses that the WPN looks at in later steps, and the gradients they take, so
  this does form second derivatives of the network. A step keeps its beginning
  only and is computed anew backwards (`jax.checkpoint`): memory grows by a copy
  of Θ and the momentum per step. With T = 1 it is `wpn_gradient`.
  """

  def pseudo_params(wpn_params):
    def step(carry, part):
      return look.inner_step(wpn_params, carry, part), None

    (params, _), _ = jax.lax.scan(
      jax.checkpoint(step), (look.params, look.opt_state), look.parts
    )
    return params

  return _differentiate(pseudo_params, wpn_params, look)


def _differentiate(
  pseudo_params: Callable[[Params], Params], wpn_params: Params, look: LookAhead
) -> MetaGradient:
  """`jax.grad` of L_meta after a look-ahead, Φ -> Θ̂."""
  (meta_loss, aux), gradient = jax.value_and_grad(
    lambda wpn_params: look.meta_loss_fn(pseudo_params(wpn_params)), has_aux=True
  )(wpn_params)
  return (look.average(meta_loss), aux), look.average(gradient)


# Name in config.meta.estimator -> estimator of Eq. 8.
ESTIMATORS = {
  "grad": wpn_gradient,
  "jvp": wpn_gradient_jvp,
  "finite_difference": wpn_gradient_finite_difference,
  "first_order": wpn_gradient_first_order,
  "unroll": wpn_gradient_unroll,
}
