"""Exported stages, run by the loader with JAX alone."""

import functools
import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_main

from l2w_jax.data import sources
from l2w_jax.exits import early_exit, export, onnx_models

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
  np.testing.assert_array_equal(rows[:, 1], answers.exit)
  np.testing.assert_allclose(rows[:, 2], answers.confidence, rtol=1e-5)
  assert set(answers.exit) == {1, 2}


def test_the_loader_is_short_and_needs_jax_alone():
  source = LOADER.read_text()
  assert len(list(filter(str.strip, source.splitlines()))) <= 59
  assert "l2w_jax" not in source


def test_padding_changes_no_answer_and_bounds_compilation(workdir, tiny_config):
  loader = runpy.run_path(str(LOADER))
  manifest, stages = loader["load"](workdir / "export")
  images = np.tile(sources.load(tiny_config.data).test.images, (2, 1, 1, 1))[:300]
  at_once = loader["predict"](manifest, stages, images)
  parts = [
    loader["predict"](manifest, stages, images[start:stop])
    for start, stop in ((0, 1), (1, 6), (6, 39), (39, 102), (102, 231), (231, 300))
  ]
  parts = np.concatenate(parts)
  np.testing.assert_array_equal(at_once[:, :2], parts[:, :2])
  np.testing.assert_allclose(at_once[:, 2], parts[:, 2], rtol=1e-5)
  # 1, 8, 64, 128, 256 by the calls above; 44 of 300 make 64.
  assert stages[0]._cache_size() == 5
  assert stages[1]._cache_size() <= 9


def test_the_device_decides_in_one_program(workdir, tiny_config):
  images = sources.load(tiny_config.data).test.images[:64]
  network = early_exit.load(workdir)
  data = (workdir / "export/answer.stablehlo").read_bytes()
  answer = jax.jit(export.jax_export.deserialize(data).call)
  found = [answer(image) for image in images]
  label, exit, confidence, logits, probabilities = map(
    np.stack, zip(*found, strict=True)
  )
  answers = network.predict(images)
  np.testing.assert_array_equal(label, answers.label)
  np.testing.assert_array_equal(exit, answers.exit)
  assert set(exit) == {1, 2}
  np.testing.assert_allclose(confidence, answers.confidence, rtol=1e-5)
  np.testing.assert_allclose(probabilities, answers.probabilities(), atol=1e-6)
  singles = [network.answer(image) for image in images]
  np.testing.assert_array_equal(confidence, [one.confidence[0] for one in singles])
  np.testing.assert_array_equal(logits, [one.logits[0] for one in singles])


def test_later_stages_of_the_one_program_lie_in_branches(workdir):
  def layers(program):
    return len(
      re.findall(r"stablehlo\.(dynamic_conv|convolution|dot_general)", program)
    )

  answer, stage = (
    export.jax_export.deserialize((workdir / "export" / name).read_bytes())
    for name in ("answer.stablehlo", "stage_1.stablehlo")
  )
  # Cases of one result choose a platform; those of four are exits.
  before, *after = answer.mlir_module().split(':4 = "stablehlo.case"')
  assert len(after) == 1 and layers(after[0]) > 0
  assert layers(before) == layers(stage.mlir_module()) > 0
  # Nothing in it says on which machine it was made.
  assert 'loc("early_exit.py"' in answer.mlir_module()
  assert str(ROOT) not in answer.mlir_module()


@pytest.fixture(scope="module")
def onnx_session(workdir):
  """A function from a name of the `onnx` folder to an onnxruntime session."""
  pytest.importorskip("jax2onnx")
  runtime = pytest.importorskip("onnxruntime")
  folder = export.export(workdir, "onnx")
  options = runtime.SessionOptions()
  options.log_severity_level = 3  # constants that are left over
  return lambda name: runtime.InferenceSession(
    str(folder / name), options, providers=["CPUExecutionProvider"]
  )


def test_onnx_stages_compute_those_of_the_network(
  onnx_session, workdir, tiny_config
):
  network = early_exit.load(workdir)
  for width in (1, 5):
    arrays = [sources.load(tiny_config.data).test.images[:width]]
    state = arrays[0]
    for k in range(2):
      session = onnx_session(f"stage_{k + 1}.onnx")
      names = [x.name for x in session.get_inputs()]
      arrays = session.run(None, dict(zip(names, arrays, strict=True)))
      state = jax.jit(functools.partial(network.stage, k))(state)
      for found, expected in zip(arrays, jax.tree.leaves(state), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_onnx_answers_as_the_network_does(onnx_session, workdir, tiny_config):
  images = sources.load(tiny_config.data).test.images[:64]
  session = onnx_session("answer.onnx")
  names = [x.name for x in session.get_outputs()]
  assert names == ["label", "exit", "confidence", "logits", "probabilities"]
  rows = [session.run(None, {"image": image}) for image in images]
  found = dict(zip(names, map(np.stack, zip(*rows, strict=True)), strict=True))
  answers = early_exit.load(workdir).predict(images)
  np.testing.assert_array_equal(found["label"], answers.label)
  np.testing.assert_array_equal(found["exit"], answers.exit)
  assert set(found["exit"]) == {1, 2}
  for name, expected in (
    ("confidence", answers.confidence),
    ("logits", answers.logits),
    ("probabilities", answers.probabilities()),
  ):
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)


def test_onnx_skips_later_stages_and_has_the_manifest_of_the_others(
  onnx_session, workdir
):
  import onnx

  def layers(graph):
    return sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in graph.node)

  answer = onnx.load(workdir / "onnx/answer.onnx").graph
  stage = onnx.load(workdir / "onnx/stage_1.onnx").graph
  assert layers(answer) == layers(stage) > 0
  (choice,) = (node for node in answer.node if node.op_type == "If")
  assert sorted(layers(branch.g) > 0 for branch in choice.attribute) == [
    False,
    True,
  ]
  manifest, other = (
    json.loads((workdir / name / "manifest.json").read_text())
    for name in ("onnx", "export")
  )
  assert manifest["stages"] == ["stage_1.onnx", "stage_2.onnx"]
  with pytest.raises(
    SystemExit, match="onnx is for onnxruntime; JAX reads --format"
  ):
    runpy.run_path(str(LOADER))["read"](workdir / "onnx")
  assert manifest["thresholds"] == other["thresholds"]
  assert set(other) - set(manifest) == {"platforms", "calling_convention"}


class HandsOn(early_exit.EarlyExit):
  """Three exits whose logits are 1, 2 and 3 times (mean, 0); all hand it on."""

  def __init__(self):
    self.backbone = types.SimpleNamespace(
      num_exits=3, image_shape=(2, 2, 1), num_classes=2
    )
    self.thresholds = np.float32([30, 30, -np.inf])

  def stage(self, k, state):
    if k == 0:
      mean = state.astype(jnp.float32).mean((1, 2))
    else:
      mean = state.carry[0]
    logits = jnp.concatenate([mean, 0 * mean], 1) * (k + 1)
    label = logits.argmax(1).astype(jnp.int32)
    return early_exit.State(label, logits.max(1), logits, [mean] if k < 2 else [])


def test_onnx_of_stages_that_hand_arrays_on():
  pytest.importorskip("jax2onnx")
  runtime = pytest.importorskip("onnxruntime")
  stages = onnx_models.make_stages(HandsOn())
  names = ["label", "confidence", "logits", "carry_1"]
  assert [[x.name for x in stage.graph.output] for stage in stages] == [
    names,
    names,
    names[:3],
  ]
  session = runtime.InferenceSession(
    onnx_models.make_answer(HandsOn(), stages).SerializeToString(),
    providers=["CPUExecutionProvider"],
  )
  # 30 leaves at exit 1, 2 * 15 at exit 2, and 2 * 14 is less than 30.
  for mean, number in ((30, 1), (15, 2), (14, 3)):
    image = np.full((2, 2, 1), mean, np.uint8)
    label, exit, confidence, logits, probabilities = session.run(
      None, {"image": image}
    )
    assert (label, exit, confidence) == (0, number, number * mean)
    assert logits.tolist() == [number * mean, 0]
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)


def test_onnx_without_its_packages_is_one_line(workdir, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs jax2onnx, .*pip install .*\[onnx\]"):
    export.export(workdir, "onnx")


def test_the_manifest_holds_what_a_user_needs(workdir):
  manifest = json.loads((workdir / "export/manifest.json").read_text())
  results = json.loads((workdir / "results.json").read_text())
  assert manifest["format"] == 1
  assert manifest["thresholds"] == results["chosen"]["thresholds"]
  assert manifest["target"] == results["chosen"]["target"]
  assert manifest["results"] == results["digest"]
  assert manifest["temperatures"] == [
    row["temperature"] for row in results["temperatures"]
  ]
  for name in ("mean", "std", "macs", "confidence", "checkpoint", "num_classes"):
    assert manifest[name] == results[name]
  assert manifest["class_names"] == list("0123456789")
  assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
  assert manifest["image_shape"] == [8, 8, 1]
  assert manifest["image_dtype"] == "uint8"
  assert manifest["versions"]["jax"] == jax.__version__
  files = {file.name for file in (workdir / "export").iterdir()}
  assert set(manifest["sha256"]) == files - {"manifest.json", "SHA256SUMS"}
  assert {*manifest["stages"], manifest["answer"]} <= files
  sums = (workdir / "export/SHA256SUMS").read_text()
  assert all(f"{sha}  {name}\n" in sums for name, sha in manifest["sha256"].items())
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
  (folder / "SHA256SUMS").write_text(export.sums(folder))
  done = run_loader(folder, np.zeros((1, 8, 8, 1), np.uint8), tmp_path)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "cannot read this export of jax" in done.stderr
  assert "use that version or a newer one" in done.stderr


def change(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_what_was_not_exported_is_not_run(workdir, tmp_path):
  folder = shutil.copytree(workdir / "export", tmp_path / "export")
  listed = [
    line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()
  ]
  assert sorted([*listed, "SHA256SUMS"]) == sorted(
    file.name for file in folder.iterdir()
  )
  assert "variables.npz" in listed and "manifest.json" in listed
  read = runpy.run_path(str(LOADER))["read"]
  assert read(folder)[0]["step"] == 16
  for name in [*listed, "SHA256SUMS"]:
    whole = (folder / name).read_bytes()
    change(folder / name)
    with pytest.raises(SystemExit, match="is no whole export") as stopped:
      read(folder)
    assert "\n" not in str(stopped.value)
    (folder / name).write_bytes(whole)
  (folder / "SHA256SUMS").write_text("")
  with pytest.raises(SystemExit, match="no whole export .'manifest.json'"):
    read(folder)
  (folder / "SHA256SUMS").unlink()
  with pytest.raises(SystemExit, match="no whole export"):
    read(folder)


def test_without_an_evaluation_there_is_one_line(workdir, tmp_path):
  bare = shutil.copytree(workdir, tmp_path / "bare")
  pathlib.Path(bare / "results.json").unlink()
  for mode in ("export", "latency"):
    done = run_main(f"--mode={mode}", f"--workdir={bare}")
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert "--mode=evaluate" in done.err


@pytest.mark.parametrize(
  "images",
  [np.zeros((2, 8, 8, 1)), np.zeros((2, 9, 8, 1), np.uint8), "no array", None],
)
def test_the_loader_says_what_images_it_takes(
  workdir, tmp_path, monkeypatch, images
):
  if isinstance(images, np.ndarray):
    np.save(tmp_path / "images.npy", images)
  elif images:
    (tmp_path / "images.npy").write_text(images)
  arguments = [str(LOADER), str(workdir / "export"), str(tmp_path / "images.npy")]
  monkeypatch.setattr(sys, "argv", arguments)
  with pytest.raises(
    SystemExit, match=r"want .* uint8 \[N, \*\(8, 8, 1\)\]; "
  ) as stop:
    runpy.run_path(str(LOADER), run_name="__main__")
  assert "\n" not in str(stop.value) and "images.npy: " in str(stop.value)
