"""The loop: a run that was stopped goes on as if it had not been."""

import json

import jax
import numpy as np
import pytest

import l2w_jax
from l2w_jax.data import feeds, sources
from l2w_jax.run import parallel
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
