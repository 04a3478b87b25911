"""One page of a finished run, and its pictures beside it.

`write_report` reads the files of a run directory and needs neither JAX nor the
network. Accuracy is a fraction in those files and percent on the page, cost is in
MACs (multiply-accumulates), exits count from 1 on the page.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from html import escape
from typing import Any

from l2w_jax.results import figures, page
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
MAX_CLASSES = 100  # in the table, the most expensive of more


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `report/index.html` and its pictures; returns the page's path.

  Raises:
    ValueError: an input is missing or cannot be read; it names the file and the
      mode that writes it.
  """
  workdir = pathlib.Path(workdir)
  config = directory.config_values(workdir)
  metrics = directory.read_metrics(workdir)
  results = directory.read_results(workdir)
  samples = directory.read_samples(workdir)
  latency = directory.read_latency(workdir)
  num_exits = len(results["macs"])
  weights, diagnoses = metrics["weights"], metrics["diagnose"]
  figures.write_pictures(
    workdir / "report",
    {
      "curves.png": (figures.draw_curves, results),
      "exits.png": (figures.draw_exits, results),
      "samples.png": (figures.draw_samples, samples, num_exits),
      "training.png": (figures.draw_training, metrics, num_exits),
      "weights.png": weights and (figures.draw_weights, weights),
      "diagnostics.png": diagnoses and (figures.draw_diagnostics, diagnoses),
      "latency.png": latency and (figures.draw_latency, latency),
    },
  )
  written = workdir / "report" / "index.html"
  body = _body(config, results, float(samples["q"]), weights, latency, diagnoses)
  title = f"{results['dataset']}, {results['method']}"
  files.write(written, page.render(title, body))
  return written


def _body(config, results, q, weights, latency, diagnoses) -> str:
  """The page's HTML below its title; `q` is that of the sample pictures."""
  count = results["samples"]
  unfinished = (
    ""
    if results["complete"]
    else f", evaluated in mid-training after step {results['step']:,}"
  )
  curves = page.picture(
    "curves.png",
    "Anytime prediction stops every image at the same exit. "
    "Budgeted classification lets each image leave at the first exit that is "
    "confident enough; q sets how many are meant to leave where.",
  )
  exits = page.picture(
    "exits.png", f"Thresholds were chosen on the {_chosen_on(results)} split."
  )
  pictured = page.picture(
    "samples.png",
    "The first test images to leave at either end at "
    f"q = {q:g}. A wrong prediction is red: label → prediction.",
  )
  training = page.picture(
    "training.png",
    "Losses of the training batches, and accuracy of each exit "
    "on the calibration split.",
  )
  settings = json.dumps(
    {"config": config}
    | {name: results[name] for name in ("step", "seconds", "device", "versions")},
    indent=2,
    ensure_ascii=False,
  )
  train, calibration = count["train"], count["calibration"]
  return f"""<p>{train:,} training, {calibration:,} calibration and
{count["test"]:,} test images; one test image is
{100 / max(count["test"], 1):.2g} points. One run{unfinished}. All numbers:
<a href="../results.json">results.json</a>.</p>
{_cards(results)}
<h2>Accuracy against cost</h2>
{curves}
<h3>Anytime</h3>
{_anytime_table(results)}
<h3>Budgeted</h3>
{_budgeted_table(results)}
<h2>Where images leave</h2>
{exits}
{pictured}
{_chosen_section(results)}
{_latency_section(latency)}
<h2>Weights against loss</h2>
{_weights(weights, results["method"])}
{_diagnostics_section(diagnoses)}
<h2>Training</h2>
{training}
<h2>Settings and versions</h2>
<pre>{escape(settings)}</pre>"""


def _table(rows: list[dict[str, Any]]) -> str:
  """A table of {head of the column: cell} in each row."""
  return page.table(list(rows[0]), [list(row.values()) for row in rows])


def _join(cells) -> str:
  return " · ".join(cells)


def _threshold(value: float | str | None) -> str:
  value = math.nan if value is None else float(value)
  if math.isnan(value):
    return "–"
  return f"{value:.3f}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def _chosen_on(results: dict) -> str:
  """Split the thresholds come from: train, as released, if none was held out."""
  return "calibration" if results["samples"]["calibration"] else "train"


def _cards(results: dict) -> str:
  """The headline numbers; q = 1 is shown as all exits are used alike there."""
  first, last = results["anytime"][0], results["anytime"][-1]
  middle = min(results["budgeted"], key=lambda entry: abs(entry["q"] - 1))
  device, seconds = results["device"], results["seconds"]["train"]

  def cost(entry: dict) -> str:
    return f"at {percent(entry['macs'] / last['macs'], 0)} of the cost"

  cards = {
    "test accuracy at the last exit": percent(last["accuracy"]),
    f"at the first exit, {cost(first)}": percent(first["accuracy"]),
    f"with early exits at q = {middle['q']:g}, {cost(middle)}": percent(
      middle["accuracy"]
    ),
    "parameters": f"{results['params']:,}",
    f"training, {results['step']:,} steps on {device['count']} × "
    f"{device['kind']} ({device['platform']})": f"{seconds:,.0f} s",
  }
  boxes = "".join(
    f"<div><b>{escape(number)}</b>{escape(text)}</div>"
    for text, number in cards.items()
  )
  return f'<div class="cards">{boxes}</div>'


def _anytime_table(results: dict) -> str:
  scale, unit = figures.cost_scale(results["macs"])
  return _table(
    [
      {
        "exit": entry["exit"],
        unit: f"{entry['macs'] / scale:.3f}",
        "parameters to here": f"{params:,}",
        "calibration accuracy": percent(entry["calibration_accuracy"]),
        "test accuracy": percent(entry["accuracy"]),
      }
      for entry, params in zip(
        results["anytime"], results["params_to_exit"], strict=True
      )
    ]
  )


def _budgeted_table(results: dict) -> str:
  scale, unit = figures.cost_scale(results["macs"])
  return _table(
    [
      {
        "q": f"{entry['q']:g}",
        f"mean {unit}": f"{entry['macs'] / scale:.3f}",
        "calibration accuracy": percent(entry["calibration_accuracy"]),
        "test accuracy": percent(entry["accuracy"]),
        "leaving at each exit (%)": _join(
          f"{100 * share:.0f}" for share in entry["exits"]
        ),
        "confidence to leave at each exit": _join(
          map(_threshold, entry["thresholds"])
        ),
      }
      # Of q = 1/20, 2/20, ..., every fifth: 0.25, 0.5, ...
      for entry in results["budgeted"][4::5] or results["budgeted"]
    ]
  )


def _chosen_section(results: dict) -> str:
  """The chosen operating point, by exit and by class, and calibration."""
  scale, unit = figures.cost_scale(results["macs"])
  chosen = results["chosen"]
  by_exit = _table(
    [
      {
        "exit": entry["exit"],
        "leaving (%)": f"{100 * share:.1f}",
        "their accuracy": percent(accuracy),
        "temperature": f"{entry['temperature']:.2f}",
        "calibration error": percent(entry["ece"]),
        "after scaling": percent(entry["ece_scaled"]),
      }
      for share, accuracy, entry in zip(
        chosen["exits"],
        chosen["exit_accuracy"],
        results["temperatures"],
        strict=True,
      )
    ]
  )
  classes = sorted(
    (entry for entry in chosen["classes"] if sum(entry["left"])),
    key=lambda entry: -entry["macs"],
  )
  by_class = _table(
    [
      {
        "class": entry["class"],
        "accuracy": percent(entry["accuracy"]),
        f"mean {unit}": f"{entry['macs'] / scale:.3f}",
        "images leaving at each exit": _join(map(str, entry["left"])),
      }
      for entry in classes[:MAX_CLASSES]
    ]
  )
  return f"""<h2>Early exits at {escape(chosen["target"])}</h2>
<p>Test accuracy {percent(chosen["accuracy"])} at
{chosen["macs"] / scale:.3f} {unit}; {percent(chosen["calibration_accuracy"])}
at {chosen["calibration_macs"] / scale:.3f} on the {_chosen_on(results)} split,
where the thresholds were chosen. Confidence is {escape(results["confidence"])};
temperatures are fitted on that split and judged on the test split, and change no
exit.</p>
{by_exit}
<details><summary>By class, the most expensive first</summary>
{by_class}</details>"""


def _latency_section(latency: dict | None) -> str:
  if latency is None:
    return ""
  device = latency["device"]
  rows = _table(
    [
      {
        "batch": row["batch"],
        "run": figures.way(row),
        "point": row["point"],
        "calls": row["calls"],
        "million MACs": f"{row['macs'] / 1e6:.3f}",
        "p50 (ms)": f"{row['p50_ms']:.3f}",
        "p95 (ms)": f"{row['p95_ms']:.3f}",
        "images/s": f"{row['images_per_second']:,.0f}",
        "times as fast": f"{row['speedup']:.2f}",
        "by MACs": f"{row['speedup_by_macs']:.2f}",
      }
      for row in latency["rows"]
    ]
  )
  drawn = page.picture(
    "latency.png",
    "Measured on the test images, against what the simulated mean MACs promise.",
  )
  return (
    f"<h2>Latency</h2>\n<p>On {escape(device['kind'])} "
    f"({escape(device['platform'])}), after step {latency['step']:,}; "
    f"times are of whole calls.</p>\n{drawn}\n{rows}"
  )


def _weights(lines: list[dict], method: str) -> str:
  if lines:
    return page.picture(
      "weights.png",
      "Mean weight of the training samples in each loss bin. "
      "The last bin also holds all larger losses. The grey line is weight 1, "
      "plain training.",
    )
  if method == "uniform":
    return (
      "<p>Method uniform weighs every sample alike, so there are no "
      "weights to show.</p>"
    )
  return "<p>metrics.jsonl holds no line of kind weights to show.</p>"


def _diagnostics_section(lines: list[dict]) -> str:
  if not lines:
    return ""
  shown = page.picture(
    "diagnostics.png",
    "One train half and the same meta halves throughout. "
    "Signal to noise below 0: less signal than noise of its own size explains.",
  )
  return f"<h2>Meta-gradient</h2>\n{shown}\n{page.table(*estimators(lines))}"


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
