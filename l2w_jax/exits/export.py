"""Stages as StableHLO files that JAX alone runs, with all they need beside them.

    export/manifest.json        thresholds, class names, image shape, versions
    export/stage_1.stablehlo …  one serialised `jax.export` function per exit
    export/variables.npz, config.json   the weights again, as arrays, and the
                                network they belong to, for other converters

Stage k is a function of a list of arrays: uint8 images [B H W channels] for the
first, what the stage before returned from its third result on for the others. It
returns [label, confidence, …]. The batch size B is free, the weights are inside,
and a file runs on cpu, cuda and tpu. `experiments/run_export.py` is a loader.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import jax
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from l2w_jax.exits import early_exit
from l2w_jax.run import directory

PLATFORMS = ("cpu", "cuda", "tpu")


def export(workdir: pathlib.Path) -> pathlib.Path:
  """Writes the `export` folder of an evaluated run; returns it.

  Raises:
    ValueError: the run is not trained, or not evaluated since.
  """
  network = early_exit.load(workdir)
  results = directory.read_results(workdir)
  partial = workdir / f".export.{os.getpid()}"
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  stages = export_stages(network)
  files = []
  for k, stage in enumerate(stages, 1):
    files.append(f"stage_{k}.stablehlo")
    (partial / files[-1]).write_bytes(stage.serialize())
  manifest = {
    "stages": files,
    "thresholds": results["chosen"]["thresholds"],
    "target": results["chosen"]["target"],
    "confidence": network.measure,
    "class_names": list(network.class_names),
    "image_shape": list(network.backbone.image_shape),
    "macs": network.backbone.macs.tolist(),
    "platforms": list(PLATFORMS),
    "jax": jax.__version__,
    "calling_convention": stages[0].calling_convention_version,
    "step": results["step"],
  }
  (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
  np.savez(
    partial / "variables.npz",
    **traverse_util.flatten_dict(network.variables, sep="/"),
  )
  directory.write_config(partial, directory.read_config(workdir))
  folder = workdir / "export"
  shutil.rmtree(folder, ignore_errors=True)
  os.replace(partial, folder)
  return folder


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
        k,
        arrays[0] if k == 0 else early_exit.State(arrays[2:], arrays[0], arrays[1]),
      )
      return [state.label, state.confidence, *state.carry]

    exported = jax_export.export(jax.jit(stage), platforms=PLATFORMS)(arguments)
    stages.append(exported)
    arguments = [
      jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.out_avals
    ]
  return stages
