"""A damaged file of a run is one line that names it, or nothing that matters."""

from __future__ import annotations

import errno
import io
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from conftest import run_main
from test_report import make_workdir

from l2w_jax import main
from l2w_jax.exits import early_exit
from l2w_jax.results import comparison, evaluate, report
from l2w_jax.run import directory
from l2w_jax.training import identity
from l2w_jax.training import loop as train
from l2w_jax.training.metrics_log import MetricsLog

READERS = {
  "config.json": directory.read_config,
  "results.json": directory.read_results,
  "latency.json": directory.read_latency,
  "samples.npz": directory.read_samples,
  "scores.npz": directory.read_scores,
}
ADVICE = {
  "config.json": "delete it: it is restored",
  "latency.json": "--mode=latency` first",
}
ROW = dict.fromkeys(
  "macs ms ms_low ms_high images_per_second speedup speedup_low speedup_high"
  " speedup_by_macs".split(),
  1.5,
) | {"kind": "full", "point": "q = 1", "batch": 1, "calls": 9, "rounds": 3}
LATENCY = {
  **{"step": 16, "checkpoint": "a", "target": "q:1", "confidence": "margin"},
  "device": {"platform": "cpu", "kind": "cpu"},
  "rows": [ROW | {"p95_ms": None}],
}


@pytest.fixture
def workdir(finished, tmp_path):
  workdir = shutil.copytree(finished.workdir, tmp_path / "run")
  (workdir / "latency.json").write_text(json.dumps(LATENCY))
  return workdir


def refused(workdir, name: str, read=None) -> str:
  """The line that a reader ends in."""
  with pytest.raises(ValueError, match=re.escape(name)) as error:
    (read or READERS[name])(workdir)
  line = str(error.value)
  assert "\n" not in line and str(workdir / name) in line
  assert ADVICE.get(name, "--mode=evaluate` first, which writes it") in line
  return line


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_file_at_all_is_one_line(workdir, name):
  path, whole = workdir / name, (workdir / name).read_bytes()
  READERS[name](workdir)
  array = io.BytesIO()
  np.save(array, np.zeros(3))
  for data in (
    *(b"", b"\xff", b"[]", b"null", b"3", b'"x"', b"{}", b"NaN", b"\0" * 999),
    *(b"[" * 100_000, b'{"a":' * 100_000, whole[: len(whole) // 2]),
    *(whole[:100] + b"\xff" + whole[101:], array.getvalue()),
  ):
    path.write_bytes(data)
    refused(workdir, name)


@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_is_not_called_damaged(workdir, name):
  path = workdir / name
  path.unlink()
  path.mkdir()
  with pytest.raises(IsADirectoryError) as error:
    READERS[name](workdir)
  assert error.value.filename == str(path)


def test_a_disk_that_fails_is_told_with_the_path(workdir, monkeypatch):
  def fail(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
  with pytest.raises(OSError, match="Input/output") as error:
    directory.read_results(workdir)
  assert error.value.filename == str(workdir / "results.json")


def test_a_command_says_that_it_cannot_read(workdir):
  (workdir / "results.json").unlink()
  (workdir / "results.json").mkdir()
  done = run_main("--mode=report", f"--workdir={workdir}")
  assert done.code == 1 and done.err == (
    f"error: {workdir}/results.json: Is a directory; a file is wanted there; move "
    "the folder away\n"
  )


def put(values, key: str, value) -> None:
  *names, last = (int(x) if x.isdigit() else x for x in key.split("."))
  for name in names:
    values = values[name]
  if value is KeyError:
    del values[last]
  else:
    values[last] = value


WRONG = {
  "results.json": [
    ("chosen.thresholds", KeyError, "its 'chosen' lacks 'thresholds'"),
    (
      "chosen.thresholds",
      [0.5],
      "'thresholds' of its 'chosen' has not all of its 2",
    ),
    ("chosen.thresholds.0", "x", "must be a number, or inf in quotes, got 'x'"),
    ("chosen", [], "its 'chosen' must be keys, got []"),
    ("num_classes", KeyError, "it lacks 'num_classes'"),
    ("num_classes", 18, "its 'class_names' has not all of its 18 classes"),
    ("num_classes", "10", "its 'num_classes' must be a whole number from 0"),
    ("class_names", ["a"], "its 'class_names' has not all of its 10 classes"),
    ("mean", KeyError, "it lacks 'mean'"),
    ("mean", [1.0, 2.0, 3.0], "not all of its 3 channels"),
    ("mean.0", float("nan"), "an entry of its 'mean' must be a number, got nan"),
    ("std.0", 0, "an entry of its 'std' must be a number above 0, got 0"),
    ("image_shape", [8, 8], "its 'image_shape' must be height, width and channels"),
    ("image_shape", [8, 8, 3], "its 'mean' is not of the channels"),
    ("budgeted.0.macs", None, "'macs' of an entry of its 'budgeted' must be"),
    ("step", 1.5, "its 'step' must be a whole number from 0, got 1.5"),
    ("step", True, "its 'step' must be a whole number from 0, got True"),
    ("macs", 10**400, "its 'macs' must be a list"),
    ("macs.0", 10**400, "an entry of its 'macs' must be a number above 0"),
    ("complete", 1, "its 'complete' must be true or false, got 1"),
  ],
  "latency.json": [
    ("rows", [], "its 'rows' must be a list, got []"),
    ("rows.0.ms", "1", "'ms' of an entry of its 'rows' must be a number"),
    ("rows.0.call", "x", "'call' of an entry of its 'rows' must be a whole number"),
    ("device", "cpu", "its 'device' must be keys, got 'cpu'"),
  ],
  "config.json": [
    ("seed", "x", "config.seed must be"),
    ("seed", KeyError, "config.seed is missing"),
    ("sede", 1, "config.sede does not exist; did you mean config.seed"),
    ("model", [], "config.model"),
    ("model.name", {}, "unknown model"),
  ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named(workdir, name):
  whole = (workdir / name).read_text()
  for key, value, says in WRONG[name]:
    values = json.loads(whole)
    put(values, key, value)
    if name == "results.json":  # as if the digest were right
      directory.write_results(workdir, values)
    else:
      (workdir / name).write_text(json.dumps(values))
    assert says in refused(workdir, name), (key, value)


ARRAYS = {
  "samples.npz": {
    ("labels", lambda x: x + 99): "'labels' holds a number that is none of 10 cla",
    ("labels", lambda x: x - 99): "'labels' holds a number that is none of 10 cla",
    ("labels", lambda x: x[1:]): "its 'labels' has not all of its 80 samples",
    (
      "labels",
      lambda x: x.astype(float),
    ): "must be [samples] of whole numbers, got",
    ("images", lambda x: x[..., 0]): "must be [samples height width channels] of",
    ("images", lambda x: x.astype(object)): "Object arrays cannot be loaded",
    ("confidence", lambda x: np.nan * x): "its 'confidence' holds NaN",
    ("q", lambda x: x[None]): "its 'q' must be [] of numbers",
  },
  "scores.npz": {
    ("test_top5", lambda x: x[:, :1]): "its 'test_top5' has not all of its 2 exits",
    (
      "test_top5",
      lambda x: x.astype(int),
    ): "must be [test_images exits] of true or false",
    (
      "calibration_confidence",
      lambda x: x[0],
    ): "must be [calibration_images exits] of numbers",
    ("test_label", lambda x: x + 1): "holds a number that is none of 10 classes",
    ("about", lambda x: np.array("{}")): "it lacks 'method'",
    ("about", lambda x: np.array("{")): "Expecting property name",
  },
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_array_is_named(workdir, name):
  with np.load(workdir / name) as file:
    whole = dict(file)
  for (key, change), says in ARRAYS[name].items():
    np.savez(workdir / name, **{**whole, key: change(whole[key])})
    assert says in refused(workdir, name), key
  del whole[next(iter(whole))]
  np.savez(workdir / name, **whole)
  assert "it lacks" in refused(workdir, name)


@pytest.mark.parametrize(
  ("name", "flips"),
  [("results.json", 300), ("samples.npz", 100), ("scores.npz", 100)],
)
def test_flipped_bits_are_refused_or_mean_the_same(workdir, name, flips):
  rng = np.random.default_rng(0)
  path, whole = workdir / name, (workdir / name).read_bytes()
  sound, found = READERS[name](workdir), 0
  for _ in range(flips):
    data = bytearray(whole)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    try:
      read = READERS[name](workdir)
    except ValueError as error:
      found += 1
      assert str(path) in str(error) and "\n" not in str(error)
    else:
      for key in sound:
        np.testing.assert_array_equal(read[key], sound[key])
  assert found > flips / 2


@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize(
  "use",
  [
    early_exit.load,
    lambda workdir: main.run("report", workdir, None),
    lambda workdir: main.run("export", workdir, None),
  ],
  ids=["load", "report", "export"],
)
def test_every_command_blames_the_right_file(workdir, name, use, compilations):
  for data in (b"\xff", b"[" * 100_000):
    (workdir / name).write_bytes(data)
    refused(workdir, name, use)
  assert not compilations()


def test_a_damaged_config_is_told_before_training(workdir, tiny_config):
  (workdir / "config.json").write_text("[]")
  refused(workdir, "config.json", lambda workdir: train.train(workdir, tiny_config))
  (workdir / "config.json").unlink()  # as is advised
  assert identity.read_config(workdir).to_dict() == tiny_config.to_dict()


BAD_LINES = {
  b"\xff": "can't decode byte 0xff",
  b'{"kind": "train", "st': "Unterminated string",
  b'{"kind": "train", "step": "a", "epoch": 1}': "its 'step' must be a whole",
  b'{"kind": "train", "step": null, "epoch": 1}': "its 'step' must be a whole",
  b'{"kind": "train", "step": 1, "epoch": 1, "train_loss": "x"}': "'train_loss'",
  b'{"kind": "trbin", "step": 1, "epoch": 1}': "its 'kind' must be one of train",
  b'{"kind": "evaluate", "step": 1, "epoch": 1, "accuracy": [1]}': "not all of its",
  b'{"kind": "weights", "step": 1, "epoch": 1, "loss_bins": [0, 1], '
  b'"mean_weight": [[1, 1], [1], [1]]}': "more than its 1 bins",
  b"[" * 100_000: "nested too deeply",
  b"null": "it must be keys, got None",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.get)
def test_a_damaged_line_of_metrics_is_left_out_with_a_note(tmp_path, caplog, line):
  path = make_workdir(tmp_path, 3) / "metrics.jsonl"
  sound = directory.read_metrics(tmp_path, 3)
  lines = path.read_bytes().split(b"\n")
  path.write_bytes(b"\n".join([*lines[:4], line, *lines[4:]]))
  assert directory.read_metrics(tmp_path, 3) == sound
  assert f"{path}: line 5 left out, as damaged (" in caplog.text
  assert BAD_LINES[line] in caplog.text
  if b'"accuracy": [1]' not in line:  # of another number of exits
    with MetricsLog(tmp_path, step=999):
      pass
    assert path.read_bytes() == b"\n".join(lines)


def test_flipped_bits_of_metrics_never_stop_a_report(tmp_path):
  rng = np.random.default_rng(0)
  path = make_workdir(tmp_path, 3) / "metrics.jsonl"
  whole, sound = path.read_bytes(), directory.read_metrics(tmp_path, 3)
  lost = []
  for _ in range(200):
    data = bytearray(whole)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    found = directory.read_metrics(tmp_path, 3)
    lost.append(sum(len(sound[kind]) - len(found[kind]) for kind in sound))
  assert set(lost) <= {0, 1, 2}  # 2: the end of a line
  data = bytearray(whole)
  for place in rng.integers(len(data), size=60):
    data[place] ^= 1 << rng.integers(8)
  path.write_bytes(data)
  assert report.write_report(tmp_path).exists()


def test_a_comparison_names_what_is_damaged(workdir, caplog):
  (workdir / "metrics.jsonl").unlink()
  assert comparison.read_run(workdir).weights == []
  assert f"{workdir / 'metrics.jsonl'} is missing" in caplog.text
  scores = directory.read_scores(workdir)
  scores["calibration_logits"] = np.zeros((0, 3, 10), np.float32)
  np.savez(workdir / "scores.npz", **scores | {"about": "{}"})
  line = refused(workdir, "scores.npz", comparison.read_run)
  assert "its 'calibration_logits' has more than its 2 exits" in line


def of_another_checkpoint(path) -> None:
  with np.load(path) as file:
    arrays = dict(file)
  if "about" in arrays:
    about = json.loads(str(arrays["about"])) | {"checkpoint": "other"}
    arrays["about"] = np.array(json.dumps(about))
  else:
    arrays["checkpoint"] = np.array("other")
  np.savez(path, **arrays)


@pytest.mark.parametrize(
  ("name", "use"),
  [
    ("scores.npz", early_exit.load),
    ("scores.npz", comparison.read_run),
    ("samples.npz", report.write_report),
  ],
)
def test_what_is_of_another_checkpoint_is_refused(workdir, name, use):
  of_another_checkpoint(workdir / name)
  assert "of another checkpoint than results.json" in refused(workdir, name, use)


def test_samples_of_early_versions_are_shown(workdir):
  with np.load(workdir / "samples.npz") as file:
    arrays = dict(file)
  assert (
    str(arrays.pop("checkpoint")) == directory.read_results(workdir)["checkpoint"]
  )
  np.savez(workdir / "samples.npz", **arrays)
  assert report.write_report(workdir).exists()


@pytest.mark.parametrize("data", ["[]", "null", "\x00", "{", "[" * 100_000])
def test_a_damaged_export_is_one_to_make_again(workdir, caplog, data):
  (workdir / "export").mkdir()
  (workdir / "export/manifest.json").write_text(data)
  evaluate._say_if_exported(workdir, directory.read_results(workdir))
  assert "run --mode=export again" in caplog.text
