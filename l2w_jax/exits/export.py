"""A trained network as files that JAX alone runs, or as ONNX.

    export/manifest.json        all that a user needs to know, digests included
    export/stage_1.stablehlo …  one serialised `jax.export` function per exit
    export/answer.stablehlo     one image; the device decides where it leaves
    export/variables.npz, config.json   the weights again, as arrays, and the
                                network they belong to, for other converters
    export/SHA256SUMS           of all of these; `sha256sum -c SHA256SUMS` checks

Stage k is a function of a list of arrays: uint8 images [B H W channels] for the
first, all that the stage before returned for the others. It returns [label,
confidence, logits, …]. The batch size B is free. `answer` takes
one uint8 image [H W channels] and returns [label, exit from 1, confidence,
logits [C], probabilities [C]]; a later stage runs only if the image goes on to it.
The weights are inside, and a file runs on cpu, cuda and tpu.
`experiments/run_export.py` is a loader. The folder `onnx` holds the same as ONNX,
see `onnx_models`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import export as jax_export

import l2w_jax
from l2w_jax.exits import early_exit, onnx_models
from l2w_jax.run import directory, files
from l2w_jax.training import identity

PLATFORMS = ("cpu", "cuda", "tpu")
FOLDERS = {"stablehlo": "export", "onnx": "onnx"}  # by format
FORMAT = 1  # of the manifest; counts what breaks its readers


def export(workdir: files.Path, format: str = "stablehlo") -> files.Path:
  """Writes the `export` or `onnx` folder of an evaluated run; returns it.

  Args:
    workdir: the run.
    format: one of `FOLDERS`.

  Raises:
    ValueError: the run is not trained, or not evaluated since, or jax2onnx is
      needed and not installed.
  """
  if format == "onnx":
    onnx_models.check()
  network = early_exit.load(workdir)
  results = directory.read_results(workdir)
  if format == "onnx":
    programs = onnx_models.make_stages(network)
    programs.append(onnx_models.make_answer(network, programs))
    data = [program.SerializeToString() for program in programs]
    needs = {"opset": onnx_models.OPSET}
  else:
    with _names_of_source_files():
      programs = [*export_stages(network), export_answer(network)]
    data = [program.serialize() for program in programs]
    needs = {
      "platforms": list(PLATFORMS),
      "calling_convention": programs[0].calling_convention_version,
    }
  stages = [f"stage_{k}.{format}" for k in range(1, len(programs))]
  answer = f"answer.{format}"
  with files.new_folder(workdir / FOLDERS[format]) as folder:
    for name, program in zip([*stages, answer], data, strict=True):
      (folder / name).write_bytes(program)
    np.savez(
      folder / "variables.npz",
      **traverse_util.flatten_dict(network.variables, sep="/"),
    )
    directory.write_config(folder, identity.read_config(workdir))
    manifest = {
      "format": FORMAT,
      "stages": stages,
      "answer": answer,
      **_description(network, results),
      **needs,
      "sha256": digests(folder),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (folder / "SHA256SUMS").write_text(sums(folder))
  return workdir / FOLDERS[format]


@contextlib.contextmanager
def _names_of_source_files() -> Generator[None, None, None]:
  """Programs name the source files they come from without their folders."""
  name = "jax_hlo_source_file_canonicalization_regex"
  before = jax.config.jax_hlo_source_file_canonicalization_regex  # ty: ignore[missing-attribute]
  jax.config.update(name, ".*/")
  try:
    yield
  finally:
    jax.config.update(name, before)


def _description(network, results) -> dict[str, Any]:
  """What the manifest says of the network, its thresholds and its run."""
  return {
    "image_shape": list(network.backbone.image_shape),
    "image_dtype": "uint8",
    "mean": results["mean"],
    "std": results["std"],
    "num_classes": network.backbone.num_classes,
    "class_names": list(network.class_names),
    "confidence": network.measure,
    "thresholds": results["chosen"]["thresholds"],
    "target": results["chosen"]["target"],
    "temperatures": [row["temperature"] for row in results["temperatures"]],
    "macs": network.backbone.macs.tolist(),
    "step": results["step"],
    "checkpoint": results["checkpoint"],
    "results": results["digest"],
    "versions": {"l2w_jax": l2w_jax.__version__, "jax": jax.__version__},
  }


def digests(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file but SHA256SUMS, by name."""
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.iterdir())
    if file.name != "SHA256SUMS"
  }


def sums(folder: pathlib.Path) -> str:
  """What SHA256SUMS holds: a digest and a name of every other file."""
  return "".join(f"{digest}  {name}\n" for name, digest in digests(folder).items())


def export_stages(network: early_exit.EarlyExit) -> list[jax_export.Exported]:
  """One function of a list of arrays per stage, with a symbolic batch size."""
  (batch,) = jax_export.symbolic_shape("b")
  arguments = [
    jax.ShapeDtypeStruct((batch, *network.backbone.image_shape), np.uint8)
  ]
  stages = []
  for k in range(network.backbone.num_exits):

    def stage(arrays, k=k):
      state = network.stage(
        k, arrays[0] if k == 0 else early_exit.State(*arrays[:3], arrays[3:])
      )
      return [*state[:3], *state.carry]

    exported = jax_export.export(jax.jit(stage), platforms=PLATFORMS)(arguments)
    stages.append(exported)
    arguments = [
      jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.out_avals
    ]
  return stages


def export_answer(network: early_exit.EarlyExit) -> jax_export.Exported:
  """One function of one image, with `network.thresholds` inside."""

  def answer(image):
    label, exit, confidence, logits = (
      x[0] for x in network.decide(image[None], network.thresholds)
    )
    return [label, exit + 1, confidence, logits, jax.nn.softmax(logits)]

  image = jax.ShapeDtypeStruct(network.backbone.image_shape, np.uint8)
  return jax_export.export(jax.jit(answer), platforms=PLATFORMS)(image)
