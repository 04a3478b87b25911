"""The loop: a run that was stopped goes on as if it had not been."""

import itertools
import json
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l2w_jax
from l2w_jax.data import feeds, sources
from l2w_jax.run import parallel, stopping
from l2w_jax.training import checkpoint, metrics_log
from l2w_jax.training import loop as train
from l2w_jax.training.state import split_seed

# What may differ between two runs of the same steps.
CLOCK = "images_per_second"


def final_state(workdir, config):
  backbone = l2w_jax.build_backbone(config.model, 10, (8, 8, 1))
  template = jax.eval_shape(
    lambda key: l2w_jax.init_state(key, backbone, config), jax.random.key(0)
  )
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(template)


def metrics(workdir):
  lines = [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  return [{name: x for name, x in line.items() if name != CLOCK} for line in lines]


class Killed(Exception):
  """Stands for the end of a process."""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
  """A run killed in its second epoch and started again, and what it had left."""
  from conftest import ROOT, TINY

  from l2w_jax import config as config_lib

  config = config_lib.load_config(str(ROOT / "configs/digits.py"), TINY)
  workdir = tmp_path_factory.mktemp("runs") / "resumed"
  write = metrics_log.MetricsLog.write

  def dying_write(self, kind, step, epoch, values):
    if step == 12:
      raise Killed
    write(self, kind, step, epoch, values)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics_log.MetricsLog, "write", dying_write)
    with pytest.raises(Killed):
      train.train(workdir, config)
  path = workdir / "metrics.jsonl"
  with path.open("a") as file:  # a line that a kill cut in two
    file.write('{"kind": "train", "step": 12, "epoch": 1.')
  left = path.read_text()
  assert train.train(workdir, config)
  return workdir, left


def test_it_was_stopped_in_the_middle(resumed):
  _, left = resumed
  steps = [json.loads(line)["step"] for line in left.splitlines()[:-1]]
  assert max(steps) == 11
  with pytest.raises(ValueError, match="line 1"):
    json.loads(left.splitlines()[-1])


def test_resumed_is_uninterrupted_bit_for_bit(finished, resumed, tiny_config):
  theirs, info = final_state(finished.workdir, tiny_config)
  ours, our_info = final_state(resumed[0], tiny_config)
  assert ours.step == 16 and our_info["complete"] and info["complete"]
  leaves, other_leaves = jax.tree.leaves(ours), jax.tree.leaves(theirs)
  assert len(leaves) > 50
  for a, b in zip(leaves, other_leaves, strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_resumed_metrics_have_no_gap_and_no_double(finished, resumed):
  ours, theirs = metrics(resumed[0]), metrics(finished.workdir)
  assert [line["step"] for line in ours if line["kind"] == "train"] == list(
    range(1, 17)
  )
  assert ours == theirs


class Stops:
  """Stands for `stopping.asked`: a signal when it is asked for the n-th time."""

  def __init__(self, n: int):
    self._left = n

  def __call__(self) -> int:
    self._left -= 1
    return signal.SIGTERM if self._left <= 0 else 0


@pytest.fixture(scope="module")
def rarely(tmp_path_factory):
  """A config whose epochs end without a pause, and a run of it."""
  from conftest import ROOT, TINY

  from l2w_jax import config as config_lib

  rare = {
    "evaluate.every": 3,
    "checkpoint.unit": "steps",
    "checkpoint.every": 5,
    "checkpoint.keep": 9,
  }
  config = config_lib.load_config(str(ROOT / "configs/digits.py"), TINY | rare)
  workdir = tmp_path_factory.mktemp("runs") / "rarely"
  assert train.train(workdir, config)
  return workdir, config


def saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_checkpoints_every_few_steps(rarely):
  assert saved_steps(rarely[0]) == [5, 10, 15, 16]


def test_the_picture_of_an_epoch_holds_no_step_of_the_next(rarely):
  lines = [line for line in metrics(rarely[0]) if line["kind"] == "weights"]
  assert [line["step"] for line in lines] == [8, 16]
  for line in lines:  # 8 steps of 128 images, at both exits
    assert np.sum(line["count"], axis=1).tolist() == [8 * 128, 8 * 128]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
  rarely, tmp_path, monkeypatch, capsys
):
  """Within an epoch and at its end; and killed behind a save within one."""
  workdir, config = rarely
  for n, step in [(3, 3), (5, 8), (1, 9)]:
    monkeypatch.setattr(stopping, "asked", Stops(n))
    with pytest.raises(SystemExit) as stopped:
      train.train(tmp_path, config)
    assert stopped.value.code == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"train l2w: stopped at step {step}; the same command goes on"
    assert saved_steps(tmp_path)[-1] == step
  monkeypatch.setattr(stopping, "asked", lambda: 0)
  write = metrics_log.MetricsLog.write

  def dying_write(self, kind, step, epoch, values):
    if step == 13:
      raise Killed
    write(self, kind, step, epoch, values)

  with monkeypatch.context() as patch:
    patch.setattr(metrics_log.MetricsLog, "write", dying_write)
    with pytest.raises(Killed):
      train.train(tmp_path, config)
  assert train.train(tmp_path, config)
  assert metrics(tmp_path) == metrics(workdir)
  ours, theirs = (final_state(x, config)[0] for x in (tmp_path, workdir))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_batch_that_leaves_lanes_of_a_tpu_empty_is_said_once(
  rarely, tmp_path, monkeypatch, capsys
):
  config = rarely[1].copy_and_resolve_references()
  config.epochs, config.method = 1, "uniform"
  monkeypatch.setattr(stopping, "asked", Stops(1))
  monkeypatch.setattr(train.parallel, "LANES", 2 * config.batch)
  for platform, times in ("cpu", 0), ("tpu", 1):
    monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
    with pytest.raises(SystemExit):
      train.train(tmp_path / platform, config)
    said = capsys.readouterr().err
    half, lanes, batch = (config.batch * n for n in (0.5, 2, 4))
    line = (
      f"{half:.0f} images a device at a time fill a TPU's {lanes} lanes in part; "
      f"config.batch={batch} fills them"
    )
    assert said.count(line) == said.count("lanes") == times


def test_a_signal_at_the_very_end_is_not_swallowed(
  rarely, tmp_path, monkeypatch, capsys
):
  config = rarely[1].copy_and_resolve_references()
  config.epochs, config.method = 1, "uniform"
  monkeypatch.setattr(stopping, "asked", Stops(9))  # after 8 steps
  with pytest.raises(SystemExit):
    train.train(tmp_path, config)
  assert "stopped at step 8;" in capsys.readouterr().err
  monkeypatch.setattr(stopping, "asked", lambda: 0)
  assert train.train(tmp_path, config) is False  # it had finished


def test_checkpoints_every_few_minutes(rarely, tmp_path, monkeypatch):
  config = rarely[1].copy_and_resolve_references()
  config.method, config.checkpoint.unit = "uniform", "minutes"
  config.checkpoint.keep = 16
  passed = itertools.count(step=40)  # seconds, at every look at the clock
  clock = types.SimpleNamespace(monotonic=lambda: float(next(passed)))
  monkeypatch.setattr(train, "time", clock)
  assert train.train(tmp_path, config)
  found = saved_steps(tmp_path)
  assert found[-1] == 16 and 2 < len(found) < 9
  assert set(found) - {8, 16}  # also within an epoch


@pytest.mark.parametrize("method", ["l2w", "uniform"])
def test_a_run_that_diverges_says_so_in_one_line(tmp_path, tiny_config, method):
  tiny_config.method, tiny_config.optimizer.learning_rate = method, 1e6
  for _ in range(2):  # and again
    with pytest.raises(ValueError) as error:
      train.train(tmp_path, tiny_config)
    assert re.match(
      r"training diverged: (train|meta)_loss is (nan|inf) at step [123], where the "
      r"learning rate is (9\d+|1e\+06); there is no finite checkpoint yet; train "
      r"into another workdir with a smaller config.optimizer.learning_rate or "
      r"config.optimizer.weight_decay",
      str(error.value),
    )
    assert ("or config.meta.learning_rate" in str(error.value)) == (method == "l2w")
  assert not saved_steps(tmp_path)
  assert len(metrics(tmp_path)) < 3


def test_a_finite_loss_does_not_save_a_state_that_is_not(
  tmp_path, tiny_config, monkeypatch
):
  tiny_config.method = "uniform"
  call = train.Step.__call__

  def broken_after(self, state, halves, step):
    state, metrics = call(self, state, halves, step)

    # Training reads the running mean, for the moments are taken around it, and
    # never the running variance.
    def broken(path, value):
      factor = jax.numpy.where(
        (step >= 12) & (path[-1].key == "var"), jax.numpy.inf, 1
      )
      return value * factor

    return state.replace(
      batch_stats=jax.tree_util.tree_map_with_path(broken, state.batch_stats)
    ), metrics

  monkeypatch.setattr(train.Step, "__call__", broken_after)
  with pytest.raises(ValueError) as error:
    train.train(tmp_path, tiny_config)
  assert re.match(
    r"training diverged: .batch_stats.* is not finite at step 16, .*; the last "
    "finite checkpoint is step 8; ",
    str(error.value),
  )
  assert saved_steps(tmp_path) == [8]


def test_the_log_is_json_whatever_it_is_told(tmp_path):
  nan, inf = float("nan"), float("inf")
  with metrics_log.MetricsLog(tmp_path) as log:
    log.write("diagnose", 1, 0.5, {"a": nan, "b": [1.0, inf], "c": {"d": [-inf]}})

  def refuse(constant):
    raise AssertionError(constant)

  line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
  assert (line["a"], line["b"], line["c"]) == (None, [1.0, None], {"d": [None]})


def test_seconds_add_up_over_the_parts_of_a_run(finished, resumed, tiny_config):
  seconds = final_state(resumed[0], tiny_config)[1]["seconds"]
  assert seconds["train"] > 0 and seconds["compile"] > 0


def test_a_finished_run_is_not_trained_again(resumed, tiny_config, compilations):
  before = metrics(resumed[0])
  assert train.train(resumed[0], tiny_config) is False
  assert compilations() == 0
  assert metrics(resumed[0]) == before


@pytest.mark.parametrize(
  "key, value", [("seed", 1), ("epochs", 3), ("method", "uniform")]
)
def test_resuming_with_another_config_is_refused(finished, tiny_config, key, value):
  was = tiny_config[key]
  tiny_config[key] = value
  with pytest.raises(
    ValueError, match=f"config.{key} is {value!r} here and {was!r} there"
  ):
    train.train(finished.workdir, tiny_config)


def test_keys_that_shape_no_result_may_change(finished, tiny_config):
  tiny_config.log.every = 3
  tiny_config.checkpoint.keep = 5
  tiny_config.evaluate.batch = 7
  assert train.train(finished.workdir, tiny_config) is False


def test_the_log_drops_what_is_written_again_and_a_cut_line(tmp_path):
  def line(step):
    return json.dumps({"kind": "train", "step": step, "epoch": step / 8})

  path = tmp_path / "metrics.jsonl"
  # The file of a run that died at step 3, resumed from step 2: the newline of
  # a whole line may be what is missing, too.
  for left, kept in [
    ([line(1), line(2), line(3), line(4)[:20]], [1, 2, 5]),
    ([line(1), line(2), '{"kind": "tr'], [1, 2, 5]),
    ([line(1), line(2)], [1, 2, 5]),
    ([line(1), "7", "[1]", "\0\0\0"], [1, 5]),
    ([line(4)], [5]),
    ([], [5]),
  ]:
    path.write_text("\n".join(left))
    with metrics_log.MetricsLog(tmp_path, step=2) as log:
      log.write("train", 5, 0.5, {"train_loss": 1.0, "accuracy": [0.5, 0.75]})
    lines = path.read_text()
    assert lines.endswith("\n")
    assert [json.loads(x)["step"] for x in lines.splitlines()] == kept


def test_uniform_trains_and_logs_without_a_wpn(tmp_path, tiny_config):
  tiny_config.method = "uniform"
  tiny_config.epochs = 1
  assert train.train(tmp_path / "run", tiny_config)
  lines = metrics(tmp_path / "run")
  assert {line["kind"] for line in lines} == {"train", "evaluate"}
  assert not any("meta_loss" in line for line in lines)
  losses = [line["train_loss"] for line in lines if line["kind"] == "train"]
  # The sum of two exits' losses starts near 2·ln 10 = 4.6 and falls.
  assert 4 < losses[0] < 5.5 and losses[-1] < losses[0]


def test_sums_of_weights_by_loss():
  rng = np.random.default_rng(0)
  weights, losses = rng.uniform([0.2, 0], [1.8, 6], (3, 50, 2)).T.astype(np.float32)
  found = train.weights_by_loss(10, jnp.asarray(weights), jnp.asarray(losses))
  width = 2 * np.log(10) / train.LOSS_BINS
  for k in range(3):
    for m in range(train.LOSS_BINS):
      here = weights[np.minimum(losses[:, k] // width, train.LOSS_BINS - 1) == m, k]
      expected = (here - 1).sum(), ((here - 1) ** 2).sum(), len(here)
      np.testing.assert_allclose([x[k, m] for x in found], expected, atol=1e-5)


def test_weights_against_loss_are_binned(finished):
  line = [x for x in metrics(finished.workdir) if x["kind"] == "weights"][-1]
  edges, means, counts = (
    np.array(line[name], object if name == "mean_weight" else float)
    for name in ("loss_bins", "mean_weight", "count")
  )
  assert len(edges) == train.LOSS_BINS + 1
  np.testing.assert_allclose(edges[-1], 2 * np.log(10), rtol=1e-12)
  # An epoch of 8 steps, two halves of 64 samples each, at every exit.
  np.testing.assert_array_equal(counts.sum(axis=1), [8 * 128, 8 * 128])
  known = counts > 0
  assert all(
    (mean is not None) == k
    for mean, k in zip(means.ravel(), known.ravel(), strict=True)
  )
  # Centred over exits, the weights of all exits average to 1 exactly.
  total = sum(
    mean * count for mean, count in zip(means[known], counts[known], strict=True)
  )
  assert total / counts.sum() == pytest.approx(1, abs=1e-5)
  # 1 ± 0.8 · (u - mean u), |u| < 1, with two exits.
  assert all(
    (std is None) == (mean is None) and (std is None or 0 <= std < 0.8)
    for std, mean in zip(sum(line["std_weight"], []), means.ravel(), strict=True)
  )
  assert all(0.2 < mean < 1.8 for mean in means[known])


@pytest.mark.parametrize("method", ["l2w", "random"])
def test_runs_of_other_seeds_are_the_same_program(method, tiny_config, monkeypatch):
  """So that the compilation of one serves all, from the cache on disk."""
  tiny_config.method = method
  lowered = []
  map_devices = parallel.map_devices

  def recording(function, *arguments):
    mapped = map_devices(function, *arguments)

    def lower(*arguments):
      lowered.append(mapped.lower(*arguments))
      return lowered[-1]

    def call(*arguments):
      lower(*arguments)
      return mapped(*arguments)

    call.lower = lower
    return call

  monkeypatch.setattr(parallel, "map_devices", recording)
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: None)

  def programs(seed):
    lowered.clear()
    tiny_config.seed, keys = seed, split_seed(seed)
    dataset = sources.load(tiny_config.data)
    backbone = l2w_jax.build_backbone(tiny_config.model, 10, (8, 8, 1))
    state = l2w_jax.init_state(keys.init, backbone, tiny_config)
    feed = feeds.make_feed(dataset, tiny_config, keys.data, 1)
    step = train.Step(backbone, tiny_config, 8, 1)
    step.compile(state, feed.halves(1))
    return [x.as_text() for x in lowered]

  first = programs(0)
  assert len(first) == 2  # the feed's and the half step
  assert first == programs(1)
  tiny_config.epochs += 1  # changes the learning rate
  assert first != programs(0)
