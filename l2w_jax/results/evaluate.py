"""Curves of a trained network: anytime and budgeted, with held-out thresholds.

Every sample of a split is scored exactly once, whatever the batch size and the
number of devices: the last batch is padded and its padding dropped. Thresholds
come from the calibration split (without one, as released, from the train split)
and are applied to the test split.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from l2w_jax import models
from l2w_jax.data import sources
from l2w_jax.exits import policy as exit_policy
from l2w_jax.exits import targets as exit_targets
from l2w_jax.exits import temperature
from l2w_jax.run import directory, files, parallel
from l2w_jax.run.progress import Progress
from l2w_jax.training import checkpoint, diagnostics
from l2w_jax.training import scores as scores_lib
from l2w_jax.training.scores import Scores

QS = tuple(i / 20 for i in range(1, 40))  # the paper's 39 budgets
SAMPLES_AT_Q = 15 / 20  # budget at which sample pictures are shown


def evaluate(workdir: pathlib.Path, config: ConfigDict) -> dict[str, Any]:
  """Scores the latest checkpoint; writes results.json and two .npz files.

  samples.npz holds the pictures of the report; scores.npz the confidence
  (float32 [N K]) and correctness (bool [N K]) of the test split.

  Returns:
    what results.json holds.

  Raises:
    ValueError: no checkpoint in the workdir, NaN logits, or a target that no
      thresholds reach.
  """
  began = time.monotonic()
  target = exit_targets.parse(config.evaluate.target)
  diagnoses = (
    directory.read_metrics(workdir)["diagnose"]
    if config.diagnose.every and parallel.is_writer()
    else []
  )
  dataset = sources.load(config.data)
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
  num_calibration = len(chosen_on.labels)
  total = num_calibration + len(dataset.test.labels)
  with Progress(
    total, unit="image", label="evaluate", silent=not parallel.is_writer()
  ) as progress:
    with progress.compiling("the evaluation"):
      score = scores_lib.compile_scorer(
        variables, backbone, dataset, config, num_devices
      )
    calibration = score(variables, chosen_on)
    progress.update(num_calibration, {})
    test = score(variables, dataset.test)
    progress.update(total, {})
  thresholds = exit_policy.find_thresholds(
    calibration.confidence,
    exit_policy.proportions(QS, backbone.num_exits),
    calibration=config.evaluate.calibration,
  )
  results = {
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
    **curves(calibration, test, backbone.macs, thresholds),
    "confidence": config.evaluate.confidence,
    "chosen": {
      "target": config.evaluate.target,
      **operating_point(
        target,
        calibration,
        test,
        dataset,
        backbone.macs,
        config.evaluate.calibration,
      ),
    },
    "temperatures": temperatures(calibration, chosen_on.labels, test),
    "step": int(state.step),
    "epochs": config.epochs,
    "seconds": {**info["seconds"], "evaluate": time.monotonic() - began},
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
  }
  if parallel.is_writer():
    if diagnoses:
      results["diagnostics"] = diagnostics.summarize(diagnoses)
    _write_samples(workdir, dataset, test, thresholds)
    files.write_arrays(
      workdir / "scores.npz", confidence=test.confidence, correct=test.correct
    )
    files.write(workdir / "results.json", json.dumps(results, indent=2) + "\n")
  return results


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:  # run from a checkout
    return "not installed"


def curves(
  calibration: Scores, test: Scores, macs: np.ndarray, thresholds: jax.Array
) -> dict[str, list[dict[str, Any]]]:
  """The "anytime" and "budgeted" lists of results.json.

  Args:
    calibration, test: scores of the two splits.
    macs: [K] multiply-accumulates to each exit.
    thresholds: [Q K], one row per entry of `QS`.
  """
  anytime = exit_policy.anytime(test.correct, macs)
  anytime_calibration = exit_policy.anytime(calibration.correct, macs)
  budgeted = exit_policy.budgeted(test.confidence, test.correct, macs, thresholds)
  budgeted_calibration = exit_policy.budgeted(
    calibration.confidence, calibration.correct, macs, thresholds
  )
  return {
    "anytime": [
      {
        "exit": k + 1,
        "macs": float(macs[k]),
        "accuracy": float(anytime[k]),
        "calibration_accuracy": float(anytime_calibration[k]),
      }
      for k in range(len(macs))
    ],
    "budgeted": [
      {
        "q": q,
        "thresholds": [_json_number(t) for t in thresholds[i]],
        "calibration_accuracy": float(budgeted_calibration.accuracy[i]),
        "calibration_macs": float(budgeted_calibration.macs[i]),
        "accuracy": float(budgeted.accuracy[i]),
        "macs": float(budgeted.macs[i]),
        "exits": [float(f) for f in budgeted.exits[i]],
      }
      for i, q in enumerate(QS)
    ],
  }


def operating_point(
  target: exit_targets.Target,
  calibration: Scores,
  test: Scores,
  dataset: sources.Dataset,
  macs: np.ndarray,
  search: str,
) -> dict[str, Any]:
  """The "chosen" entry of results.json: one target, by exit and by class.

  Raises:
    ValueError: no thresholds reach the target.
  """
  choice = exit_targets.choose(
    target, calibration.confidence, calibration.correct, macs, search
  )
  result = exit_policy.budgeted(
    test.confidence, test.correct, macs, choice.thresholds
  )
  table = exit_policy.breakdown(
    test.confidence,
    test.correct,
    dataset.test.labels,
    choice.thresholds,
    dataset.num_classes,
  )
  by_class = zip(
    dataset.class_names,
    table.class_accuracy,
    table.class_macs(macs),
    table.left,
    strict=True,
  )
  return {
    "thresholds": [_json_number(t) for t in choice.thresholds],
    "calibration_accuracy": choice.accuracy,
    "calibration_macs": choice.macs,
    "accuracy": float(result.accuracy),
    "macs": float(result.macs),
    "exits": [float(f) for f in result.exits],
    "exit_accuracy": [_or_none(a) for a in table.exit_accuracy],
    "classes": [
      {
        "class": name,
        "accuracy": _or_none(accuracy),
        "macs": _or_none(cost),
        "left": left.tolist(),
      }
      for name, accuracy, cost, left in by_class
    ],
  }


def temperatures(
  calibration: Scores, calibration_labels: np.ndarray, test: Scores
) -> list[dict[str, float]]:
  """The "temperatures" list of results.json, one entry per exit.

  Fitted on the calibration split; the errors are those of the test split. Both
  on their first `LOGITS_KEPT` samples.
  """
  fitted = temperature.fit(
    calibration.logits, calibration_labels[: len(calibration.logits)]
  )
  before, after = (
    temperature.calibration_error(
      temperature.scaled_confidence(test.logits, t),
      test.correct[: len(test.logits)],
    )
    for t in (jnp.ones_like(fitted), fitted)
  )
  return [
    {
      "exit": k + 1,
      "temperature": float(t),
      "ece": float(before[k]),
      "ece_scaled": float(after[k]),
      "samples": len(test.logits),
    }
    for k, t in enumerate(fitted)
  ]


def _or_none(x) -> float | None:
  """NaN, which JSON has not, is null: there was no sample."""
  return None if math.isnan(x) else float(x)


def _json_number(x) -> float | str:
  """JSON has no infinities; they are written as the strings "inf", "-inf"."""
  x = float(x)
  return x if math.isfinite(x) else str(x)


def _write_samples(workdir, dataset, test, thresholds):
  """samples.npz: test images with the exit each takes at one budget."""
  row = thresholds[QS.index(SAMPLES_AT_Q)]
  exits = np.asarray(exit_policy.exits_taken(test.confidence, row))
  shown = np.concatenate([np.flatnonzero(exits == k)[:40] for k in range(len(row))])
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
  )
