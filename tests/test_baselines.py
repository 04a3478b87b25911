"""The methods that learn no weights, against NumPy and their own definitions."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import enable_x64
from test_train_step import (
  DIM,
  LR,
  STEPS_PER_EPOCH,
  as_state,
  check_against_oracle,
  initial_values,
  make_batch,
  make_config,
)
from toy import LinearExits

import l2w_jax
from l2w_jax.method import baselines, losses, weighting
from l2w_jax.models import equilibrium
from l2w_jax.models.layers import Mode
from l2w_jax.training import loop as train
from l2w_jax.training import step as train_step

SHARE, TEMPERATURE = 0.3, 2.0
FACTORS = np.array([1 / 3, 1 / 2, 1])


def test_easy_early_weights_by_hand():
  # Mean losses 2, 1, 3: ease 0, 1, -1; earliness 1, 0, -1 over three exits.
  values = jnp.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [5.0, 2.0, 2.0]])
  output = baselines.easy_early_output(values)
  np.testing.assert_array_equal(output, [[0, 0, 0], [1, 0, -1], [-1, 0, 1]])
  weights = weighting.sample_weights(output, 0.5, "exits")
  np.testing.assert_array_equal(weights[1], [1.5, 1, 0.5])
  gradient = jax.grad(lambda x: baselines.easy_early_output(x).sum())(values)
  np.testing.assert_array_equal(gradient, 0)


def distilled(logits, labels):
  """(loss, its gradient in the logits), one sample and exit at a time."""
  total, gradient = np.zeros(logits.shape[:2]), np.zeros_like(logits)
  last = logits.shape[1] - 1
  for i, k in np.ndindex(total.shape):
    p = oracles.softmax(logits[i, k])
    hard = p - np.eye(len(p))[labels[i]]
    total[i, k], gradient[i, k] = -np.log(p[labels[i]]), hard
    if k < last:
      soft = oracles.softmax(logits[i, k] / TEMPERATURE)
      teacher = oracles.softmax(logits[i, last] / TEMPERATURE)
      divergence = sum(
        t * np.log(t / s) for t, s in zip(teacher, soft, strict=True)
      )
      total[i, k] = (1 - SHARE) * total[i, k] + SHARE * TEMPERATURE**2 * divergence
      gradient[i, k] = (1 - SHARE) * hard + SHARE * TEMPERATURE * (soft - teacher)
  return total, gradient


def test_self_distillation_is_the_oracle():
  rng = np.random.default_rng(0)
  logits, labels = 3 * rng.normal(size=(5, 3, 4)), rng.integers(0, 4, 5)
  expected, gradient = distilled(logits, labels)

  def loss(x):
    return baselines.self_distillation(
      x, jnp.asarray(labels), 0.0, SHARE, TEMPERATURE
    )

  with enable_x64(True):
    np.testing.assert_allclose(loss(jnp.asarray(logits)), expected, rtol=1e-10)
    np.testing.assert_allclose(
      jax.grad(lambda x: loss(x).sum())(jnp.asarray(logits)),
      gradient,
      rtol=1e-9,
      atol=1e-12,
    )


def expected_weights(method, losses_, metrics):
  """[B K] of one half; random ones are as drawn."""
  if method == "fixed":
    return np.tile([0.5, 1.0, 1.5], (len(losses_), 1))
  if method == "random":
    return metrics
  if method == "easy_early":
    order = np.argsort(losses_.mean(1))
    weights = np.ones_like(losses_)
    for place, i in enumerate(order):
      ease = 1 - 2 * place / (len(order) - 1)
      weights[i] += 0.6 * ease * np.array([1, 0, -1])
    return weights
  return np.ones_like(losses_)


@pytest.mark.parametrize(
  "method", ["uniform", "fixed", "random", "easy_early", "distill", "equilibrium"]
)
def test_two_half_steps_are_the_oracle(method, monkeypatch):
  # The network of these tests has no stages to count.
  monkeypatch.setattr(LinearExits, "module", None, raising=False)
  monkeypatch.setattr(LinearExits, "image_shape", (1, 1, DIM), raising=False)
  monkeypatch.setattr(
    equilibrium, "factors", lambda *_: {"weight": FACTORS[:, None, None]}
  )
  config = make_config(method=method)
  config.baseline.update(
    exit_weights=(0.5, 1.0, 1.5), distill=SHARE, temperature=TEMPERATURE
  )
  values, batch = initial_values(config), make_batch(12, 0)
  with enable_x64(True):
    step = train_step.make_train_step(
      LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
    )
    state, metrics = step(
      as_state(values, config), jax.tree.map(jnp.asarray, batch)
    )
  weight, momentum = values["weight"], values["momentum"]
  images = batch["image"].reshape(2, 6, DIM)
  for h, labels in enumerate(batch["label"].reshape(2, 6)):
    losses_, _, dlogits, logits = oracles.linear_losses(weight, images[h], labels)
    if method == "distill":
      losses_, dlogits = distilled(logits, labels)
    weights = expected_weights(method, losses_, np.asarray(metrics["weights"][h]))
    np.testing.assert_allclose(metrics["weights"][h], weights, rtol=1e-10)
    np.testing.assert_allclose(metrics["losses"][h], losses_, rtol=1e-10)
    np.testing.assert_allclose(
      metrics["train_loss"][h], (weights * losses_).mean(0).sum(), rtol=1e-10
    )
    gradient = np.einsum("bk,bkc,bd->kdc", weights, dlogits, images[h]) / len(
      labels
    )
    if method == "equilibrium":
      gradient *= FACTORS[:, None, None]
    momentum = 0.9 * momentum + gradient + 0.01 * weight
    weight = weight - LR * momentum
  np.testing.assert_allclose(state.params["weight"], weight, rtol=1e-9)


def test_a_rule_of_ones_own_sees_the_labels_it_asks_for(monkeypatch):
  rules = types.ModuleType("rules")
  rules.blind = lambda losses, average, gamma=2.0: losses**gamma
  rules.seeing = lambda losses, average, gamma=2.0, labels=None: (
    losses * labels[:, None]
  )
  monkeypatch.setitem(sys.modules, "rules", rules)
  batch = make_batch(13, 0)  # halves of 7 and 6, each with labels of its own
  halves = batch["label"][:7], batch["label"][7:]
  for name in ("blind", "seeing"):
    config = make_config(method=f"rules.{name}")
    with enable_x64(True):
      step = train_step.make_train_step(
        LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
      )
      state = as_state(initial_values(config), config)
      _, metrics = step(state, jax.tree.map(jnp.asarray, batch))
    for losses_, weights, labels in zip(
      map(np.asarray, metrics["losses"]), metrics["weights"], halves, strict=True
    ):
      expected = losses_**2 if name == "blind" else losses_ * labels[:, None]
      np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_random_weights_are_drawn_anew_each_step_and_by_the_seed():
  drawn = {}
  for seed in (0, 1):
    config = make_config(method="random")
    config.seed = seed
    step = train_step.make_train_step(
      LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
    )
    state = as_state(
      oracles.tree_map(lambda x: np.asarray(x, np.float32), initial_values(config)),
      config,
    )
    for t in range(2):
      batch = jax.tree.map(jnp.asarray, make_batch(40, t))
      state, metrics = step(state, batch)
      drawn[seed, t] = np.asarray(metrics["weights"])
  for weights in drawn.values():
    np.testing.assert_allclose(weights.mean(-1), 1, rtol=1e-6)
    assert (abs(weights - 1) < 0.6 * 2).all() and weights.std() > 0.2
    # Blind to exit and half: what a mean over 80 draws can show.
    np.testing.assert_allclose(weights.mean((0, 1)), 1, atol=0.15)
  a, b, c = drawn[0, 0], drawn[0, 1], drawn[1, 0]
  assert not np.allclose(a, b) and not np.allclose(a, c)


def test_the_plain_objective_scores_every_meta_sample_at_every_exit():
  config = make_config(objective="plain")
  with enable_x64(True):
    step = train_step.make_train_step(
      LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
    )
    _, metrics = step(
      as_state(initial_values(config), config),
      jax.tree.map(jnp.asarray, make_batch(12, 0)),
    )
  assert np.asarray(metrics["allocated"]).all()
  # The oracle's own meta loss allocates, so the step must leave it.
  with pytest.raises(AssertionError):
    check_against_oracle(config)


@jax.custom_vjp
def rescale(x, factor):
  return x


rescale.defvjp(
  lambda x, factor: (x, factor),
  lambda factor, g: (jax.tree.map(lambda g: g * factor, g), None),
)


def test_equilibrium_is_what_the_scalings_at_the_branches_give():
  config = l2w_jax.load_config(
    "configs/digits.py",
    {
      "model.num_exits": 3,
      "model.channels": 4,
      "model.growth": 4,
      "model.classifier_width": 8,
    },
  )
  backbone = l2w_jax.build_backbone(config.model, 10, (8, 8, 1))
  variables = backbone.init(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  labels = jnp.arange(4)

  def forward(module, images, scaled):
    carry, logits = images, []
    for k in range(3):
      carry, logits_k = module.stage(k, carry, Mode(True))
      if scaled:  # k counts from 0: K - k exits see what stage k gives
        carry = rescale(carry, (2 - k) / (3 - k))
        logits_k = rescale(logits_k, 1 / (3 - k))
      logits.append(logits_k)
    return jnp.stack(logits, 1)

  def loss(params, scaled):
    logits, _ = backbone.module.apply(
      {**variables, "params": params},
      images,
      scaled,
      method=forward,
      mutable=["batch_stats"],
    )
    return losses.cross_entropy(logits, labels).sum()

  plain, scaled = jax.jit(
    lambda params: [jax.grad(loss)(params, scaled) for scaled in (False, True)]
  )(variables["params"])
  factors = equilibrium.factors(backbone)
  ours = jax.tree.map(jnp.multiply, plain, factors)
  for name in plain:
    # The scaling of logits also reaches the classifier; the method's does not.
    expected = plain if name.startswith("classifier") else scaled
    for a, b in zip(
      jax.tree.leaves(ours[name]), jax.tree.leaves(expected[name]), strict=True
    ):
      # Float32 sums over a few hundred terms.
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  found = {name: set(jax.tree.leaves(tree)) for name, tree in factors.items()}
  for name, values in found.items():
    assert values == {
      1.0 if name.startswith("classifier") else 1 / (3 - int(name.split("_")[1]))
    }


def test_exit_weights_must_fit_the_network(tiny_config, tmp_path):
  tiny_config.method = "fixed"
  with pytest.raises(ValueError, match="each of the 2 exits; got ()"):
    train.train(tmp_path / "run", tiny_config)
  assert not (tmp_path / "run").exists()
