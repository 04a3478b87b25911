"""Scores of a trained network, and what results.json says of them.

Every sample of a split is scored exactly once, whatever the batch size and the
number of devices: the last batch is padded and its padding dropped. Thresholds
come from the calibration split (without one, as released, from the train split)
and are applied to the test split.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from l2w_jax import models
from l2w_jax.data import sources
from l2w_jax.exits import policy as exit_policy
from l2w_jax.exits import targets as exit_targets
from l2w_jax.results import summary
from l2w_jax.run import backend, directory, files, parallel
from l2w_jax.run.progress import Progress
from l2w_jax.training import checkpoint, diagnostics, identity
from l2w_jax.training import scores as scores_lib
from l2w_jax.training.scores import Scores
from l2w_jax.training.state import init_wpn, split_seed

SAMPLES_AT_Q = 15 / 20  # budget at which sample pictures are shown
SPLITS = "calibration", "test"


def evaluate(workdir: str | os.PathLike, config: ConfigDict) -> dict[str, Any]:
  """Scores the latest checkpoint; writes results.json and what it follows from.

  scores.npz keeps the scores of both splits: where nothing but the target is new,
  they are read, and no network runs. samples.npz holds the pictures of the report;
  curves.csv and confusion.csv are for other programs.

  Returns:
    what results.json holds, to the process that writes it.

  Raises:
    ValueError: no checkpoint in the workdir, NaN logits, or a target that no
      thresholds reach.
  """
  workdir, began = files.path(workdir), time.monotonic()
  exit_targets.parse(config.evaluate.target)
  kept = _kept(workdir, config) if parallel.is_writer() else None
  if parallel.from_writer(kept is None):
    kept = _score(workdir, config)
  if not parallel.is_writer():
    return {}
  assert kept is not None
  about = kept["about"]
  calibration, test = (_scores(kept, split) for split in SPLITS)
  exit_targets.check(config.evaluate.target, about["samples"]["calibration"] > 0)
  results = about | summary.summarize(
    calibration,
    test,
    np.asarray(about["macs"]),
    about["class_names"],
    config.evaluate.target,
    about["calibration"],
    about["confidence"],
  )
  results |= _diagnosed(workdir, config, about)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trained = checkpoints.info()
  assert trained is not None  # it was scored
  results["seconds"] = trained["seconds"] | {"evaluate": time.monotonic() - began}
  _write_table(workdir / "curves.csv", summary.rows(results))
  _write_table(
    workdir / "confusion.csv",
    summary.confusion_rows(test, results["chosen"], about["class_names"]),
  )
  results["config"] = identity.remember(workdir, config)
  directory.write_results(workdir, results)
  _say_if_exported(workdir, results)
  return results


def _diagnosed(
  workdir: files.Path, config: ConfigDict, about: dict[str, Any]
) -> dict[str, Any]:
  """What metrics.jsonl says of meta-gradient and weights up to the step scored."""
  if not (workdir / "metrics.jsonl").exists():
    return {}
  metrics = directory.read_metrics(workdir, len(about["macs"]))
  lines, weights = (
    [line for line in metrics[kind] if line["step"] <= about["step"]]
    for kind in ("diagnose", "weights")
  )
  weights = [
    line
    for line in weights
    if {"count", "std_weight"} <= line.keys() and all(map(any, line["count"]))
  ]
  found = {}
  if config.diagnose.every and lines:
    found["diagnostics"] = diagnostics.summarize(lines)
  if weights:
    found["weights"] = diagnostics.learned(weights[-1])
  return found


def _scores(kept: dict[str, Any], split: str) -> Scores:
  return Scores(*(kept[f"{split}_{name}"] for name in Scores._fields))


def _kept(workdir: files.Path, config: ConfigDict) -> dict[str, Any] | None:
  """What scores.npz holds, if all that `config` changes is the target."""
  if not (workdir / "config.json").exists():
    return None
  identity.check_config(workdir, config)
  try:
    kept, results = directory.read_scores(workdir), directory.read_results(workdir)
  except ValueError:
    return None
  with checkpoint.Checkpoints(workdir) as checkpoints:
    info = checkpoints.info() or {}
  about, rules = kept["about"], config.evaluate
  same = (
    about["checkpoint"] == results["checkpoint"] == info.get("checkpoint")
    and (about["calibration"], about["confidence"])
    == (rules.calibration, rules.confidence)
    and directory.read_config(workdir).data == config.data
  )
  return kept if same and rules.target != results["chosen"]["target"] else None


def _score(workdir: files.Path, config: ConfigDict) -> dict[str, Any]:
  """Scores both splits; writes scores.npz and samples.npz, and returns the first.

  "about" in it is what results.json says of the network and the images, the same
  for every target.
  """
  dataset, _ = identity.open_data(workdir, config)
  exit_targets.check(config.evaluate.target, len(dataset.calibration.labels) > 0)
  num_devices = parallel.count_devices(config.num_devices)
  backbone = models.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )
  state, info = checkpoint.restore(workdir, config, backbone)
  variables = parallel.replicate(state.variables, num_devices)
  # A run that trained on everything chooses thresholds there, as released.
  chosen_on = (
    dataset.calibration if len(dataset.calibration.labels) else dataset.train
  )
  total = len(chosen_on.labels) + len(dataset.test.labels)
  with Progress(
    total, unit="image", label="evaluate", silent=not parallel.is_writer()
  ) as progress:
    progress.note(backend.describe(num_devices))
    with progress.compiling("the evaluation"):
      score = scores_lib.compile_scorer(
        variables, backbone, dataset, config, num_devices
      )
    calibration = score(variables, chosen_on)
    progress.update(len(chosen_on.labels), {})
    test = score(variables, dataset.test)
    progress.update(total, {})
  about = {
    "method": config.method,
    "dataset": config.data.source,
    "num_classes": dataset.num_classes,
    "image_shape": list(dataset.image_shape),
    "class_names": list(dataset.class_names),
    "mean": np.asarray(dataset.mean, float).tolist(),
    "std": np.asarray(dataset.std, float).tolist(),
    "samples": {
      name: len(getattr(dataset, name).labels)
      for name in ("train", "calibration", "test")
    },
    "params": int(backbone.params_to_exit[-1]),
    "params_to_exit": backbone.params_to_exit.tolist(),
    "macs": backbone.macs.tolist(),
    "confidence": config.evaluate.confidence,
    "calibration": config.evaluate.calibration,
    "temperatures": summary.temperatures(calibration, test),
    "step": int(state.step),
    "epochs": config.epochs,
    "device": {
      "platform": jax.default_backend(),
      "kind": jax.local_devices()[0].device_kind,
      "count": num_devices,
    },
    "versions": {
      name: _version(name)
      for name in ("l2w_jax", "jax", "flax", "optax", "orbax-checkpoint")
    },
    "complete": bool(info["complete"]),
    "checkpoint": info["checkpoint"],
  }
  arrays = {
    f"{split}_{name}": array
    for split, scores in zip(SPLITS, (calibration, test), strict=True)
    for name, array in scores._asdict().items()
  }
  learns = config.method == "l2w"
  if learns and parallel.is_writer() and identity.draws_alike(workdir):
    start = init_wpn(split_seed(config.seed).init, config, backbone.num_exits)
    about["wpn_distance"] = diagnostics.relative_error(state.wpn_params, start)
  if parallel.is_writer():
    _write_samples(
      workdir, dataset, calibration, test, backbone.macs, config, info["checkpoint"]
    )
    files.write_arrays(workdir / "scores.npz", about=json.dumps(about), **arrays)
  return {"about": about, **arrays}


def _write_table(path: files.Path, rows: Iterable[list[Any]]) -> None:
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(rows)
  files.write(path, text.getvalue())


def _say_if_exported(workdir: files.Path, results: dict[str, Any]) -> None:
  """Warns that an export is of other weights or thresholds than the results."""
  for folder in (workdir / "export", workdir / "onnx"):
    exported = directory.read_manifest(folder)
    if exported is not None and (
      exported.get("checkpoint"),
      exported.get("thresholds"),
    ) != (results["checkpoint"], results["chosen"]["thresholds"]):
      logging.warning(
        "%s is of an earlier evaluation; run --mode=export again", folder
      )


def say_if_reported(workdir: files.Path) -> None:
  """Warns that the page of a run is of an earlier evaluation."""
  page = workdir / directory.REPORT
  if page.exists() and not directory.is_reported(
    workdir, directory.read_results(workdir)
  ):
    logging.warning(
      "%s is of an earlier evaluation; draw it again with --mode=report", page
    )


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:  # run from a checkout
    return "not installed"


def _write_samples(
  workdir: files.Path,
  dataset: sources.Dataset,
  calibration: Scores,
  test: Scores,
  macs: np.ndarray,
  config: ConfigDict,
  checkpoint: str,
) -> None:
  """samples.npz: test images with the exit each takes at one budget."""
  thresholds = exit_targets.for_budgets(
    calibration.confidence,
    [SAMPLES_AT_Q],
    macs,
    config.evaluate.calibration,
    config.evaluate.confidence,
  )[0]
  exits = np.asarray(exit_policy.exits_taken(test.confidence, thresholds))
  shown = np.concatenate(
    [np.flatnonzero(exits == k)[:40] for k in range(len(thresholds))]
  )
  at_exit = (shown, exits[shown])
  files.write_arrays(
    workdir / "samples.npz",
    images=dataset.test.images[shown],
    labels=dataset.test.labels[shown],
    exits=exits[shown],
    predictions=test.prediction[at_exit],
    confidence=test.confidence[at_exit],
    q=SAMPLES_AT_Q,
    class_names=np.array(dataset.class_names),
    checkpoint=checkpoint,
  )
