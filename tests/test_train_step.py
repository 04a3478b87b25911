"""The step against a NumPy oracle with every derivative written by hand.

The oracle knows nothing of automatic differentiation, and bugs planted in the
place of the functions of a step make the comparison fail.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from conftest import enable_x64
from toy import LinearExits

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.method import allocation, baselines, estimators, meta, weighting
from l2w_jax.run.parallel import ONE_DEVICE
from l2w_jax.training import microbatches
from l2w_jax.training import step as step_lib
from l2w_jax.training.state import (
  TrainState,
  adam,
  apply_updates,
  init_state,
  sgd,
  split_seed,
)

DIM, HIDDEN, LR, WPN_LR = 5, 6, 0.4, 0.05
STEPS_PER_EPOCH, EPOCHS = 3, 2
DIFFERENT = "Not equal to tolerance|Arrays are not equal"


def make_config(**overrides):
  config = config_lib.defaults("msdnet")
  config.epochs = EPOCHS
  config.optimizer.update(learning_rate=LR, momentum=0.9, weight_decay=0.01)
  config.meta.update(
    learning_rate=WPN_LR, weight_decay=0.02, hidden=HIDDEN, epsilon=0.6
  )
  for key, value in overrides.items():
    setattr(config.meta if key in config.meta else config, key, value)
  return config_lib.validate(config)


def initial_values(config, seed=0):
  rng = np.random.default_rng(seed)
  k, c = LinearExits.num_exits, LinearExits.num_classes
  width = 2 * k if config.meta.inputs == "both" else k
  wpn = {
    "hidden_0": {
      "kernel": rng.normal(size=(width, HIDDEN)),
      "bias": rng.normal(size=HIDDEN),
    },
    "output": {"kernel": rng.normal(size=(HIDDEN, k)), "bias": rng.normal(size=k)},
  }
  zeros = oracles.tree_map(np.zeros_like, wpn)
  return {
    "weight": 0.3 * rng.normal(size=(k, DIM, c)),
    "momentum": 0.1 * rng.normal(size=(k, DIM, c)),
    "mean": rng.normal(size=(k, c)),
    "wpn": wpn,
    "m": zeros,
    "v": zeros,
    "t": 0,
  }


def as_state(values, config):
  params = {"weight": jnp.asarray(values["weight"])}
  opt_state = sgd(config.optimizer).init(params)
  trace = optax.TraceState({"weight": jnp.asarray(values["momentum"])})
  wpn = jax.tree.map(jnp.asarray, values["wpn"])
  l2w = config.method == "l2w"
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={"mean": jnp.asarray(values["mean"])},
    opt_state=(opt_state[0], trace),
    wpn_params=wpn if l2w else {},
    wpn_opt_state=adam(config.meta).init(wpn) if l2w else (),
  )


def make_batch(size, seed):
  rng = np.random.default_rng(100 + seed)
  return {
    "image": rng.normal(size=(size, 1, 1, DIM)),
    "label": rng.integers(0, LinearExits.num_classes, size),
  }


def oracle_run(config, batches):
  """States and reports of the oracle after every half step."""
  values, reports = initial_values(config), []
  total = EPOCHS * STEPS_PER_EPOCH
  for t, batch in enumerate(batches):
    cosine = 0.5 * (1 + np.cos(np.pi * t / total))
    x = batch["image"].reshape(-1, DIM)
    cut = (len(x) + 1) // 2
    halves = [(x[:cut], batch["label"][:cut]), (x[cut:], batch["label"][cut:])]
    for train_half, meta_half in (halves, halves[::-1]):
      shares = oracles.proportions(Fraction(config.meta.q), LinearExits.num_exits)
      values, report = oracles.l2w_half_step(
        values,
        train_half,
        meta_half,
        LR * cosine,
        WPN_LR * cosine,
        {
          "momentum": 0.9,
          "weight_decay": 0.01,
          "wpn_weight_decay": 0.02,
          "epsilon": config.meta.epsilon,
          "center_over": config.meta.center_over,
          "inputs": config.meta.inputs,
          "counts": [int(len(meta_half[0]) * p) for p in shares],
        },
      )
      reports.append(report)
  return values, reports


def make_step(config, backbone=None):
  return step_lib.make_train_step(
    backbone or LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
  )


def assert_close(ours, oracle):
  # Float64 sums of a few dozen terms in another order.
  np.testing.assert_allclose(ours, oracle, rtol=1e-10, atol=1e-13)


def check_against_oracle(config, size=12):
  batches = [make_batch(size, seed) for seed in range(2)]
  values, reports = oracle_run(config, batches)
  with enable_x64(True):
    step = make_step(config)
    state = as_state(initial_values(config), config)
    for t, batch in enumerate(batches):
      state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
      for h in range(2):
        report = reports[2 * t + h]
        for name in ("weights", "losses", "meta_loss"):
          assert_close(metrics[name][h], report[name])
        np.testing.assert_array_equal(
          np.argmax(metrics["allocated"][h], axis=1), report["exit_of_sample"]
        )
        jax.tree.map(
          assert_close,
          jax.tree.map(lambda x, h=h: x[h], metrics["wpn_gradient"]),
          report["wpn_gradient"],
        )
    assert state.step == 2
    assert_close(state.params["weight"], values["weight"])
    assert_close(state.opt_state[1].trace["weight"], values["momentum"])
    assert_close(state.batch_stats["mean"], values["mean"])
    jax.tree.map(assert_close, state.wpn_params, values["wpn"])
    jax.tree.map(assert_close, state.wpn_opt_state[1].mu, values["m"])
    jax.tree.map(assert_close, state.wpn_opt_state[1].nu, values["v"])


@pytest.mark.parametrize("inputs", ["loss", "confidence", "both"])
@pytest.mark.parametrize("center_over", ["exits", "batch", "all"])
def test_step_is_the_oracle(inputs, center_over):
  check_against_oracle(make_config(inputs=inputs, center_over=center_over))


def test_jvp_is_the_oracle():
  check_against_oracle(make_config(center_over="batch", estimator="jvp"))


def test_rematerialisation_is_the_oracle():
  config = make_config(center_over="batch")
  config.model.remat = True
  check_against_oracle(config)


def test_one_unrolled_step_is_the_oracle():
  check_against_oracle(make_config(center_over="batch", estimator="unroll:1"))


def unrolled_meta_loss(config, values, mlp_params, batch, num_steps):
  """L_meta after steps on every T-th sample of half 1, forwards in NumPy."""
  x, labels = batch["image"].reshape(-1, DIM), batch["label"]
  half, weight, buffer = len(x) // 2, values["weight"], values["momentum"]
  for t in range(num_steps):
    part = slice(t, half, num_steps)
    losses, confidence, dlogits, _ = oracles.linear_losses(
      weight, x[part], labels[part]
    )
    features = {"loss": losses, "confidence": confidence}[config.meta.inputs]
    weights = 1 + config.meta.epsilon * oracles.centred(
      oracles.Mlp(mlp_params).forward(features), config.meta.center_over
    )
    gradient = np.einsum("bk,bd,bkc->kdc", weights, x[part], dlogits) / len(losses)
    buffer = 0.9 * buffer + gradient + 0.01 * weight
    weight = weight - LR * buffer
  losses, confidence, _, _ = oracles.linear_losses(weight, x[half:], labels[half:])
  shares = oracles.proportions(Fraction(config.meta.q), LinearExits.num_exits)
  return oracles.meta_loss(
    losses, oracles.allocate(confidence, [int(half * p) for p in shares])
  )


def check_unrolled(config, num_steps):
  """The gradient along random directions, against central differences."""
  batch, values = make_batch(12, 0), initial_values(config)
  with enable_x64(True):
    step = make_step(config)
    _, metrics = step(as_state(values, config), jax.tree.map(jnp.asarray, batch))
  gradient = jax.tree.map(lambda x: np.asarray(x[0]), metrics["wpn_gradient"])
  rng, h = np.random.default_rng(1), 1e-6

  def loss_at(h, direction):
    moved = oracles.tree_map(lambda p, d: p + h * d, values["wpn"], direction)
    return unrolled_meta_loss(config, values, moved, batch, num_steps)

  np.testing.assert_allclose(
    metrics["meta_loss"][0], loss_at(0, values["wpn"]), rtol=1e-12
  )
  for _ in range(5):
    direction = oracles.tree_map(lambda p: rng.normal(size=p.shape), values["wpn"])
    slope = sum(
      jax.tree.leaves(
        oracles.tree_map(lambda g, d: (g * d).sum(), gradient, direction)
      )
    )
    # Truncation h² and cancellation 1e-16/h.
    np.testing.assert_allclose(
      slope,
      (loss_at(h, direction) - loss_at(-h, direction)) / (2 * h),
      rtol=1e-6,
      atol=1e-8,
    )


@pytest.mark.parametrize(
  "num_steps, inputs, center_over",
  [(2, "loss", "exits"), (3, "confidence", "batch")],
)
def test_unrolled_steps_are_differentiated_whole(num_steps, inputs, center_over):
  check_unrolled(
    make_config(
      inputs=inputs, center_over=center_over, estimator=f"unroll:{num_steps}"
    ),
    num_steps,
  )


def detached_features(patch):
  right = weighting.attached_features
  patch.setattr(
    weighting,
    "attached_features",
    lambda *args: jax.lax.stop_gradient(right(*args)),
  )


def dropped_momentum(patch):
  right = step_lib.inner_step

  def inner_step(config, devices, optimizer, *rest):
    def update(gradient, opt_state, params):
      return optimizer.update(gradient, opt_state, params)[0], opt_state

    forgetful = optax.GradientTransformation(optimizer.init, update)
    return right(config, devices, forgetful, *rest)

  patch.setattr(step_lib, "inner_step", inner_step)


def parts_in_order(patch):
  patch.setattr(
    microbatches,
    "cut",
    lambda half, num_parts: jax.tree.map(
      lambda x: x.reshape(num_parts, -1, *x.shape[1:]), half
    ),
  )


UNROLL_BUGS = {
  "features detached": detached_features,
  "momentum not carried": dropped_momentum,
  "parts in order": parts_in_order,
}


@pytest.mark.parametrize("bug", UNROLL_BUGS)
def test_planted_bug_of_the_unrolled_steps_is_seen(bug, monkeypatch):
  UNROLL_BUGS[bug](monkeypatch)
  with pytest.raises(AssertionError, match=DIFFERENT):
    check_unrolled(make_config(estimator="unroll:2"), 2)


def test_parts_that_do_not_divide_a_half_are_refused():
  config = make_config(estimator="unroll:4")
  with pytest.raises(ValueError, match="6 samples per device.*4 equal parts"):
    check_unrolled(config, 4)


def test_odd_batch_splits_into_ceil_and_rest():
  check_against_oracle(make_config(), size=11)


def real_step_by_grad(patch):
  """No bug yet: Eq. 9 as `jax.grad` of the weighted loss, weights and all."""
  losses_fns, losses_fn, right = [], microbatches.losses_fn, step_lib.real_step

  def recorded(*args):
    losses_fns.append(losses_fn(*args))
    return losses_fns[-1]

  def real_step(optimizer, state, gradient, batch_stats, rate):
    def weighted(params):
      losses, (_, confidence) = losses_fns[0](params)  # that of the train half
      features = weighting.features(losses, confidence, CONFIG.meta.inputs)
      weights = step_lib.weights_of(CONFIG, ONE_DEVICE, state.wpn_params, features)
      return (weights * losses).mean(0).sum()

    gradient = jax.grad(weighted)(state.params)
    losses_fns.clear()
    return right(optimizer, state, gradient, batch_stats, rate)

  patch.setattr(microbatches, "losses_fn", recorded)
  patch.setattr(step_lib, "real_step", real_step)


def attached_input(patch):
  real_step_by_grad(patch)
  patch.setattr(weighting, "features", weighting.attached_features)


def averaged_over_exits(patch):
  patch.setattr(
    meta, "backbone_gradient", lambda pull, weights: pull(weights / weights.size)[0]
  )


def wrong_direction(patch):
  right = meta.pseudo_update
  patch.setattr(
    meta, "pseudo_update", lambda pull, weights, step: right(pull, -weights, step)
  )


def without_momentum(patch):
  right = step_lib.inner_sgd_step

  def inner_sgd_step(optimizer, state, *rest):
    zeros = jax.tree.map(jnp.zeros_like, state.opt_state)
    return right(optimizer, state.replace(opt_state=zeros), *rest)

  patch.setattr(step_lib, "inner_sgd_step", inner_sgd_step)


def without_weight_decay(patch):
  def inner_sgd_step(optimizer, state, gradient, rate):
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.update(gradient, state.opt_state, zeros)
    return apply_updates(state.params, updates, rate)

  patch.setattr(step_lib, "inner_sgd_step", inner_sgd_step)


def leaking_statistics(patch):
  losses_fns, leaked, losses_fn = [], [], microbatches.losses_fn
  right_gradient, right_step = meta.wpn_gradient, step_lib.real_step

  def recorded(*args):
    losses_fns.append(losses_fn(*args))
    return losses_fns[-1]

  def wpn_gradient(wpn_params, look_ahead, meta_loss_fn):
    found = right_gradient(wpn_params, look_ahead, meta_loss_fn)
    _, (batch_stats, _) = losses_fns[-1](look_ahead(wpn_params))
    leaked.append(batch_stats)
    return found

  def real_step(optimizer, state, gradient, batch_stats, rate):
    return right_step(optimizer, state, gradient, leaked.pop(), rate)

  patch.setattr(microbatches, "losses_fn", recorded)
  patch.setattr(meta, "wpn_gradient", wpn_gradient)
  patch.setattr(step_lib, "real_step", real_step)


def old_wpn(patch):
  old, right_step, right = [], step_lib.wpn_step, step_lib.weights_of

  def wpn_step(config, state, *rest):
    old.append(state.wpn_params)
    return right_step(config, state, *rest)

  def weights_of(config, devices, wpn_params, features):
    return right(config, devices, old.pop() if old else wpn_params, features)

  patch.setattr(step_lib, "wpn_step", wpn_step)
  patch.setattr(step_lib, "weights_of", weights_of)


def reused_samples(patch):
  def allocate(confidence, proportions):
    due = allocation.counts_per_exit(len(confidence), proportions)
    due = due.at[-1].set(len(confidence))
    return jnp.argsort(jnp.argsort(-confidence, axis=0), axis=0) < due

  patch.setattr(allocation, "_allocate", allocate)


def meta_loss_averaged(patch):
  right = allocation.meta_loss
  patch.setattr(
    allocation,
    "meta_loss",
    lambda losses, *rest: right(losses, *rest) / losses.shape[1],
  )


def moving_rate(patch):
  right = step_lib.wpn_step

  def wpn_step(*args):
    state = right(*args)
    return state.replace(step=state.step + 1)

  patch.setattr(step_lib, "wpn_step", wpn_step)


def undecayed_wpn(patch):
  patch.setattr(
    step_lib,
    "adam",
    lambda config: optax.chain(
      optax.add_decayed_weights(0.0), optax.scale_by_adam()
    ),
  )


BUGS = {
  "WPN input not detached": attached_input,
  "losses averaged over exits": averaged_over_exits,
  "pseudo step in the wrong direction": wrong_direction,
  "pseudo step without momentum": without_momentum,
  "pseudo step without weight decay": without_weight_decay,
  "statistics leak from the pseudo pass": leaking_statistics,
  "real step with the old WPN": old_wpn,
  "allocation that reuses samples": reused_samples,
  "meta loss averaged over exits": meta_loss_averaged,
  "learning rate moves between the halves": moving_rate,
  "WPN without weight decay": undecayed_wpn,
}
CONFIG = make_config(inputs="both")


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, monkeypatch):
  BUGS[bug](monkeypatch)
  with pytest.raises(AssertionError, match=DIFFERENT):
    check_against_oracle(CONFIG)


def test_the_real_step_is_a_gradient_of_the_weighted_loss(monkeypatch):
  real_step_by_grad(monkeypatch)
  check_against_oracle(CONFIG)


def slopes_averaged(patch):
  right = estimators.jvp
  patch.setitem(
    estimators.SLOPES, "jvp", lambda *args: right(*args) / LinearExits.num_exits
  )


def slopes_along_v(patch):
  right = estimators.jvp
  patch.setitem(
    estimators.SLOPES,
    "jvp",
    lambda losses_fn, params, direction: right(
      losses_fn, params, jax.tree.map(jnp.negative, direction)
    ),
  )


def slopes_ahead(patch):
  ahead, right, right_jvp = [], estimators.wpn_gradient, estimators.jvp

  def wpn_gradient(wpn_params, pull, weights_fn, sgd_step, *rest):
    ahead.append(meta.pseudo_update(pull, weights_fn(wpn_params), sgd_step))
    return right(wpn_params, pull, weights_fn, sgd_step, *rest)

  patch.setattr(estimators, "wpn_gradient", wpn_gradient)
  patch.setitem(
    estimators.SLOPES,
    "jvp",
    lambda losses_fn, params, direction: right_jvp(losses_fn, ahead[-1], direction),
  )


JVP_BUGS = {
  "slopes averaged over exits": slopes_averaged,
  "slopes along v": slopes_along_v,
  "slopes at the look-ahead": slopes_ahead,
}


@pytest.mark.parametrize("bug", JVP_BUGS)
def test_planted_bug_of_the_jvp_is_seen(bug, monkeypatch):
  JVP_BUGS[bug](monkeypatch)
  with pytest.raises(AssertionError, match=DIFFERENT):
    check_against_oracle(make_config(estimator="jvp"))


def test_interval_updates_the_wpn_on_the_first_step_of_each_cycle():
  config = make_config(interval=2)
  step = make_step(config)
  state, updated = float32_state(config), []
  for t in range(5):
    before = state
    state, metrics = step(state, float32_batch(8, t))
    changed = not np.array_equal(
      before.wpn_params["output"]["kernel"], state.wpn_params["output"]["kernel"]
    )
    of_update = {"meta_loss", "allocated", "wpn_gradient"}
    assert metrics.keys() & of_update == (of_update if changed else set())
    assert not np.array_equal(before.params["weight"], state.params["weight"])
    updated.append(changed)
  # Counted in an epoch of three steps, as the released loop does.
  assert updated == [True, False, True, True, False]


def float32_state(config):
  values = initial_values(config)
  return as_state(
    oracles.tree_map(lambda x: np.asarray(x, np.float32), values), config
  )


def float32_batch(size, seed):
  batch = make_batch(size, seed)
  return {
    "image": jnp.asarray(batch["image"], jnp.float32),
    "label": jnp.asarray(batch["label"]),
  }


def run_float32(config, backbone=None, steps=3):
  step, state = make_step(config, backbone), float32_state(config)
  for t in range(steps):
    state, metrics = step(state, float32_batch(12, t))
  return state, metrics


def test_uniform_weighs_everything_one_and_has_no_wpn():
  state, metrics = run_float32(make_config(method="uniform"))
  assert state.wpn_params == {}
  np.testing.assert_array_equal(metrics["weights"], 1)
  assert "meta_loss" not in metrics


def test_one_trace_serves_many_steps():
  class Counting(LinearExits):
    traces = 0

    def apply(self, *args, **kwargs):
      Counting.traces += 1
      return super().apply(*args, **kwargs)

  run_float32(make_config(), Counting(), steps=1)
  once = Counting.traces
  Counting.traces = 0
  run_float32(make_config(), Counting(), steps=4)
  assert Counting.traces == once


def lower_half_step(config, update_wpn=True):
  half_step = step_lib.make_half_step(
    LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
  )
  half = float32_batch(6, 0)
  return jax.jit(half_step, static_argnames="update_wpn").lower(
    float32_state(config), half, half, half_keys(config)[0], update_wpn=update_wpn
  )


def half_keys(config):
  return jax.random.key_data(split_seed(config.seed).halves)


def test_a_step_is_two_half_steps_bit_for_bit():
  config = make_config(center_over="all")
  state, metrics = run_float32(config, steps=1)
  half_step = jax.jit(
    step_lib.make_half_step(LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH)
  )
  batch = float32_batch(12, 0)
  halves = [
    jax.tree.map(lambda x, h=h: x[h], batch) for h in (slice(6), slice(6, 12))
  ]
  ours, found = float32_state(config), []
  for pair, key in zip((halves, halves[::-1]), half_keys(config), strict=True):
    ours, of_half = half_step(ours, *pair, key)
    found.append(of_half)
  assert ours.step == 0 and state.step == 1
  jax.tree.map(np.testing.assert_array_equal, ours.replace(step=state.step), state)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.map(lambda *halves: np.stack(halves), *found),
    metrics,
  )


def test_an_interval_is_two_programs_without_a_choice():
  config = make_config(interval=2)
  texts = {
    update: lower_half_step(config, update).as_text() for update in (True, False)
  }
  for text in texts.values():
    assert "stablehlo.case" not in text and "stablehlo.if" not in text
  # Exits choose their samples one after another; nothing else is a loop.
  assert texts[True].count("stablehlo.while") == 1
  assert texts[False].count("stablehlo.while") == 0

  class Counting(LinearExits):
    passes = 0

    def apply(self, *args, **kwargs):
      Counting.passes += 1
      return super().apply(*args, **kwargs)

  run_float32(config, Counting(), steps=5)
  assert Counting.passes == 2 + 1  # with and without the meta half


def test_the_halves_of_a_step_draw_different_weights():
  config = make_config(method="random")
  _, metrics = run_float32(config, steps=1)
  first, second = metrics["weights"]
  assert np.abs(first - second).min() > 0
  config.seed = 1
  _, other = run_float32(config, steps=1)
  assert np.abs(metrics["weights"] - other["weights"]).min() > 0


def test_the_seed_is_no_constant_of_the_program():
  config = make_config(method="random")
  text = lower_half_step(config).as_text()
  config.seed = 1
  assert lower_half_step(config).as_text() == text


def test_random_weights_have_keys_of_their_own(monkeypatch):
  drawn, initial = [], []

  class Recording(LinearExits):
    def init(self, key):
      initial.append(key)
      return {"params": {}, "batch_stats": {}}

  def random_output(key, shape, dtype):
    drawn.append(key)
    return jnp.zeros(shape, dtype)

  config, keys = make_config(method="random"), split_seed(0)
  init_state(keys.init, Recording(), config)
  monkeypatch.setattr(baselines, "random_output", random_output)
  with jax.disable_jit():
    run_float32(config, steps=3)
  assert len(drawn) == 6
  others = [*initial, keys.init, keys.data]
  # And what a network or a feed derives from its own.
  others += [key for root in others for key in jax.random.split(root, 9)]

  def values(keys):
    return {jax.random.key_data(key).tobytes() for key in keys}

  assert len(values(drawn)) == 6
  assert not values(drawn) & values(others)


def test_labels_smoothed_in_training_only():
  config = make_config()
  config.label_smoothing = 0.2
  plain = make_config()
  batch = make_batch(12, 0)
  with enable_x64(True):

    def run(c):
      state = as_state(initial_values(c), c)
      return make_step(c)(state, jax.tree.map(jnp.asarray, batch))[1]

    smooth, sharp = run(config), run(plain)
    weight = initial_values(plain)["weight"]
    logits = np.einsum("bd,kdc->bkc", batch["image"].reshape(12, DIM), weight)
    log_p = np.log(oracles.softmax(logits))
    target = 0.8 * np.eye(4)[batch["label"]] + 0.2 / 4
    expected = -(target[:, None] * log_p).sum(-1)
    np.testing.assert_allclose(smooth["losses"][0], expected[:6], rtol=1e-10)
    assert not np.allclose(smooth["losses"], sharp["losses"])


def test_epsilon_zero_is_uniform_bit_for_bit():
  config = {method: config_lib.defaults("msdnet") for method in ("l2w", "uniform")}
  states = {}
  for method, c in config.items():
    c.method = method
    c.meta.epsilon = 0.0
    c.epochs = 2
    c.model.update(
      num_exits=2,
      channels=4,
      growth=4,
      growth_factors=(1, 2),
      bottleneck_factors=(1, 2),
      classifier_width=8,
    )
    backbone = l2w_jax.build_backbone(c.model, 3, (8, 8, 1))
    state = l2w_jax.init_state(jax.random.key(0), backbone, c)
    step = l2w_jax.make_train_step(backbone, c, steps_per_epoch=3)
    rng = np.random.default_rng(0)
    for _ in range(3):
      state, _ = step(
        state,
        {
          "image": jnp.asarray(rng.normal(size=(12, 8, 8, 1)), jnp.float32),
          "label": jnp.asarray(rng.integers(0, 3, 12)),
        },
      )
    states[method] = state
  for name in ("params", "batch_stats", "opt_state"):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(states["l2w"], name),
      getattr(states["uniform"], name),
    )
