"""Eqs. 7, 8 and 9 against closed forms on models small enough for paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

from l2w_jax.method import estimators, meta, weighting


@pytest.fixture(autouse=True)
def x64():
  with enable_x64(True):
    yield


def least_squares(x, y):
  """Theta [K d] -> losses ½ (theta_k·x_i - y_i)² [B K]."""

  def losses_fn(theta):
    return 0.5 * jnp.square(x @ theta.T - y[:, None])

  return losses_fn


def test_two_parameters_by_hand():
  """One sample, one exit, one parameter each for Θ and Φ.

  ℓ(θ) = θ²/2 at x = 1, y = 0, and w(φ) = φ. With α = 0.1, momentum 0.5 on a
  buffer of 2 and weight decay 0.1, at θ = 3:

    Θ̂(φ) = 3 - 0.1 (φ·3 + 0.5·2 + 0.1·3) = 2.87 - 0.3 φ

  The meta loss is ½ (θ - 1)² on another sample, so its gradient in φ is
  (Θ̂ - 1)·(-0.3); at φ = 1 that is 1.57 · -0.3 = -0.471.
  """
  losses_fn = least_squares(jnp.ones((1, 1)), jnp.zeros(1))
  theta = jnp.full((1, 1), 3.0)
  losses, pull = jax.vjp(losses_fn, theta)
  np.testing.assert_allclose(losses, [[4.5]])

  def sgd_step(gradient):
    return theta - 0.1 * (gradient + 0.5 * 2.0 + 0.1 * theta)

  def meta_loss_fn(pseudo):
    return 0.5 * jnp.square(pseudo[0, 0] - 1), pseudo

  def look_ahead(phi):
    return meta.pseudo_update(pull, phi[None, None], sgd_step)

  (meta_loss, pseudo), gradient = meta.wpn_gradient(
    jnp.ones(()), look_ahead, meta_loss_fn
  )
  np.testing.assert_allclose(pseudo, [[2.57]], rtol=1e-14)
  np.testing.assert_allclose(meta_loss, 0.5 * 1.57**2, rtol=1e-14)
  np.testing.assert_allclose(gradient, -0.471, rtol=1e-14)
  # Eq. 9 with φ⁺ = 1.5: the gradient of 1.5·θ²/2 at 3.
  np.testing.assert_allclose(
    meta.backbone_gradient(pull, jnp.full((1, 1), 1.5)), [[4.5]], rtol=1e-14
  )


def problem(seed=0, num=7, exits=3, dim=4):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(num, dim)),
    "y": rng.normal(size=num),
    "meta_x": rng.normal(size=(num, dim)),
    "meta_y": rng.normal(size=num),
    "theta": rng.normal(size=(exits, dim)),
    "buffer": rng.normal(size=(exits, dim)),
    "phi": rng.normal(size=(exits, exits)),
    "exit_of_sample": rng.integers(0, exits, num),
  }


ALPHA, MOMENTUM, DECAY, EPSILON = 0.3, 0.9, 0.05, 0.7


def ours(p, phi, estimator="grad"):
  """(L_meta, ∇_Φ L_meta) with a one-layer tanh WPN on the losses."""
  losses_fn = least_squares(jnp.asarray(p["x"]), jnp.asarray(p["y"]))
  losses, pull = jax.vjp(losses_fn, p["theta"])
  features = weighting.features(losses, losses, "loss")

  def weights_fn(phi):
    return weighting.sample_weights(jnp.tanh(features @ phi), EPSILON, "exits")

  def sgd_step(gradient):
    return p["theta"] - ALPHA * (
      gradient + MOMENTUM * p["buffer"] + DECAY * p["theta"]
    )

  taken = np.eye(len(p["theta"]))[p["exit_of_sample"]]
  share = taken / np.maximum(taken.sum(0), 1)

  def meta_loss_fn(pseudo):
    losses = least_squares(p["meta_x"], p["meta_y"])(pseudo)
    return (share * losses).sum(), None

  if estimator == "grad":
    (meta_loss, _), gradient = meta.wpn_gradient(
      phi,
      lambda phi: meta.pseudo_update(pull, weights_fn(phi), jax.jit(sgd_step)),
      meta_loss_fn,
    )
  else:
    slopes_fn = functools.partial(
      estimators.SLOPES[estimator], losses_fn, p["theta"]
    )
    (meta_loss, _), gradient = estimators.wpn_gradient(
      phi, pull, weights_fn, jax.jit(sgd_step), meta_loss_fn, slopes_fn
    )
  return meta_loss, gradient


def closed_form(p, phi, samples_alike=False):
  """∂L_meta/∂Φ for least squares, every factor on paper.

  r_ik = θ_k·x_i - y_i is the residual, so ∇ℓ[i,k] = r_ik x_i. With v_k the
  mean of r̂ x̂ over the meta samples of exit k,
  ∂L_meta/∂w[i,k] = -(α/B) r_ik (x_i·v_k); centring over exits subtracts the
  row mean, and tanh multiplies by 1 - u².
  """
  num, exits = len(p["x"]), len(p["theta"])
  residual = p["x"] @ p["theta"].T - p["y"][:, None]
  losses = 0.5 * residual**2
  u = np.tanh(losses @ phi)
  w = 1 + EPSILON * (u - u.mean(1, keepdims=True))
  gradient = np.stack(
    [
      sum(w[i, k] * residual[i, k] * p["x"][i] for i in range(num)) / num
      for k in range(exits)
    ]
  )
  pseudo = p["theta"] - ALPHA * (
    gradient + MOMENTUM * p["buffer"] + DECAY * p["theta"]
  )
  meta_residual = p["meta_x"] @ pseudo.T - p["meta_y"][:, None]
  v = np.zeros_like(pseudo)
  for k in range(exits):
    own = np.flatnonzero(p["exit_of_sample"] == k)
    for i in own:
      v[k] += meta_residual[i, k] * p["meta_x"][i] / len(own)
  slopes = residual * (p["x"] @ v.T)
  if samples_alike:
    slopes = np.tile(slopes.mean(0), (num, 1))
  dw = -(ALPHA / num) * slopes
  du = EPSILON * (dw - dw.mean(1, keepdims=True))
  return losses.T @ (du * (1 - u**2))


# The losses are quadratic, so a central difference is exact but for rounding,
# 1e-16 times losses of up to 20 over steps of 0.01.
TOLERANCES = {
  "grad": 1e-11,
  "jvp": 1e-11,
  "finite_difference": 1e-9,
  "first_order": 1e-11,
}


@pytest.mark.parametrize("estimator", TOLERANCES)
@pytest.mark.parametrize("seed", range(3))
def test_wpn_gradient_is_the_closed_form(seed, estimator):
  p = problem(seed)
  _, gradient = ours(p, jnp.asarray(p["phi"]), estimator)
  np.testing.assert_allclose(
    gradient,
    closed_form(p, p["phi"], estimator == "first_order"),
    rtol=TOLERANCES[estimator],
  )


@pytest.mark.parametrize("center_over", ["exits", "batch", "all"])
def test_one_slope_for_all_samples_and_exits_is_no_gradient(center_over):
  """Why `first_order` tells exits apart."""
  u = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
  _, pull = jax.vjp(lambda u: weighting.sample_weights(u, EPSILON, center_over), u)
  np.testing.assert_allclose(pull(jnp.full((7, 3), 0.3))[0], 0, atol=1e-15)


def test_a_meta_loss_without_slope_has_a_finite_difference():
  losses_fn = least_squares(jnp.ones((1, 1)), jnp.zeros(1))
  slopes = estimators.finite_difference(
    losses_fn, jnp.ones((1, 1)), jnp.zeros((1, 1))
  )
  np.testing.assert_array_equal(slopes, [[0]])


def test_wpn_gradient_is_the_finite_difference():
  p = problem()
  _, gradient = ours(p, jnp.asarray(p["phi"]))
  h = 1e-6
  for index in np.ndindex(p["phi"].shape):
    step = np.zeros_like(p["phi"])
    step[index] = h
    difference = (ours(p, p["phi"] + step)[0] - ours(p, p["phi"] - step)[0]) / (
      2 * h
    )
    # Truncation h² and cancellation 1e-16/h.
    np.testing.assert_allclose(gradient[index], difference, rtol=1e-6, atol=1e-9)


def test_pull_form_is_the_textbook_form():
  """jax.grad of the weighted loss inside, as Eqs. 7 and 8 are written."""
  p = problem()

  def objective(phi):
    losses_fn = least_squares(p["x"], p["y"])

    @jax.jit
    def inner_step(theta, phi):
      def train_loss(theta):
        losses = losses_fn(theta)
        u = jnp.tanh(jax.lax.stop_gradient(losses) @ phi)
        weights = weighting.sample_weights(u, EPSILON, "exits")
        return (weights * losses).mean(0).sum()

      gradient = jax.grad(train_loss)(theta)
      return theta - ALPHA * (gradient + MOMENTUM * p["buffer"] + DECAY * theta)

    losses = least_squares(p["meta_x"], p["meta_y"])(inner_step(p["theta"], phi))
    return sum(
      losses[p["exit_of_sample"] == k, k].mean()
      for k in range(3)
      if (p["exit_of_sample"] == k).any()
    )

  _, gradient = ours(p, jnp.asarray(p["phi"]))
  np.testing.assert_allclose(
    gradient, jax.grad(objective)(jnp.asarray(p["phi"])), rtol=1e-12
  )


def test_two_unrolled_steps_by_hand():
  """Momentum goes from step to step, and Φ also moves the losses of the second.

  ℓ(θ) = θ²/2 in both parts, and w(φ, ℓ) = φ ℓ, attached. With α = 0.1 and
  momentum 0.5 on a buffer of 2, at θ = 2:

    θ_1 = 2 - 0.1 b_1,      b_1 = 0.5·2 + φ·2·2 = 1 + 4 φ
    θ_2 = θ_1 - 0.1 b_2,    b_2 = 0.5 b_1 + φ θ_1³/2

  At φ = 1, b_1 = 5, θ_1 = 1.5, b_2 = 2.5 + 1.6875 = 4.1875, θ_2 = 1.08125. By φ,
  b_1' = 4, θ_1' = -0.4, b_2' = 2 + 1.6875 + 1.5·1.5²·(-0.4) = 2.3375 and
  θ_2' = -0.4 - 0.23375 = -0.63375, which is the gradient of L_meta = θ_2.
  """
  start, parts = (jnp.array(2.0), jnp.array(2.0)), [0.0, 0.0]

  def inner_step(phi, before, part):
    theta, buffer = before
    loss = 0.5 * jnp.square(theta - part)
    buffer = 0.5 * buffer + phi * loss * (theta - part)
    return theta - 0.1 * buffer, buffer

  def look_ahead(phi):
    return meta.unrolled_update(functools.partial(inner_step, phi), start, parts)

  (meta_loss, _), gradient = meta.wpn_gradient(
    jnp.ones(()), look_ahead, lambda theta: (theta, None)
  )
  np.testing.assert_allclose(meta_loss, 1.08125, rtol=1e-14)
  np.testing.assert_allclose(gradient, -0.63375, rtol=1e-14)


def test_one_unrolled_step_is_the_pseudo_update():
  p = problem()
  phi, exits = jnp.asarray(p["phi"]), len(p["theta"])

  def inner_step(phi, before, part):
    theta, buffer = before
    losses, pull = jax.vjp(least_squares(*part), theta)
    weights = weighting.sample_weights(jnp.tanh(losses @ phi), EPSILON, "exits")
    buffer = MOMENTUM * buffer + meta.backbone_gradient(pull, weights)
    return theta - ALPHA * (buffer + DECAY * theta), buffer

  def look_ahead(phi):
    return meta.unrolled_update(
      functools.partial(inner_step, phi),
      (jnp.asarray(p["theta"]), jnp.asarray(p["buffer"])),
      [(jnp.asarray(p["x"]), jnp.asarray(p["y"]))],
    )

  def meta_loss_fn(pseudo):
    losses = least_squares(p["meta_x"], p["meta_y"])(pseudo)
    own = [losses[p["exit_of_sample"] == k, k] for k in range(exits)]
    return sum(x.mean() for x in own if len(x)), None

  _, gradient = meta.wpn_gradient(phi, look_ahead, meta_loss_fn)
  np.testing.assert_allclose(gradient, ours(p, phi)[1], rtol=1e-12)
