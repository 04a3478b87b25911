"""Scores, curves and results.json: every sample once, thresholds held out."""

import json
import shutil
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from toy import LinearExits

from l2w_jax.data import sources
from l2w_jax.exits import policy as exit_policy
from l2w_jax.results import evaluate
from l2w_jax.training import scores

SHAPE, CLASSES, EXITS = (2, 3, 1), LinearExits.num_classes, LinearExits.num_exits


def make_split(num, seed):
  rng = np.random.default_rng(seed)
  return sources.Split(
    rng.integers(0, 256, (num, *SHAPE), np.uint8),
    rng.integers(0, CLASSES, num).astype(np.int32),
  )


def make_dataset(num):
  return sources.Dataset(
    train=make_split(8, 0),
    calibration=make_split(num, 1),
    test=make_split(num, 2),
    class_names=tuple("abcd"),
    mean=np.array([100.0]),
    std=np.array([50.0]),
  )


@pytest.mark.parametrize("num, batch", [(23, 7), (21, 7), (5, 8), (8, 8), (1, 3)])
def test_every_sample_is_scored_once_and_in_order(
  tiny_config, num, batch, monkeypatch
):
  monkeypatch.setattr(scores, "LOGITS_KEPT", 13)
  tiny_config.evaluate.batch = batch
  dataset = make_dataset(num)
  weight = np.random.default_rng(3).normal(size=(EXITS, 6, CLASSES))
  variables = {
    "params": {"weight": jnp.asarray(weight, jnp.float32)},
    "batch_stats": {"mean": jnp.zeros((EXITS, CLASSES))},
  }
  score = scores.compile_scorer(variables, LinearExits(), dataset, tiny_config, 1)
  for split in (dataset.calibration, dataset.test):
    found = score(variables, split)
    x = (split.images.reshape(num, -1) - 100.0) / 50.0
    logits = np.einsum("bd,kdc->bkc", x, weight)
    np.testing.assert_allclose(found.logits, logits[:13], rtol=1e-4, atol=1e-4)
    probability = oracles.softmax(logits)
    # Float32 against float64, logits of up to about ten.
    np.testing.assert_allclose(found.confidence, probability.max(-1), rtol=2e-5)
    np.testing.assert_array_equal(found.prediction, probability.argmax(-1))
    np.testing.assert_array_equal(
      found.correct, found.prediction == split.labels[:, None]
    )
    assert found.confidence.dtype == np.float32
    assert found.prediction.dtype == np.int32


def make_scores(num, seed):
  rng = np.random.default_rng(seed)
  prediction = rng.integers(0, 2, (num, EXITS)).astype(np.int32)
  # A grid, so that there are ties.
  confidence = (rng.integers(1, 30, (num, EXITS)) / 30).astype(np.float32)
  logits = rng.normal(size=(num, EXITS, CLASSES)).astype(np.float32)
  return scores.Scores(confidence, prediction, prediction == 1, logits)


def test_curves_are_the_oracles():
  calibration, test = make_scores(61, 0), make_scores(47, 1)
  macs = np.array([10, 25, 70])
  counts = [
    [int(61 * p) for p in oracles.proportions(Fraction(i, 20), EXITS)]
    for i in range(1, 40)
  ]
  thresholds = np.stack(
    [oracles.thresholds(calibration.confidence, c) for c in counts]
  )
  curves = evaluate.curves(calibration, test, macs, jnp.asarray(thresholds))
  # Float32 fractions of small counts.
  near = {"rel": 1e-6}
  for k, row in enumerate(curves["anytime"]):
    assert row == {
      "exit": k + 1,
      "macs": macs[k],
      "accuracy": pytest.approx(test.correct[:, k].mean(), **near),
      "calibration_accuracy": pytest.approx(
        calibration.correct[:, k].mean(), **near
      ),
    }
  assert len(curves["anytime"]) == EXITS and len(curves["budgeted"]) == 39
  for i, row in enumerate(curves["budgeted"]):
    accuracy, cost, exits = oracles.budgeted(
      test.confidence, test.correct, macs, thresholds[i]
    )
    on_calibration, _, _ = oracles.budgeted(
      calibration.confidence, calibration.correct, macs, thresholds[i]
    )
    assert row["q"] == (i + 1) / 20
    assert row["accuracy"] == pytest.approx(accuracy, **near)
    assert row["calibration_accuracy"] == pytest.approx(on_calibration, **near)
    assert row["macs"] == pytest.approx(cost, **near)
    np.testing.assert_allclose(row["exits"], exits / 47, rtol=1e-6)
    assert [float(t) for t in row["thresholds"]] == [
      float(t) for t in thresholds[i]
    ]
  json.dumps(curves, allow_nan=False)


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished.workdir, tmp_path / "run")


def results_of(workdir, config, dataset=None, monkeypatch=None):
  if dataset is not None:
    monkeypatch.setattr(sources, "load", lambda config: dataset)
  evaluate.evaluate(workdir, config)
  return json.loads((workdir / "results.json").read_text())


def test_thresholds_never_see_the_test_split(workdir, tiny_config, monkeypatch):
  dataset = sources.load(tiny_config.data)
  before = results_of(workdir, tiny_config)
  other_test = sources.Split(
    dataset.test.images[::-1] // 2, (dataset.test.labels + 1) % 10
  )
  after = results_of(
    workdir, tiny_config, dataset._replace(test=other_test), monkeypatch
  )
  unchanged = ("thresholds", "calibration_accuracy")
  for name in unchanged:
    assert [row[name] for row in before["budgeted"]] == [
      row[name] for row in after["budgeted"]
    ]
  assert before["anytime"] != after["anytime"]
  # That they would move with the split they are searched on.
  other_calibration = sources.Split(
    dataset.calibration.images[::2], dataset.calibration.labels[::2]
  )
  moved = results_of(
    workdir,
    tiny_config,
    dataset._replace(calibration=other_calibration),
    monkeypatch,
  )
  assert before["budgeted"] != moved["budgeted"]


def test_the_search_is_the_one_the_config_names(workdir, tiny_config, monkeypatch):
  asked = []
  search = exit_policy.find_thresholds

  def watched(*args, **kwargs):
    asked.append(kwargs["calibration"])
    return search(*args, **kwargs)

  monkeypatch.setattr(exit_policy, "find_thresholds", watched)
  results_of(workdir, tiny_config)
  held_out, asked[:] = asked[:], []
  tiny_config.evaluate.calibration = "released"
  results_of(workdir, tiny_config)
  assert set(held_out) == {"held_out"} and set(asked) == {"released"}


def test_sample_pictures_are_test_images_at_their_exits(finished, tiny_config):
  test = sources.load(tiny_config.data).test
  with np.load(finished.workdir / "samples.npz") as samples:
    shown = {name: samples[name] for name in samples.files}
  assert shown["q"] == 0.75
  found = {
    image.tobytes(): label
    for image, label in zip(test.images, test.labels, strict=True)
  }
  for image, label in zip(shown["images"], shown["labels"], strict=True):
    assert found[image.tobytes()] == label
  assert set(shown["exits"]) == {0, 1}
  results = json.loads((finished.workdir / "results.json").read_text())
  threshold = next(
    row["thresholds"][0] for row in results["budgeted"] if row["q"] == 0.75
  )
  np.testing.assert_array_equal(
    shown["confidence"][shown["exits"] == 0] >= np.float32(threshold), True
  )


def test_without_a_checkpoint_there_is_one_clear_error(tmp_path, tiny_config):
  with pytest.raises(ValueError, match="has no checkpoint yet; train it first"):
    evaluate.evaluate(tmp_path, tiny_config)
  assert not list(tmp_path.iterdir())


def test_scores_of_the_test_split_give_the_accuracies(finished):
  results = json.loads((finished.workdir / "results.json").read_text())
  with np.load(finished.workdir / "scores.npz") as scores:
    assert scores["confidence"].shape == scores["correct"].shape == (360, 2)
    assert scores["confidence"].dtype == np.float32
    assert scores["correct"].dtype == bool
    np.testing.assert_allclose(
      scores["correct"].mean(0),
      [row["accuracy"] for row in results["anytime"]],
      rtol=1e-6,
    )
