"""Exported stages, run by the loader with JAX alone."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, run_main

from l2w_jax.data import sources
from l2w_jax.exits import early_exit, export

LOADER = ROOT / "experiments/run_export.py"


@pytest.fixture(scope="module")
def workdir(finished, tmp_path_factory):
  workdir = shutil.copytree(
    finished.workdir, tmp_path_factory.mktemp("export") / "run"
  )
  export.export(workdir)
  return workdir


def run_loader(folder, images, tmp_path):
  np.save(tmp_path / "images.npy", images)
  return subprocess.run(
    [sys.executable, LOADER, folder, tmp_path / "images.npy"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )


def test_the_loader_answers_as_the_network_does(workdir, tiny_config, tmp_path):
  # Moved elsewhere, away from the run and the package.
  folder = shutil.copytree(workdir / "export", tmp_path / "moved")
  images = sources.load(tiny_config.data).test.images[:70]
  done = run_loader(folder, images, tmp_path)
  assert done.returncode == 0, done.stderr
  rows = np.array([line.split() for line in done.stdout.splitlines()], float)
  answers = early_exit.load(workdir).predict(images)
  np.testing.assert_array_equal(rows[:, 0], answers.label)
  np.testing.assert_array_equal(rows[:, 1], answers.exit + 1)
  np.testing.assert_allclose(rows[:, 2], answers.confidence, rtol=1e-5)
  assert set(answers.exit) == {0, 1}


def test_the_loader_is_short_and_needs_jax_alone():
  source = LOADER.read_text()
  assert len(list(filter(str.strip, source.splitlines()))) <= 40
  assert "l2w_jax" not in source


def test_the_manifest_holds_what_a_user_needs(workdir):
  manifest = json.loads((workdir / "export/manifest.json").read_text())
  results = json.loads((workdir / "results.json").read_text())
  assert manifest["thresholds"] == results["chosen"]["thresholds"]
  assert manifest["class_names"] == list("0123456789")
  assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
  assert manifest["image_shape"] == [8, 8, 1]
  stage = export.jax_export.deserialize(
    (workdir / "export/stage_2.stablehlo").read_bytes()
  )
  assert stage.platforms == ("cpu", "cuda", "tpu")
  assert str(stage.out_avals[0].shape[0]) == "b"
  assert not list(workdir.glob(".export*"))


def for_tpu_alone():
  """A file that this version reads and cannot run here."""
  images = [jax.ShapeDtypeStruct((1, 8, 8, 1), np.uint8)]
  return export.jax_export.export(jax.jit(lambda x: x), platforms=["tpu"])(
    images
  ).serialize()


@pytest.mark.parametrize(
  "data", [b"of the future", for_tpu_alone()], ids=["unreadable", "runs elsewhere"]
)
def test_an_export_that_jax_cannot_run_says_which_version_can(
  data, workdir, tmp_path
):
  folder = shutil.copytree(workdir / "export", tmp_path / "export")
  (folder / "stage_1.stablehlo").write_bytes(data)
  done = run_loader(folder, np.zeros((1, 8, 8, 1), np.uint8), tmp_path)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "cannot read this export of jax" in done.stderr
  assert "use that version or a newer one" in done.stderr


def test_without_an_evaluation_there_is_one_line(workdir, tmp_path):
  bare = shutil.copytree(workdir, tmp_path / "bare")
  pathlib.Path(bare / "results.json").unlink()
  for mode in ("export", "latency"):
    done = run_main(f"--mode={mode}", f"--workdir={bare}")
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert "--mode=evaluate" in done.err
