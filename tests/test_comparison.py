"""Comparisons of synthetic runs, worked out by hand, and the command for them."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, tiny_flags
from test_report import assert_valid, drawn_in, make_metrics, make_results

from l2w_jax import compare
from l2w_jax import config as config_lib
from l2w_jax.results import comparison
from l2w_jax.run import directory

METHODS = ("uniform", "l2w:meta.epsilon=0.3")
NUM_TEST = 50


def write_run(
  workdir: pathlib.Path, seed: int, gain: float, method="l2w", num_exits=3
) -> pathlib.Path:
  """A run whose accuracies lie `gain` above those of another of its seed."""
  workdir.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  results = make_results(num_exits, method)
  luck = (0.0, 0.02, -0.01)[seed] + gain
  for entry in results["anytime"] + results["budgeted"]:
    entry["accuracy"] += luck
  directory.write_results(workdir, results)
  (workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in make_metrics(num_exits, method))
  )
  scores = {"about": json.dumps(results)}
  for split in ("calibration", "test"):
    of_exits = rng.uniform(size=(3, NUM_TEST, num_exits))
    scores |= {
      f"{split}_logits": np.zeros((0, num_exits, 10), np.float32),
      f"{split}_label": np.ones(NUM_TEST, np.int32),
      f"{split}_prediction": (of_exits[0] < 0.8).astype(np.int32),
      f"{split}_confidence": of_exits[1].astype(np.float32),
      f"{split}_top5": of_exits[2] < 0.9,
    }
  np.savez(workdir / "scores.npz", **scores)
  return workdir


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """(workdir, summary) of two methods with three seeds."""
  workdir = tmp_path_factory.mktemp("compared")
  gains = {"uniform": (0, 0, 0), METHODS[1]: (0.01, 0.02, 0.03)}
  runs = {
    name: [
      write_run(
        workdir / f"{i}-{seed}", seed, gains[name][seed], name.partition(":")[0]
      )
      for seed in range(3)
    ]
    for i, name in enumerate(METHODS)
  }
  return workdir, comparison.write(workdir, runs)


def test_the_interval_is_that_of_a_table(compared):
  _, summary = compared
  difference = summary["differences"][METHODS[1]]["anytime"]
  # Gains of 1, 2 and 3 points, whatever the luck of a seed: mean 2, standard
  # deviation 1, and t = 4.302653 for 2 degrees of freedom.
  reach = 0.04302653 / 3**0.5
  np.testing.assert_allclose(difference["mean"], 0.02, atol=1e-12)
  np.testing.assert_allclose(difference["std"], 0.01, atol=1e-12)
  np.testing.assert_allclose(difference["low"], 0.02 - reach, atol=1e-8)
  np.testing.assert_allclose(difference["high"], 0.02 + reach, atol=1e-8)
  # The seeds themselves differ by more, so an unpaired interval is wider.
  assert summary["methods"]["uniform"]["anytime"]["std"][0] == pytest.approx(
    np.std([0, 2, -1], ddof=1) / 100
  )
  at_cost = summary["differences"][METHODS[1]]["budgeted"]
  np.testing.assert_allclose(at_cost["mean"], 0.02, atol=1e-12)
  assert summary["seeds"] == 3 and len(summary["costs"]) == 5


def test_a_single_seed_has_no_interval(tmp_path):
  runs = {
    name: [write_run(tmp_path / name[:3], 0, gain)]
    for name, gain in zip(METHODS, (0, 0.01), strict=True)
  }
  summary = comparison.write(tmp_path, runs)
  difference = summary["differences"][METHODS[1]]["anytime"]
  assert difference["std"] is difference["low"] is difference["high"] is None
  text = (tmp_path / "comparison.txt").read_text()
  assert text.startswith("One seed") and "[" not in text and "±" not in text
  assert "| +1.00 " in text


def test_the_text_is_the_table_that_is_promised(compared):
  workdir, summary = compared
  lines = (workdir / "comparison.txt").read_text().splitlines()
  values = summary["methods"]["uniform"]["anytime"]
  cell = f"{100 * values['mean'][0]:.2f} ± {100 * values['std'][0]:.2f}"
  (row,) = [line for line in lines[:9] if line.startswith("| uniform (n = 3)")]
  assert row.split("|")[2].strip() == cell
  (row,) = [
    line for line in lines[:9] if line.startswith(f"| {METHODS[1]} - uniform")
  ]
  # 2 ± 4.302653 / √3
  assert row.split("|")[2].strip() == "+2.00 [-0.48, +4.48]"
  assert lines[0].endswith("50 test images; one is 2 points.")
  assert json.loads((workdir / "comparison.json").read_text()) == summary


def test_pictures_and_page(compared):
  workdir, _ = compared
  html = (workdir / "comparison" / "index.html").read_text()
  assert_valid(html)
  assert drawn_in(html) == {"curves", "gain", "weights", "leaving"}
  assert "+2.00 [-0.48, +4.48]" in html
  assert "where they leave at q = 0.75; q sets" in " ".join(html.split())
  assert not [path for path in workdir.rglob(".*") if path.is_file()]


def test_exits_that_are_single_are_compared_at_their_cost(tmp_path):
  runs = {
    name: [write_run(tmp_path / name[:3], 0, gain, num_exits=1)]
    for name, gain in zip(METHODS, (0, 0.01), strict=True)
  }
  summary = comparison.write(tmp_path, runs)
  assert summary["costs"] == [3e5]
  head, table = comparison.rows(summary, "budgeted")
  assert head == ["", "mean 300 thousand MACs"] and table[-1][1] == "+1.00"
  found = {name: [comparison.read_run(x) for x in at] for name, at in runs.items()}
  drawn = comparison.draw(found, summary)
  assert "_" in [line.get_marker() for line in drawn["curves"].axes[0].lines]


def test_a_comparison_of_patience_speaks_of_no_q(tmp_path):
  runs = {name: [write_run(tmp_path / name[:3], 0, 0)] for name in METHODS}
  for (path,) in runs.values():
    with_patience(path)
  comparison.write(tmp_path, runs)
  html = " ".join((tmp_path / "comparison/index.html").read_text().split())
  assert (
    "where they leave at patience = 2; patience is how many exits in a row" in html
  )
  assert "q sets" not in html and "q =" not in html


def with_patience(workdir: pathlib.Path) -> None:
  """Makes two points of a run patience 2 and 3, and drops the others."""
  results = directory.read_results(workdir)
  results["budgeted"] = results["budgeted"][::20]
  for level, entry in enumerate(results["budgeted"], 2):
    del entry["q"]
    entry["patience"] = level
  directory.write_results(workdir, results | {"confidence": "patience"})


def test_two_seeds_have_no_interval_and_leave_the_axis_to_the_dots(tmp_path):
  runs = {
    name: [
      write_run(tmp_path / f"{name[:3]}{s}", s, gain + s * gain) for s in (0, 1)
    ]
    for name, gain in zip(METHODS, (0, 0.01), strict=True)
  }
  summary = comparison.write(tmp_path, runs, "pdf")
  assert (tmp_path / "comparison/figures/gain.pdf").read_bytes()[:4] == b"%PDF"
  difference = summary["differences"][METHODS[1]]["budgeted"]
  assert difference["low"] is None and difference["std"] is not None
  text = (tmp_path / "comparison.txt").read_text()
  assert "2 seeds, too few for an interval" in text and "[" not in text
  found = {name: [comparison.read_run(x) for x in at] for name, at in runs.items()}
  axes = comparison.draw(found, summary)["gain"].axes[0]
  low, high = axes.get_ylim()
  assert -1 < low < 0 and 2 < high < 3  # points; the seeds gain 1 and 2
  labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
  assert labels == [METHODS[1], "a seed", "mean"]


def test_accuracy_at_a_cost_lies_between_the_points_around_it():
  curve = np.array([[4.0, 0.8], [1.0, 0.5], [2.0, 0.6], [2.0, 0.7]])
  np.testing.assert_allclose(
    comparison.accuracy_at(curve, np.array([1.0, 1.5, 2.0, 3.0])),
    [0.5, 0.575, 0.65, 0.725],
  )


def make_run(correct, confidence, exits=None, curve=((1.0, 0.5), (3.0, 0.6))):
  correct = np.array(correct, bool)
  return comparison.Run(
    accuracy=correct.mean(0),
    curve=np.array(curve),
    macs=np.arange(1.0, correct.shape[1] + 1),
    weights=[],
    correct=correct,
    confidence=np.array(confidence),
    exits=np.zeros(len(correct), int) if exits is None else np.array(exits),
    seconds=1.0,
    point=("q", 0.75),
  )


def test_easy_images_are_those_the_exits_are_surely_right_about():
  # Ease 0.9, 0, 0.95, -0.9 and 0.05.
  correct = [[1, 1], [0, 1], [1, 1], [0, 0], [0, 1]]
  confidence = [[0.9, 0.9], [0.5, 0.5], [0.95, 0.95], [0.9, 0.9], [0.6, 0.7]]
  run = make_run(correct, confidence)
  np.testing.assert_array_equal(
    comparison.easy_to_hard([run, run]), [1, 3, 0, 4, 2]
  )


def test_shares_of_groups_that_leave():
  group = np.array([0, 1, 2, 3, 4])
  runs = [
    make_run([[1, 1]] * 5, [[1, 1]] * 5, exits)
    for exits in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
  ]
  np.testing.assert_array_equal(
    comparison.leaving(runs, group), [[1, 0], [1, 0], [0.5, 0.5], [0, 1], [0, 1]]
  )


def test_exits_are_counted_at_the_thresholds_of_the_run(tmp_path):
  workdir = write_run(tmp_path / "run", 0, 0)
  results = json.loads((workdir / "results.json").read_text())
  for entry in results["budgeted"]:
    entry["thresholds"] = (
      [0.5, None, "-inf"] if entry["q"] == 0.75 else ["inf", "inf", "-inf"]
    )
  directory.write_results(workdir, results)
  run = comparison.read_run(workdir)
  first = np.load(workdir / "scores.npz")["test_confidence"][:, 0] >= 0.5
  np.testing.assert_array_equal(run.exits, np.where(first, 0, 2))


def test_runs_that_cannot_be_compared(tmp_path):
  pair = make_run([[1, 1]] * 5, [[1, 1]] * 5)
  other = make_run([[1, 1, 1]] * 5, [[1, 1, 1]] * 5)
  fewer = make_run([[1, 1]] * 4, [[1, 1]] * 4)
  apart = pair._replace(curve=np.array([[4.0, 0.5], [5.0, 0.5]]))
  for runs, says in (
    ({"a": [pair], "b": [other]}, "other networks or other test images"),
    ({"a": [pair], "b": [fewer]}, "other networks or other test images"),
    ({"a": [pair, pair], "b": [pair]}, "b has 1 runs and a 2"),
    ({"a": [pair], "b": [apart]}, "no mean cost is on the curves of all"),
  ):
    with pytest.raises(ValueError, match=says):
      comparison.summarize(runs)
  run = write_run(tmp_path / "run", 0, 0)
  (run / "scores.npz").unlink()
  with pytest.raises(ValueError, match="scores.npz is missing"):
    comparison.write(tmp_path, {"a": [run]})


def test_methods_may_carry_overrides():
  methods = compare.parse_methods(
    "uniform,l2w:meta.epsilon=0.3+meta.center_over=all,"
    "fixed:baseline.exit_weights=(1,2.5)"
  )
  assert list(methods.values()) == [
    {"method": "uniform"},
    {"method": "l2w", "meta.epsilon": 0.3, "meta.center_over": "all"},
    {"method": "fixed", "baseline.exit_weights": (1, 2.5)},
  ]


@pytest.mark.parametrize(
  "text, says",
  [
    ("l2w:meta.epsilon", "'meta.epsilon' is no override"),
    ("l2w,uniform,l2w", "names 'l2w' twice"),
    ("l2w:model.num_exits=2", "model.num_exits may not differ"),
    ("l2w:data.seed=2", "data.seed may not differ"),
    ("l2w:seed=2", "seed may not differ"),
    ("l2w:model=3", "model may not differ"),
    (
      "l2w:epochs=2+batch=8+epochs=3",
      "'l2w:epochs=2.*epochs=3' gives epochs twice",
    ),
    ("uniform:,l2w", "nothing follows the colon of 'uniform:'"),
  ],
)
def test_methods_that_are_not_understood(text, says):
  with pytest.raises(ValueError, match=says):
    compare.parse_methods(text)


def test_the_plan_pairs_methods_by_seed(tiny_config, tmp_path):
  tiny_config.seed = 4
  runs = compare.plan(
    tiny_config, compare.parse_methods("uniform,l2w:meta.epsilon=0.3"), 2, tmp_path
  )
  assert [
    (name, path.name, config.seed, config.method, config.meta.epsilon)
    for name, path, config in runs
  ] == [
    ("uniform", "uniform-4", 4, "uniform", 0.8),
    ("l2w:meta.epsilon=0.3", "l2w_meta.epsilon=0.3-4", 4, "l2w", 0.3),
    ("uniform", "uniform-5", 5, "uniform", 0.8),
    ("l2w:meta.epsilon=0.3", "l2w_meta.epsilon=0.3-5", 5, "l2w", 0.3),
  ]
  assert tiny_config.seed == 4 and tiny_config.meta.epsilon == 0.8
  with pytest.raises(ValueError, match="at most 1, got 3"):
    compare.plan(
      tiny_config, compare.parse_methods("l2w:meta.epsilon=3"), 1, tmp_path
    )


def run_compare(*flags: object) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "experiments/compare.py", *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_a_run_is_no_folder_of_a_comparison(finished):
  before = sorted(finished.workdir.iterdir())
  done = run_compare(*tiny_flags(), f"--workdir={finished.workdir}")
  assert done.returncode == 2 and "is a run; name a folder for all" in done.stderr
  done = run_compare("--config.epochs=2", f"--workdir={finished.workdir}")
  says = "changes a config, and there is none: give --config=NAME"
  assert done.stderr == f"error: --config.epochs {says}\n"
  assert sorted(finished.workdir.iterdir()) == before


def test_finished_runs_are_compared_and_left_alone(finished, tmp_path):
  shutil.copytree(finished.workdir, tmp_path / "l2w-0")
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  done = run_compare(
    *tiny_flags(), "--methods=l2w", "--seeds=1", f"--workdir={tmp_path}"
  )
  assert done.returncode == 0, done.stderr
  accuracy = json.loads((tmp_path / "l2w-0/results.json").read_text())["anytime"][
    1
  ]["accuracy"]
  assert "| l2w (n = 1)" in done.stdout and f"{100 * accuracy:.2f}" in done.stdout
  first, second = done.stderr.splitlines()
  assert re.match(r"compare: \d+ cpu devices? \(cpu\), JAX ", first)
  assert second == f"compare: run 1 of 1, {tmp_path}/l2w-0"
  assert (tmp_path / "comparison/index.html").exists()
  for path, time in before.items():
    assert path == tmp_path or path.stat().st_mtime_ns == time


@pytest.mark.parametrize(
  "flags, says",
  [
    (["--workdir=w"], "error: --config is missing"),
    (["--config=configs/digits.py"], "error: --workdir is missing"),
    (
      ["--config=configs/digits.py", "--workdir=w", "--methods=l2v"],
      "error: config.method must be one of 'l2w'",
    ),
    (
      ["--config=configs/digits.py", "--workdir=w", "--config.epoch=1"],
      "error: config.epoch does not exist; did you mean config.epochs?",
    ),
  ],
)
def test_a_mistake_is_one_line(flags, says):
  done = run_compare(*flags)
  assert done.returncode == 2
  assert done.stderr.startswith(says) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "methods, says",
  [
    ("uniform,l2w:evaluate.target=accuracy:93", "did you mean accuracy:0.93"),
    ("uniform,fixed", "exit_weights with one weight for each of the 2 exits"),
    ("uniform,uniform:batch=33", "batch 33 does not split into two halves"),
    ("uniform,nowhere.rule", "'nowhere.rule': cannot import nowhere"),
    ("uniform,l2w", "l2w-0 was made with another config: config.epochs is 2 here"),
  ],
)
def test_what_a_later_run_would_end_at_is_told_before_the_first(
  tmp_path, tiny_config, methods, says
):
  _, workdir, config = compare.plan(
    tiny_config, compare.parse_methods("l2w:epochs=7"), 1, tmp_path
  )[0]
  (tmp_path / "l2w-0").mkdir()
  directory.write_config(tmp_path / "l2w-0", config)
  runs = compare.plan(tiny_config, compare.parse_methods(methods), 1, tmp_path)
  with pytest.raises(ValueError, match=says):
    compare.check(runs)


def test_places_of_a_comparison_are_checked_before_the_first_run(
  tmp_path, tiny_config, monkeypatch
):
  runs = compare.plan(
    tiny_config, compare.parse_methods("uniform,l2w"), 1, tmp_path
  )
  compare.check(runs)
  (tmp_path / "comparison").touch()
  with pytest.raises(NotADirectoryError):
    compare.check(runs)
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ValueError, match="needs matplotlib"):
    compare.check(runs)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path):
  """Killed after the first run; then only what is missing is trained."""
  flags = (
    *tiny_flags(),
    "--methods=uniform,random",
    "--seeds=2",
    f"--workdir={tmp_path}",
  )
  config = config_lib.load_config(
    str(ROOT / "configs/digits.py"),
    {
      flag.removeprefix("--config.").partition("=")[0]: compare.literal(
        flag.partition("=")[2]
      )
      for flag in tiny_flags()[1:]
    },
  )
  (_, path, first), *_ = compare.plan(
    config, compare.parse_methods("uniform,random"), 2, tmp_path
  )
  compare.finish(path, first)
  done = run_compare(*flags)
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("train uniform: compiled the training step") == 1
  assert done.stderr.count("train random: compiled the training step") == 2
  summary = json.loads((tmp_path / "comparison.json").read_text())
  assert summary["seeds"] == 2 and list(summary["methods"]) == ["uniform", "random"]
  # Random weights are pictured, those of uniform are not.
  assert "weights" in drawn_in((tmp_path / "comparison/index.html").read_text())
