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

Networks, optimizers and devices come in as functions; nothing here knows them.
Means are over the samples of one device, and the caller takes those over devices:
of the gradient in `sgd_step`, and of what `wpn_gradient` returns.
Shapes: B = samples on this device, K = exits. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

Params = PyTree
Pull = Callable[[Float[Array, "B K"]], tuple[Params]]
MetaLoss = Callable[[Params], tuple[Float[Array, ""], Any]]
# ((L_meta, anything else worth keeping), ∇_Φ L_meta).
MetaGradient = tuple[tuple[Float[Array, ""], Any], Params]


def backbone_gradient(pull: Pull, weights: Float[Array, "B K"]) -> Params:
  """∇_Θ L_tr for given weights: the gradient of Eqs. 7 and 9.

  L_tr = Σ_k mean_i w[i,k] ℓ[i,k]: summed over exits, averaged over the samples
  of this device. Weights are data here; nothing flows from them back to Θ.
  """
  (gradient,) = pull(weights / weights.shape[0])
  return gradient


def pseudo_update(
  pull: Pull, weights: Float[Array, "B K"], sgd_step: Callable[[Params], Params]
) -> Params:
  """Θ̂, the look-ahead backbone of Eq. 7.

  Args:
    pull: transposed Jacobian of the loss matrix at Θ, from `jax.vjp`.
    weights: sample weights, a function of Φ when differentiated.
    sgd_step: gradient -> parameters after one step of the real optimizer
      (current learning rate, momentum buffer, weight decay). What that step
      does to the optimizer's state is dropped.
  """
  return sgd_step(backbone_gradient(pull, weights))


def unrolled_update(
  inner_step: Callable[[tuple, PyTree], tuple],
  start: tuple,
  parts: Iterable[PyTree],
) -> Params:
  """Θ_T, a look-ahead of T steps on T parts of the train half.

      Θ_0 = Θ,  Θ_t = one SGD step from Θ_(t-1) on part t, weighted by Φ

  Differentiated whole: Φ also moves the losses that the WPN looks at in later
  steps, and the gradients they take, so second derivatives of the network are
  formed. A step keeps its beginning only and is computed anew backwards. With
  T = 1 it is `pseudo_update`.

  Args:
    inner_step: ((Θ, state of the optimizer), part) -> the same after the step.
    start: (Θ, state of the optimizer).
    parts: T parts of the train half.
  """
  for part in parts:
    start = jax.checkpoint(inner_step)(start, part)
  return start[0]


def wpn_gradient(
  wpn_params: Params, look_ahead: Callable[[Params], Params], meta_loss_fn: MetaLoss
) -> MetaGradient:
  """((L_meta, aux), ∇_Φ L_meta(Θ̂(Φ))): Eq. 8 as it is defined, exact.

  Args:
    wpn_params: Φ.
    look_ahead: Φ -> Θ̂, of Eq. 7.
    meta_loss_fn: Θ̂ -> (L_meta on the meta half, aux). It decides inside which
      exit scores which sample, without a gradient.
  """
  return jax.value_and_grad(
    lambda wpn_params: meta_loss_fn(look_ahead(wpn_params)), has_aux=True
  )(wpn_params)
