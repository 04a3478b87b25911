"""One page of a finished run.

`write_report` reads the files of a run directory and needs neither JAX nor the
network. Accuracy is a fraction in those files and percent on the page, cost is in
MACs (multiply-accumulates), exits count from 1 on the page.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from absl import logging

from l2w_jax.results import drawing, figures, intervals, page
from l2w_jax.results.page import percent
from l2w_jax.run import directory, files

# Of an estimator in "diagnose" lines: {key: (head of its column, divisor, format)}.
ESTIMATOR_COLUMNS = {
  "cosine": ("cosine with exact", 1, ".4f"),
  "relative_error": ("relative error", 1, ".1e"),
  "flops": ("million operations", 1e6, ",.0f"),
  "temporary_bytes": ("temporary MiB", 2**20, ",.1f"),
  "ms": ("ms", 1, ",.1f"),
}
# "kind" of learned weights -> what they are called.
WEIGHTS = {
  "none": "all alike",
  "exits": "exit weights: what tells them apart is the exit",
  "both": "exit weights and sample weights",
  "samples": "sample weights: what tells them apart is the sample",
}
CONFIDENCES = {
  "probability": "largest softmax probability",
  "margin": "margin (largest less second softmax probability)",
  "entropy": "confidence (that of a low entropy)",
}
SEARCHED = 0.01, 100.0  # of temperatures, as in `exits.temperature`
MAX_CONFUSED = 8
MAX_CLASSES = 50  # in the table, the most expensive of more


def write_report(
  workdir: str | os.PathLike, figure_format: str | None = None
) -> files.Path:
  """Writes `report/index.html`, one file with its pictures; returns its path.

  Args:
    workdir: an evaluated run.
    figure_format: of `drawing.FORMATS`, to write the pictures into
      `report/figures/`, too.

  Raises:
    ValueError: an input is missing or cannot be read; it names the file and the
      mode that writes it.
  """
  workdir = files.path(workdir)
  results = directory.read_results(workdir)
  num_exits = len(results["macs"])
  metrics = directory.read_metrics(workdir, num_exits)
  samples = directory.read_samples(workdir, results)
  latency = _latency_of(workdir, results)
  drawn = {
    "curves": figures.draw_curves(results),
    "samples": figures.draw_samples(samples, num_exits),
  }
  if any(sum(entry["left"]) for entry in results["chosen"]["classes"]):
    drawn["classes"] = figures.draw_classes(results)
  if all(entry["reliability"] for entry in results["temperatures"]):
    drawn["reliability"] = figures.draw_reliability(results)
  if metrics["train"] or metrics["evaluate"]:
    drawn["training"] = figures.draw_training(metrics, num_exits)
  if metrics["weights"]:
    drawn["weights"] = figures.draw_weights(metrics["weights"])
  if metrics["diagnose"]:
    drawn["diagnostics"] = figures.draw_diagnostics(metrics["diagnose"])
  if latency:
    drawn["latency"] = figures.draw_latency(latency)
  context = _context(results, samples, metrics, latency)
  csv = workdir / "curves.csv"
  if csv.exists():
    encoded = base64.b64encode(csv.read_bytes()).decode()
    context["csv"] = f"data:text/csv;base64,{encoded}"
  html = page.render("report.html", drawn, **context)
  path = workdir / directory.REPORT
  files.make_folder(path.parent)
  files.write(path, html)
  if figure_format:
    drawing.save(path.parent / "figures", drawn, figure_format)
  return path


def _latency_of(workdir: files.Path, results: dict) -> dict | None:
  """latency.json, unless it is of another evaluation."""
  latency = directory.read_latency(workdir)
  of = results["checkpoint"], results["chosen"]["target"], results["confidence"]
  if latency and of != tuple(
    latency[x] for x in ("checkpoint", "target", "confidence")
  ):
    logging.warning(
      "latency.json in %s is of another evaluation and left out; run "
      "--mode=latency again",
      workdir,
    )
    return None
  return latency


def _context(results: dict, samples, metrics, latency) -> dict[str, Any]:
  """What the template says in words and tables."""
  chosen, lines = results["chosen"], metrics["diagnose"]
  warnings = [chosen["note"]] if chosen["note"] else []
  if not results["complete"]:
    warnings.append(f"Evaluated in mid-training, after step {results['step']:,}.")
  settings = {
    name: results[name]
    for name in ("config", "step", "seconds", "device", "versions")
  }
  seen = len([entry for entry in chosen["classes"] if sum(entry["left"])])
  return {
    "digest": results["digest"],
    "title": f"{results['dataset']}, {results['method']}",
    "sentence": sentence(results),
    "warnings": warnings,
    "confidence": CONFIDENCES.get(results["confidence"], results["confidence"]),
    "point_name": drawing.point_of(results["budgeted"][0])[0],
    "calibration_words": _calibration_words(results["samples"]),
    "data_line": _data_line(results),
    "target": figures.target_words(chosen["target"], results["macs"]),
    "has_top5": "top5_accuracy" in chosen,
    "anytime": _anytime_table(results),
    "budgeted": _budgeted_table(results),
    "csv": "",
    "chosen_line": _chosen_line(results),
    "by_exit": _by_exit(results),
    "by_class": _by_class(results),
    "classes_left_out": (
      f"; of {seen:,} classes {figures.MAX_CLASSES}, from either end"
      if seen > figures.MAX_CLASSES
      else ""
    ),
    "table_left_out": (
      f", the {MAX_CLASSES} most expensive" if seen > MAX_CLASSES else ""
    ),
    "confused": (
      ["class", "answered as", "images"],
      [
        [entry["class"], entry["as"], entry["images"]]
        for entry in chosen["confused"][:MAX_CONFUSED]
      ],
    ),
    "temperatures": _temperatures(results),
    "error_line": _error_line(results),
    "latency": latency and _latency_table(latency, results["macs"]),
    "latency_gist": latency
    and f"{latency['device']['kind']} ({latency['device']['platform']})",
    "samples_at": _samples_at(results, float(samples["q"])),
    "estimators": lines and estimators(lines),
    "evaluates": bool(metrics["evaluate"]),
    "training_gist": f"{results['step']:,} steps",
    "weights_line": _weights_line(results) if "weights" in results else "",
    "weights_table": _weights_table(results) if "weights" in results else None,
    "no_weights": (
      "Method uniform weighs every sample alike, so there are no weights to show."
      if results["method"] == "uniform"
      else "metrics.jsonl holds no line of kind weights to show."
    ),
    "settings": json.dumps(settings, indent=2, ensure_ascii=False),
  }


def _weights_line(results: dict) -> str:
  """What the latest weights tell apart, and how far Φ has come."""
  found = results["weights"]
  step = found.get("step", results["step"])
  line = (
    f"At step {step:,} these are {WEIGHTS.get(found['kind'], found['kind'])} "
    f"({100 * found['exit_share']:.0f} % of their variance lies between exits"
  )
  if "wpn_distance" in results:
    line += (
      f"; the WPN has moved by {100 * results['wpn_distance']:.0f} % of its length"
    )
  return line + ")."


def _weights_table(results: dict) -> tuple[list[str], list[list]]:
  """The latest weights, by exit."""
  found = results["weights"]
  return (
    ["exit", "mean weight", "standard deviation", "rank correlation with loss"],
    [
      [k + 1, f"{mean:.3f}", f"{std:.3f}", "–" if rank is None else f"{rank:+.2f}"]
      for k, (mean, std, rank) in enumerate(
        zip(found["mean"], found["std"], found["rank_correlation"], strict=True)
      )
    ],
  )


def sentence(results: dict) -> str:
  """The run in one sentence: cost and accuracy of the deployed point."""
  chosen, last = results["chosen"], results["anytime"][-1]
  low, high = intervals.of_accuracy(chosen["accuracy"], results["samples"]["test"])
  return (
    f"{_promise(results)}: "
    f"{100 * chosen['macs'] / last['macs']:.0f} % of the cost, accuracy "
    f"{percent(chosen['accuracy'], 1)} [{100 * low:.1f}, {100 * high:.1f}]; full "
    f"network {percent(last['accuracy'], 1)}."
  )


def _promise(results: dict) -> str:
  """The target of the deployed point, as a sentence begins."""
  target, costs = results["chosen"]["target"], results["macs"]
  kind, values = figures.target_values(target)
  if kind == "macs":
    return f"At most {figures.cost_words(values[0], costs)}"
  if kind == "accuracy":
    return (
      f"Accuracy at least {100 * values[0]:.6g} % on {_chosen_on(results)} images"
    )
  if kind == "risk":
    return (
      f"At most {100 * values[0]:.6g} points below the full network with "
      f"probability {100 * (1 - values[1]):.6g} %"
    )
  return f"At {figures.target_words(target, costs)}"


def _chosen_on(results: dict) -> str:
  """Split the thresholds come from: train, as released, if none was held out."""
  return "calibration" if results["samples"]["calibration"] else "train"


def _samples_at(results: dict, q: float) -> str:
  """The budget of the pictures in words that the page defines."""
  if drawing.point_of(results["budgeted"][0])[0] == "q":
    return f"At q = {q:g}"
  return (
    f"At the patience whose mean cost on the {_chosen_on(results)} split is "
    f"nearest to that of leaving in proportion to {q:g}, {q:g}², {q:g}³, … at "
    "exits 1, 2, 3, …"
  )


def _calibration_words(count: dict) -> str:
  if not count["calibration"]:
    return (
      "No images were held out of training: thresholds were chosen on the train "
      "split, as released, where the network is surer than it should be. Accuracy "
      "is that of the test images."
    )
  return (
    f"{count['calibration']:,} images held out of training, on which the "
    f"thresholds were chosen. Accuracy is that of {count['test']:,} test images."
  )


def _data_line(results: dict) -> str:
  count, device = results["samples"], results["device"]
  held_out = (
    f", {count['calibration']:,} calibration" if count["calibration"] else ""
  )
  return (
    f"{count['train']:,} training{held_out} and "
    f"{count['test']:,} test images; one test image is "
    f"{100 / max(count['test'], 1):.2g} points. {results['params']:,} parameters. "
    f"{results['step']:,} steps on {device['count']} × {device['kind']} "
    f"({device['platform']}) took {results['seconds']['train']:,.0f} s. One run."
  )


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
  """(head, rows) of {head of the column: cell} in each row."""
  head = list(rows[0]) if rows else []
  return head, [list(row.values()) for row in rows]


def _join(cells) -> str:
  return " · ".join(cells)


def _threshold(value: float | str | None) -> str:
  value = math.nan if value is None else float(value)
  if math.isnan(value):
    return "–"
  return f"{value:.3f}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def _cost(results: dict, macs: float | None) -> dict[str, str]:
  """Two cells: a cost in a unit that suits the run, and as part of the whole."""
  scale, unit = drawing.cost_scale(results["macs"])
  if macs is None:
    return {unit: "–", "cost": "–"}
  return {
    unit: f"{macs / scale:.3f}",
    "cost": percent(macs / results["macs"][-1], 1),
  }


def _accuracy(results: dict, entry: dict) -> dict[str, str]:
  """Cells of the accuracies that a point has."""
  found = {"test accuracy": percent(entry["accuracy"])}
  if "top5_accuracy" in entry:
    found["top-5"] = percent(entry["top5_accuracy"])
  return found | {
    f"on {_chosen_on(results)}": percent(entry["calibration_accuracy"])
  }


def _anytime_table(results: dict):
  return _table(
    [
      {"exit": entry["exit"]}
      | _cost(results, entry["macs"])
      | {"parameters to here": f"{params:,}"}
      | _accuracy(results, entry)
      for entry, params in zip(
        results["anytime"], results["params_to_exit"], strict=True
      )
    ]
  )


def _budgeted_table(results: dict):
  # Of q = 1/20, 2/20, ..., every fifth: 0.25, 0.5, ...
  entries = results["budgeted"][4::5] or results["budgeted"]
  return _table(
    [
      {drawing.point_of(entry)[0]: f"{drawing.point_of(entry)[1]:g}"}
      | _cost(results, entry["macs"])
      | _accuracy(results, entry)
      | {
        "leaving at each exit (%)": _join(
          f"{100 * share:.0f}" for share in entry["exits"]
        ),
        "thresholds": _join(map(_threshold, entry["thresholds"])),
      }
      for entry in entries
    ]
  )


def _chosen_line(results: dict) -> str:
  chosen, full = results["chosen"], results["macs"][-1]
  top5 = (
    f" (top-5 {percent(chosen['top5_accuracy'])})"
    if "top5_accuracy" in chosen
    else ""
  )
  return (
    f"Test accuracy {percent(chosen['accuracy'])}{top5} at "
    f"{percent(chosen['macs'] / full, 1)} of the cost; on the "
    f"{_chosen_on(results)} split, where the thresholds were chosen, "
    f"{percent(chosen['calibration_accuracy'])} at "
    f"{percent(chosen['calibration_macs'] / full, 1)}."
  )


def _by_exit(results: dict):
  chosen = results["chosen"]
  return _table(
    [
      {
        "exit": k,
        "leaving": percent(share, 1),
        "their accuracy": percent(accuracy),
        "threshold": _threshold(threshold),
      }
      for k, (share, accuracy, threshold) in enumerate(
        zip(
          chosen["exits"],
          chosen["exit_accuracy"],
          chosen["thresholds"],
          strict=True,
        ),
        1,
      )
    ]
  )


def _by_class(results: dict):
  classes = sorted(
    (entry for entry in results["chosen"]["classes"] if sum(entry["left"])),
    key=lambda entry: -entry["macs"],
  )
  return _table(
    [
      {"class": entry["class"], "accuracy": percent(entry["accuracy"])}
      | {"mean cost": _cost(results, entry["macs"])["cost"]}
      | {"images leaving at each exit": _join(map(str, entry["left"]))}
      for entry in classes[:MAX_CLASSES]
    ]
  )


def _temperature(value: float) -> str:
  """A temperature; one at an end of its search may be beyond it."""
  lowest, highest = SEARCHED
  if value <= 1.001 * lowest:
    return f"≤ {lowest:g}"
  return f"≥ {highest:g}" if value >= 0.999 * highest else f"{value:.2f}"


def _temperatures(results: dict):
  found = []
  for entry in results["temperatures"]:
    row = {"exit": entry["exit"], "temperature": _temperature(entry["temperature"])}
    if entry["ece_calibrated"] is not None:
      row |= {
        "calibration error": percent(entry["ece"]),
        "after scaling": percent(entry["ece_scaled"]),
        "if calibrated perfectly": percent(entry["ece_calibrated"])
        + f", up to {percent(entry['ece_calibrated_high'])}",
      }
    found.append(row)
  return _table(found)


def _error_line(results: dict) -> str:
  entry = results["temperatures"][0]
  split = _chosen_on(results)
  fitted = f"Temperatures are fitted on the {split} split and change no exit."
  if entry["ece_calibrated"] is None:
    return (
      f"{fitted} A calibration error is not shown: on {entry['samples']:,} test "
      "images even a network that is calibrated perfectly has a large one."
    )
  return (
    f"{fitted} Calibration error: mean distance of accuracy and confidence over 15 "
    f"bins of {entry['samples']:,} test images; so few images have one even where "
    "confidence is the probability of being right (last column, and 97.5 % of "
    "draws)."
  )


def _latency_table(latency: dict, costs: Sequence[float]):
  return _table(
    [
      {
        "point": figures.point_words(row, costs),
        "batch": f"{row['batch']:,}",
        "run": figures.way(row),
        "cost": percent(row["macs"] / costs[-1], 1),
        "median of a call (ms)": _with_interval(row, "ms", ".3f"),
        "images/s": f"{row['images_per_second']:,.0f}",
        "times as fast": _with_interval(row, "speedup", ".2f"),
        "by MACs": f"{row['speedup_by_macs']:.2f}",
        "calls": f"{row['calls']:,}",
      }
      for row in latency["rows"]
    ]
  )


def _with_interval(row: dict, name: str, form: str) -> str:
  middle, low, high = (
    f"{row[key]:{form}}" for key in (name, f"{name}_low", f"{name}_high")
  )
  return f"{middle} [{low}, {high}]"


def estimators(lines: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
  """(head, rows) of a table of the estimators, means over "diagnose" lines."""
  rows = []
  for name in lines[-1]["estimators"]:
    found = [line["estimators"].get(name, {}) for line in lines]
    row = [name]
    for key, (_, scale, form) in ESTIMATOR_COLUMNS.items():
      values = [entry[key] for entry in found if entry.get(key) is not None]
      mean = sum(values) / len(values) if values else math.nan
      row.append(f"{mean / scale:{form}}")
    rows.append(row)
  return ["estimator", *(head for head, _, _ in ESTIMATOR_COLUMNS.values())], rows
