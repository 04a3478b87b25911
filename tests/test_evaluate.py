"""Scores, curves and results.json: every sample once, thresholds held out."""

import csv
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
from l2w_jax.results import evaluate, summary
from l2w_jax.run import directory
from l2w_jax.training import identity, scores

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
    # Of four classes, all are among the five likeliest.
    assert found.top5.all() and found.top5.shape == (num, EXITS)
    np.testing.assert_array_equal(found.label, split.labels)
    assert found.confidence.dtype == np.float32
    assert found.prediction.dtype == found.label.dtype == np.int32


class Tens(LinearExits):
  """Logits that are pixels: 12 classes, one exit after the other."""

  num_classes = 12

  def apply(self, variables, x):
    return jnp.stack([x.reshape(len(x), -1), -x.reshape(len(x), -1)], 1)


def test_top5_holds_the_five_likeliest_classes(tiny_config):
  rng = np.random.default_rng(0)
  # The lower of equal classes is the likelier one, as for the prediction.
  images = rng.integers(0, 8, (40, 2, 6, 1), np.uint8)
  split = sources.Split(images, rng.integers(0, 12, 40).astype(np.int32))
  dataset = make_dataset(1)._replace(
    train=split, calibration=split, test=split, class_names=tuple("abcdefghijkl")
  )
  tiny_config.evaluate.batch = 16
  found = scores.compile_scorer({}, Tens(), dataset, tiny_config, 1)({}, split)
  pixels = images.reshape(40, 12).astype(int)
  for k, values in enumerate((pixels, -pixels)):
    above = (values > values[range(40), split.labels][:, None]).sum(1)
    before = [
      (values[i, :label] == values[i, label]).sum()
      for i, label in enumerate(split.labels)
    ]
    np.testing.assert_array_equal(found.top5[:, k], above + before < 5)


def make_scores(num, seed, num_classes=CLASSES):
  rng = np.random.default_rng(seed)
  prediction = rng.integers(0, 2, (num, EXITS)).astype(np.int32)
  # A grid, so that there are ties.
  confidence = (rng.integers(1, 30, (num, EXITS)) / 30).astype(np.float32)
  logits = rng.normal(size=(num, EXITS, num_classes)).astype(np.float32)
  top5 = rng.random((num, EXITS)) < 0.9
  return scores.Scores(np.ones(num, np.int32), prediction, confidence, top5, logits)


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
  curves = summary.curves(calibration, test, macs, "released")
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


def test_top5_has_curves_from_eleven_classes_on():
  few = summary.curves(make_scores(9, 0), make_scores(8, 1), np.ones(EXITS))
  test = make_scores(8, 1, num_classes=11)
  many = summary.curves(make_scores(9, 0, num_classes=11), test, np.ones(EXITS))
  for name in ("anytime", "budgeted"):
    assert not any("top5_accuracy" in row for row in few[name])
  assert [row["top5_accuracy"] for row in many["anytime"]] == pytest.approx(
    test.top5.mean(0).tolist()
  )
  row = many["budgeted"][20]
  taken = (test.confidence >= np.float32(row["thresholds"])).argmax(1)
  assert row["top5_accuracy"] == pytest.approx(
    test.top5[np.arange(8), taken].mean(), rel=1e-6
  )


def test_a_point_counts_classes_answered_as_others():
  calibration, test = make_scores(61, 0), make_scores(47, 1)
  names = ("a", "b", "c", "d")
  chosen = summary.operating_point(
    calibration, test, np.array([1, 2, 3]), names, "q:0.75"
  )
  taken = (test.confidence >= np.float32(chosen["thresholds"])).argmax(1)
  answers = test.prediction[np.arange(47), taken]
  # All are of class b, and answers are a or b.
  wrong = int((answers == 0).sum())
  assert chosen["confused"] == [{"class": "b", "as": "a", "images": wrong}]
  rows = summary.confusion_rows(test, chosen, names)
  assert rows[0][1:] == list(names) and rows[2] == ["b", wrong, 47 - wrong, 0, 0]
  assert rows[1] == ["a", 0, 0, 0, 0] and len(rows) == 5


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished.workdir, tmp_path / "run")


def results_of(workdir, config, dataset=None, monkeypatch=None):
  if dataset is not None:
    monkeypatch.setattr(identity, "open_data", lambda *unused: (dataset, None))
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


def test_scores_of_both_splits_give_the_accuracies(finished):
  results = json.loads((finished.workdir / "results.json").read_text())
  with np.load(finished.workdir / "scores.npz") as kept:
    for split, name in (
      ("calibration", "calibration_accuracy"),
      ("test", "accuracy"),
    ):
      found = scores.Scores(*(kept[f"{split}_{x}"] for x in scores.Scores._fields))
      assert found.confidence.shape == found.correct.shape == (360, 2)
      assert found.confidence.dtype == np.float32 and found.top5.dtype == bool
      np.testing.assert_allclose(
        found.correct.mean(0), [row[name] for row in results["anytime"]], rtol=1e-6
      )


def test_a_new_target_needs_no_network(workdir, tiny_config, monkeypatch):
  tiny_config.evaluate.target = "accuracy:0.4"
  anew = evaluate.evaluate(workdir, tiny_config)  # every key but the times
  tiny_config.evaluate.target = "macs:1e5"
  with monkeypatch.context() as patch:
    patch.setattr(scores, "compile_scorer", None)
    patch.setattr(identity, "open_data", None)
    kept = evaluate.evaluate(workdir, tiny_config)
  assert kept["chosen"]["target"] == "macs:1e5"
  assert kept["chosen"]["macs"] != anew["chosen"]["macs"]
  # The same by the network.
  (workdir / "scores.npz").unlink()
  scored = evaluate.evaluate(workdir, tiny_config)
  for name in kept.keys() - {"seconds", "digest"}:
    assert kept[name] == scored[name], name


@pytest.mark.parametrize(
  "change",
  [
    {"evaluate.confidence": "entropy"},
    {"evaluate.calibration": "released"},
    {"evaluate.target": "q:0.75"},  # that of before: told to evaluate again
    {"data.data_dir": "/elsewhere"},
  ],
)
def test_what_scores_depend_on_is_scored_anew(workdir, tiny_config, change):
  tiny_config.evaluate.target = "macs:1e5"
  tiny_config.update_from_flattened_dict(change)
  assert evaluate._kept(workdir, tiny_config) is None


def test_scores_of_another_checkpoint_are_not_used(workdir, tiny_config):
  tiny_config.evaluate.target = "macs:1e5"
  assert evaluate._kept(workdir, tiny_config) is not None
  latest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
  shutil.rmtree(workdir / "checkpoints" / str(latest))
  assert evaluate._kept(workdir, tiny_config) is None


def test_weights_of_later_steps_and_damaged_ones_are_not_of_the_network(
  workdir, tiny_config
):
  path = workdir / "metrics.jsonl"
  before = results_of(workdir, tiny_config)
  line = directory.read_metrics(workdir)["weights"][-1]
  assert before["weights"]["step"] == line["step"] == before["step"] == 16
  by_bin = "count", "mean_weight", "std_weight"
  for change, taken in (
    ({name: line[name][::-1] for name in by_bin} | {"step": 17}, 16),
    ({name: line[name][:1] for name in by_bin}, 16),
    # It takes the place of that of step 16, and says nothing.
    ({"count": [[0] * len(row) for row in line["count"]]}, 8),
  ):
    with path.open("a") as file:
      file.write(json.dumps(line | change) + "\n")
    found = results_of(workdir, tiny_config)["weights"]
    assert found["step"] == taken
    assert taken == 8 or found == before["weights"]


def test_the_way_from_a_start_that_is_drawn_otherwise_is_not_told(
  workdir, tiny_config, monkeypatch
):
  (workdir / "scores.npz").unlink()
  assert 0 < results_of(workdir, tiny_config)["wpn_distance"] < 1
  settings = identity._random_settings() | {"jax_default_prng_impl": "rbg"}
  monkeypatch.setattr(identity, "_random_settings", lambda: settings)
  (workdir / "scores.npz").unlink()
  assert "wpn_distance" not in results_of(workdir, tiny_config)


def test_every_point_is_a_row_of_a_table(finished):
  results = json.loads((finished.workdir / "results.json").read_text())
  with (finished.workdir / "curves.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["curve"] for row in rows] == ["anytime"] * 2 + ["budgeted"] * 39 + [
    "chosen"
  ]
  for row, point in zip(
    rows,
    [*results["anytime"], *results["budgeted"], results["chosen"]],
    strict=True,
  ):
    assert float(row["accuracy"]) == point["accuracy"]
    assert float(row["cost"]) == point["macs"] / results["macs"][-1]
  assert [float(rows[-1][f"leaving_{k}"]) for k in (1, 2)] == results["chosen"][
    "exits"
  ]
  with (finished.workdir / "confusion.csv").open() as file:
    table = [row[1:] for row in csv.reader(file)][1:]
  assert np.trace(np.array(table, int)) == round(
    360 * results["chosen"]["accuracy"]
  )
