"""The kill test itself: it sees what a run is at, and what differs from another."""

import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import torture  # noqa: E402


def test_a_run_is_in_every_phase_once(finished):
  lines = (finished.command.err + finished.command.out).splitlines()
  logs = ["\n" + "\n".join(lines[:i]) for i in range(len(lines) + 1)]
  phases = [torture.phase(log, finished.workdir) for log in logs]
  order = ["start-up", "compile", "train", "evaluate", "report"]
  assert list(dict.fromkeys(phases)) == order
  assert phases == sorted(phases, key=order.index)


def test_a_checkpoint_that_is_being_written_is_a_save(tmp_path):
  log = "\ntrain l2w: compiled the evaluation in 1 s\n"
  (tmp_path / "checkpoints" / "8").mkdir(parents=True)
  assert torture.phase(log, tmp_path) == "train"
  (tmp_path / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()
  assert torture.phase(log, tmp_path) == "save"
  assert torture.saved(tmp_path) == 8


@pytest.fixture
def runs(finished, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(finished.workdir, copy)
  return copy, torture.contents(finished.workdir)


def test_a_copy_of_a_run_is_equal(runs):
  copy, reference = runs
  assert {8, 16} <= reference.keys()
  assert torture.differences(torture.contents(copy), reference) == []


def change_a_metric(run):
  path = run / "metrics.jsonl"
  lines = path.read_text("utf-8").splitlines()
  path.write_text("\n".join([*lines, lines[-1]]), "utf-8")


def change_a_score(run):
  with np.load(run / "scores.npz") as found:
    arrays = dict(found)
  confidence = arrays["test_confidence"]
  confidence[0, 0] = np.nextafter(confidence[0, 0], 0)
  np.savez(run / "scores.npz", **arrays)


@pytest.mark.parametrize(
  "change, names",
  [
    (change_a_metric, ["metrics.jsonl"]),
    (change_a_score, ["scores.npz"]),
    (lambda run: (run / "left.tmp").touch(), ["files"]),
    (
      lambda run: (run / "checkpoints/9.orbax-checkpoint-tmp").mkdir(),
      ["9.orbax-checkpoint-tmp"],
    ),
    (lambda run: shutil.rmtree(run / "checkpoints/8"), []),
    (lambda run: shutil.rmtree(run / "checkpoints/16"), [16]),
    (
      lambda run: (
        shutil.rmtree(run / "checkpoints/16"),
        shutil.copytree(run / "checkpoints/8", run / "checkpoints/16"),
      ),
      [16],
    ),
  ],
)
def test_what_differs_is_named(runs, change, names):
  copy, reference = runs
  change(copy)
  assert torture.differences(torture.contents(copy), reference) == names
