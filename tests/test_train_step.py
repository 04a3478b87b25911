"""The step against a NumPy oracle with every derivative written by hand.

The oracle knows nothing of automatic differentiation, and bugs planted in the
source of the step make the comparison fail.
"""

import importlib
import pathlib
import sys
import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from toy import LinearExits

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.training import step as train_step
from l2w_jax.training.state import TrainState, adam, sgd

DIM, HIDDEN, LR, WPN_LR = 5, 6, 0.4, 0.05
STEPS_PER_EPOCH, EPOCHS = 3, 2


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


def assert_close(ours, oracle):
  # Float64 sums of a few dozen terms in another order.
  np.testing.assert_allclose(ours, oracle, rtol=1e-10, atol=1e-13)


def check_against_oracle(config, size=12, make=train_step.make_train_step):
  batches = [make_batch(size, seed) for seed in range(2)]
  values, reports = oracle_run(config, batches)
  with jax.enable_x64(True):
    step = make(LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH)
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


def test_waiting_compiles_to_as_much_as_there_is_to_wait_for():
  # And not to that much in every use, which made compiling ten times as long.
  def instructions(n):
    lowered = jax.jit(
      lambda tree, known: [
        jnp.tanh(x) @ x for x in train_step.after(tree, [2 * x for x in known])
      ]
    ).lower([jnp.ones((8, 8))] * n, [jnp.ones(4)] * n)
    return lowered.compile().as_text().count(" = ")

  assert instructions(40) < 2.5 * instructions(20)


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


def check_unrolled(config, num_steps, make=train_step.make_train_step):
  """The gradient along random directions, against central differences."""
  batch, values = make_batch(12, 0), initial_values(config)
  with jax.enable_x64(True):
    step = make(LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH)
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


UNROLL_BUGS = {
  "features detached": (
    "train_step",
    "weighting.attached_features(\n",
    "weighting.features(\n",
  ),
  "momentum not carried": (
    "train_step",
    "updates, opt_state = optimizer.update(gradient, opt_state, params)",
    "updates, _ = optimizer.update(gradient, opt_state, params)",
  ),
  "parts in order": (
    "microbatches",
    "size // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)",
    "num_parts, size // num_parts, *x.shape[1:])",
  ),
}


@pytest.mark.parametrize("bug", UNROLL_BUGS)
def test_planted_bug_of_the_unrolled_steps_is_seen(bug, monkeypatch):
  make = plant(monkeypatch, [UNROLL_BUGS[bug]])
  with pytest.raises(AssertionError, match="Not equal"):
    check_unrolled(make_config(estimator="unroll:2"), 2, make)


def test_parts_that_do_not_divide_a_half_are_refused():
  config = make_config(estimator="unroll:4")
  with pytest.raises(ValueError, match="6 samples per device.*4 equal parts"):
    check_unrolled(config, 4)


def test_odd_batch_splits_into_ceil_and_rest():
  check_against_oracle(make_config(), size=11)


# What is planted: file, right text, wrong text. Each right text is unique.
NAIVE = (
  "train_step",
  "gradient = devices.mean_of_all(meta.backbone_gradient(pull, weights))\n"
  "    state = _real_step(optimizer, state, gradient, devices.across("
  "batch_stats),\n                       learning_rate)\n"
  "    state = state.replace(wpn_params",
  """\
def weighted(params):
      losses, (_, confidence) = forward(params, train_half)
      f = weighting.features(losses, confidence, config.meta.inputs)
      return (weights_of(wpn_params, f) * losses).mean(0).sum()

    gradient = jax.grad(weighted)(state.params)
    state = _real_step(optimizer, state, gradient, batch_stats, learning_rate)
    state = state.replace(wpn_params""",
)
BUGS = {
  "WPN input not detached": [
    NAIVE,
    ("weighting", "jax.lax.stop_gradient(chosen)", "chosen"),
  ],
  "losses averaged over exits": [
    ("meta", "pull(weights / weights.shape[0])", "pull(weights / weights.size)")
  ],
  "pseudo step in the wrong direction": [
    (
      "meta",
      "return sgd_step(average(backbone_gradient(pull, weights)))",
      "return sgd_step(average(backbone_gradient(pull, -weights)))",
    )
  ],
  "pseudo step without momentum": [
    (
      "train_step",
      "updates, _ = optimizer.update(gradient, state.opt_state, "
      "state.params)\n  return",
      "updates, _ = optimizer.update(gradient, jax.tree.map("
      "jnp.zeros_like, state.opt_state), state.params)\n  return",
    )
  ],
  "pseudo step without weight decay": [
    (
      "train_step",
      "updates, _ = optimizer.update(gradient, state.opt_state, "
      "state.params)\n  return",
      "updates, _ = optimizer.update(gradient, state.opt_state, "
      "jax.tree.map(jnp.zeros_like, state.params))\n  return",
    )
  ],
  "statistics leak from the pseudo pass": [
    (
      "train_step",
      "meta_losses, (_, confidence)",
      "meta_losses, (leaked, confidence)",
    ),
    (
      "train_step",
      "return meta_loss, devices.own(allocated)",
      "return meta_loss, (devices.own(allocated), leaked)",
    ),
    (
      "train_step",
      "(meta_loss, allocated), gradient = wpn_gradient(",
      "(meta_loss, (allocated, leaked)), gradient = wpn_gradient(",
    ),
    (
      "train_step",
      '"wpn_gradient": gradient}\n\n',
      '"wpn_gradient": gradient, "leaked": leaked}\n\n',
    ),
    (
      "train_step",
      "state = state.replace(wpn_params=wpn_params,",
      'state = state.replace(batch_stats=metrics.pop("leaked"))\n'
      "    state = state.replace(wpn_params=wpn_params,",
    ),
  ],
  "real step with the old WPN": [
    (
      "train_step",
      "weights = weights_of(wpn_params, features)",
      "weights = weights_of(state.wpn_params, features)",
    )
  ],
  "allocation that reuses samples": [
    ("allocation", "return free & ~chosen, chosen", "return free, chosen")
  ],
  "meta loss averaged over exits": [
    ("allocation", ".astype(losses.dtype)).sum()", ".astype(losses.dtype)).mean()")
  ],
  "learning rate moves between the halves": [
    (
      "train_step",
      "state = state.replace(wpn_params=wpn_params,",
      "state = state.replace(step=state.step + 1, wpn_params=wpn_params,",
    )
  ],
  "WPN without weight decay": [
    (
      "train_state",
      "optax.add_decayed_weights(config.weight_decay), optax.scale_by_adam()",
      "optax.add_decayed_weights(0.0), optax.scale_by_adam()",
    )
  ],
}


def plant(monkeypatch, changes):
  """make_train_step of a copy of the package's source with changes in it."""
  order = [
    "weighting",
    "allocation",
    "meta",
    "microbatches",
    "train_state",
    "train_step",
  ]
  for name in order:
    original = importlib.import_module(f"l2w_jax.{name}")
    source = pathlib.Path(original.__file__).read_text(encoding="utf-8")
    for changed, right, wrong in changes:
      if changed == name:
        assert source.count(right) == 1, f"{name}: {right}"
        source = source.replace(right, wrong)
    copy = types.ModuleType(f"l2w_jax.{name}")
    copy.__file__ = original.__file__
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    monkeypatch.setattr(l2w_jax, name, copy)
    exec(compile(source, f"<planted {name}>", "exec"), copy.__dict__)
  return copy.make_train_step


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, monkeypatch):
  make = plant(monkeypatch, BUGS[bug])
  with pytest.raises(AssertionError, match="Not equal|not almost|Arrays are"):
    check_against_oracle(make_config(inputs="both"), make=make)


JVP_BUGS = {
  "slopes averaged over exits": (
    "slopes(direction) / weights.shape[0]",
    "slopes(direction) / weights.size",
  ),
  "slopes along v": (
    "return jax.jvp(look.losses_fn, (params,), (direction,))",
    "return jax.jvp(look.losses_fn, (look.params,), "
    "(jax.tree.map(jnp.negative, direction),))",
  ),
  "slopes at the look-ahead": (
    "(gradient,) = pull_weights(slopes(direction)",
    "look = look._replace(params=pseudo_params)\n"
    "  slopes = lambda d: jax.jvp(look.losses_fn, (look.params,), (d,))[1]\n"
    "  (gradient,) = pull_weights(slopes(direction)",
  ),
}


@pytest.mark.parametrize("bug", JVP_BUGS)
def test_planted_bug_of_the_jvp_is_seen(bug, monkeypatch):
  make = plant(
    monkeypatch,
    [
      ("meta", *JVP_BUGS[bug]),
      ("meta", "import jax\n", "import jax\nimport jax.numpy as jnp\n"),
    ],
  )
  with pytest.raises(AssertionError, match="Not equal|not almost|Arrays are"):
    check_against_oracle(make_config(estimator="jvp"), make=make)


@pytest.mark.parametrize("changes", [[], [NAIVE]], ids=["copy", "naive"])
def test_the_unplanted_copy_passes(changes, monkeypatch):
  make = plant(monkeypatch, changes)
  check_against_oracle(make_config(inputs="both"), make=make)


def test_interval_updates_the_wpn_on_the_first_step_of_each_cycle():
  config = make_config(interval=2)
  step = train_step.make_train_step(
    LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
  )
  state = as_state(
    oracles.tree_map(lambda x: np.asarray(x, np.float32), initial_values(config)),
    config,
  )
  updated = []
  for t in range(5):
    batch = make_batch(8, t)
    batch["image"] = batch["image"].astype(np.float32)
    before = state
    state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
    changed = not np.array_equal(
      before.wpn_params["output"]["kernel"], state.wpn_params["output"]["kernel"]
    )
    assert np.isfinite(metrics["meta_loss"]).all() == changed
    assert not np.array_equal(before.params["weight"], state.params["weight"])
    updated.append(changed)
  # Counted in an epoch of three steps, as the released loop does.
  assert updated == [True, False, True, True, False]


def run_float32(method, epsilon, backbone=None, steps=3):
  config = make_config(method=method, epsilon=epsilon)
  step = train_step.make_train_step(
    backbone or LinearExits(), config, steps_per_epoch=STEPS_PER_EPOCH
  )
  values = oracles.tree_map(
    lambda x: np.asarray(x, np.float32), initial_values(config)
  )
  state = as_state(values, config)
  for t in range(steps):
    batch = make_batch(12, t)
    batch["image"] = batch["image"].astype(np.float32)
    state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
  return state, metrics


def test_uniform_weighs_everything_one_and_has_no_wpn():
  state, metrics = run_float32("uniform", 0.5)
  assert state.wpn_params == {}
  np.testing.assert_array_equal(metrics["weights"], 1)
  assert "meta_loss" not in metrics


def test_one_trace_serves_many_steps():
  class Counting(LinearExits):
    traces = 0

    def apply(self, *args, **kwargs):
      Counting.traces += 1
      return super().apply(*args, **kwargs)

  run_float32("l2w", 0.5, Counting(), steps=1)
  once = Counting.traces
  Counting.traces = 0
  run_float32("l2w", 0.5, Counting(), steps=4)
  assert Counting.traces == once


def test_labels_smoothed_in_training_only():
  config = make_config()
  config.label_smoothing = 0.2
  plain = make_config()
  batch = make_batch(12, 0)
  with jax.enable_x64(True):

    def run(c):
      step = train_step.make_train_step(
        LinearExits(), c, steps_per_epoch=STEPS_PER_EPOCH
      )
      return step(as_state(initial_values(c), c), jax.tree.map(jnp.asarray, batch))[
        1
      ]

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
