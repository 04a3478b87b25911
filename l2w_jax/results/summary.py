"""What results.json says of a network's answers, computed from scores alone.

    summarize(calibration, test, macs, class_names, target) -> dict

A new target needs no network: `scores.npz` keeps the scores. Thresholds are
chosen on the calibration split and applied to the test split. Shapes: N samples of
a split, K exits, C classes; accuracy is a fraction, cost in multiply-accumulates
(MACs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2w_jax.exits import policy as exit_policy
from l2w_jax.exits import targets as exit_targets
from l2w_jax.exits import temperature
from l2w_jax.training.scores import Scores

TOP_FROM = 11  # classes from which on the five likeliest are worth a curve
MOST_CONFUSED = 20  # pairs of classes that are listed


def summarize(
  calibration: Scores,
  test: Scores,
  macs: np.ndarray,
  class_names: Sequence[str],
  target: str,
  search: str = "held_out",
  measure: str = "probability",
) -> dict[str, Any]:
  """The "anytime", "budgeted" and "chosen" entries of results.json.

  Args:
    calibration, test: scores of the two splits.
    macs: [K] cost up to each exit.
    class_names: C names.
    target: of the chosen point, see `targets.parse`.
    search, measure: as `calibration` and `measure` of `targets.choose`.

  Raises:
    ValueError: no thresholds reach the target, or it is none.
  """
  return {
    **curves(calibration, test, macs, search, measure),
    "chosen": {
      "target": target,
      **operating_point(
        calibration, test, macs, class_names, target, search, measure
      ),
    },
  }


def curves(
  calibration: Scores,
  test: Scores,
  macs: np.ndarray,
  search: str = "held_out",
  measure: str = "probability",
) -> dict[str, list[dict[str, Any]]]:
  """The "anytime" and "budgeted" lists of results.json, see `summarize`.

  A row of "budgeted" has its "q", or for the measure patience its "patience";
  from 11 classes on all rows have the top-5 accuracy of the test split, too.
  """
  names = "accuracy", "calibration_accuracy", "top5_accuracy"
  tables = [test.correct, calibration.correct]
  if _has_top5(test):
    tables.append(test.top5)
  at_exit = [exit_policy.anytime(table, macs).tolist() for table in tables]
  anytime = [
    {
      "exit": k + 1,
      "macs": float(macs[k]),
      **{name: x[k] for name, x in zip(names, at_exit, strict=False)},
    }
    for k in range(len(macs))
  ]
  point, values, thresholds = exit_targets.curve(
    calibration.confidence, search, measure
  )

  def score(scores, correct):
    at = exit_policy.budgeted(scores.confidence, correct, macs, thresholds)
    return jax.device_get(at)

  budgeted = score(test, test.correct)
  on_calibration = score(calibration, calibration.correct)
  top5 = score(test, test.top5).accuracy if _has_top5(test) else None
  return {
    "anytime": anytime,
    "budgeted": [
      {
        point: value,
        "thresholds": [_json_number(t) for t in thresholds[i]],
        "calibration_accuracy": float(on_calibration.accuracy[i]),
        "calibration_macs": float(on_calibration.macs[i]),
        "accuracy": float(budgeted.accuracy[i]),
        "macs": float(budgeted.macs[i]),
        "exits": budgeted.exits[i].tolist(),
      }
      | ({} if top5 is None else {"top5_accuracy": float(top5[i])})
      for i, value in enumerate(values)
    ],
  }


def operating_point(
  calibration: Scores,
  test: Scores,
  macs: np.ndarray,
  class_names: Sequence[str],
  target: str,
  search: str = "held_out",
  measure: str = "probability",
) -> dict[str, Any]:
  """The "chosen" entry of results.json: one target, by exit and by class.

  Args:
    calibration, test, macs, class_names, target, search, measure: see
      `summarize`.

  Raises:
    ValueError: see `summarize`.
  """
  choice = exit_targets.choose(
    exit_targets.parse(target),
    calibration.confidence,
    calibration.correct,
    macs,
    search,
    measure,
  )
  at = test.confidence, test.correct
  result = exit_policy.budgeted(*at, macs, choice.thresholds)
  table = exit_policy.breakdown(
    *at, test.label, choice.thresholds, len(class_names)
  )
  by_class = zip(
    class_names,
    table.class_accuracy,
    table.class_macs(macs),
    table.left,
    strict=True,
  )
  found = {
    "note": choice.note,
    "thresholds": [_json_number(t) for t in choice.thresholds],
    "calibration_accuracy": choice.accuracy,
    "calibration_macs": choice.macs,
    "accuracy": float(result.accuracy),
    "macs": float(result.macs),
    "exits": result.exits.tolist(),
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
    "confused": [
      {"class": class_names[c], "as": class_names[d], "images": count}
      for c, d, count in _most_confused(confusion(test, choice.thresholds))
    ],
  }
  if _has_top5(test):
    top5 = exit_policy.budgeted(test.confidence, test.top5, macs, choice.thresholds)
    found["top5_accuracy"] = float(top5.accuracy)
  return found


def confusion(test: Scores, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
  """[C C] images of each class (rows) answered as each class, with early exits.

  Args:
    test: scores; C is that of its logits.
    thresholds: [K].
  """
  taken = np.asarray(exit_policy.exits_taken(test.confidence, thresholds))
  answered = test.prediction[np.arange(len(taken)), taken]
  table = np.zeros((test.logits.shape[-1],) * 2, int)
  np.add.at(table, (test.label, answered), 1)
  return table


def confusion_rows(
  test: Scores, chosen: dict[str, Any], class_names: Sequence[str]
) -> list[list[Any]]:
  """Rows of confusion.csv: `confusion` at the chosen point, with names."""
  table = confusion(test, np.array(chosen["thresholds"], np.float32))
  return [
    ["class \\ answer", *class_names],
    *([name, *row] for name, row in zip(class_names, table.tolist(), strict=True)),
  ]


def rows(results: dict[str, Any]) -> list[list[Any]]:
  """Rows of curves.csv: every point of results.json, one for each curve's point.

  Cost is in MACs and as a fraction of the full network's.
  """
  full, num_exits = results["macs"][-1], len(results["macs"])
  at = "exit", "q", "patience", "target"
  measured = (
    "macs",
    "accuracy",
    "top5_accuracy",
    "calibration_macs",
    "calibration_accuracy",
  )
  found = [
    ["curve", *at, "cost", *measured]
    + [f"leaving_{k + 1}" for k in range(num_exits)]
  ]
  for curve, points in (
    ("anytime", results["anytime"]),
    ("budgeted", results["budgeted"]),
    ("chosen", [results["chosen"]]),
  ):
    for point in points:
      found.append(
        [curve, *(point.get(name, "") for name in at), point["macs"] / full]
        + [point.get(name, "") for name in measured]
        + list(point.get("exits", [""] * num_exits))
      )
  return found


def temperatures(calibration: Scores, test: Scores) -> list[dict[str, Any]]:
  """The "temperatures" list of results.json, one entry per exit.

  Fitted on the calibration split; the errors are those of the test split. Both
  on their first `LOGITS_KEPT` samples. "ece_calibrated" and "…_high" are what a
  network calibrated perfectly would show, see `temperature.error_if_calibrated`;
  None below 1,000 samples, where an error says next to nothing.
  """
  fitted = temperature.fit(
    calibration.logits, calibration.label[: len(calibration.logits)]
  )
  correct = test.correct[: len(test.logits)]
  raw, scaled = (
    np.asarray(temperature.scaled_confidence(test.logits, t))
    for t in (jnp.ones_like(fitted), fitted)
  )
  before, after = (temperature.calibration_error(x, correct) for x in (raw, scaled))
  if len(correct) < temperature.ENOUGH:
    expected = high = [None] * len(fitted)
  else:
    expected, high = (x.tolist() for x in temperature.error_if_calibrated(scaled))
  return [
    {
      "exit": k + 1,
      "temperature": float(t),
      "ece": float(before[k]),
      "ece_scaled": float(after[k]),
      "ece_calibrated": expected[k],
      "ece_calibrated_high": high[k],
      "samples": len(correct),
      "reliability": temperature.reliability(raw[:, k], correct[:, k]),
    }
    for k, t in enumerate(fitted)
  ]


def _has_top5(scores: Scores) -> bool:
  return scores.logits.shape[-1] >= TOP_FROM


def _most_confused(table: np.ndarray) -> list[tuple[int, int, int]]:
  """(class, answer, images) of the commonest mistakes, the commonest first."""
  wrong = table * (1 - np.eye(len(table), dtype=int))
  order = np.argsort(-wrong, None, kind="stable")[:MOST_CONFUSED]
  pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
  return [(int(c), int(d), int(wrong[c, d])) for c, d in pairs if wrong[c, d]]


def _or_none(x) -> float | None:
  """NaN, which JSON has not, is null: there was no sample."""
  return None if math.isnan(x) else float(x)


def _json_number(x) -> float | str:
  """JSON has no infinities; they are written as the strings "inf", "-inf"."""
  x = float(x)
  return x if math.isfinite(x) else str(x)
