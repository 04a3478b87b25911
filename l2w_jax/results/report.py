"""Pictures and one page from the files of a finished run.

`write_report` reads `config.json`, `metrics.jsonl`, `results.json` and
`samples.npz` of a run directory and needs neither JAX nor the network. Accuracy
is a fraction in those files and percent on the page, cost is in MACs
(multiply-accumulates), losses are in nats, exits count from 1 on the page.
Matplotlib is imported only to draw, and no figure outlives the call.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
from html import escape
from typing import Any

import numpy as np

from l2w_jax.run import directory, files

STYLE = {
  "font.size": 9,
  "axes.titlesize": 10,
  "figure.titlesize": 11,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.edgecolor": "#8a8f98",
  "grid.color": "#e8eaed",
  "grid.linewidth": 0.8,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "text.color": "#202124",
  "axes.labelcolor": "#3c4043",
  "xtick.color": "#5f6368",
  "ytick.color": "#5f6368",
  "savefig.dpi": 150,
}
INK, ACCENT, WRONG = "#202124", "#c2410c", "#b3261e"
ESTIMATOR_HEAD = [
  "estimator",
  "cosine with exact",
  "relative error",
  "million operations",
  "temporary MiB",
  "ms",
]
MAX_WEIGHT_LINES, MAX_LOSS_POINTS = 12, 200
SAMPLE_COLUMNS, SAMPLE_ROWS = 8, 2

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #202124;
  max-width: 56rem; margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .4rem; }}
p, figcaption, summary, th {{ color: #5f6368; margin: .3rem 0 .8rem; }}
.cards {{ display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.4rem 0; }}
.cards div {{ flex: 1 1 8.5rem; background: #f6f7f9; border-radius: .6rem;
  padding: .8rem 1rem; font-size: .82rem; color: #5f6368; }}
.cards b {{ display: block; font-size: 1.4rem; color: #202124; }}
figure {{ margin: 1rem 0 0; }}
img {{ width: 100%; height: auto; }}
.scroll, pre {{ overflow-x: auto; font-size: .86rem; }}
table {{ border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid #e8eaed; }}
td {{ white-space: nowrap; }}
</style></head><body>
{body}
</body></html>
"""


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `report/index.html` and its pictures; returns the page's path.

  Raises:
    ValueError: an input is missing or cannot be read; it names the file and the
      mode that writes it.
  """
  import matplotlib

  workdir = pathlib.Path(workdir)
  config = directory.config_values(workdir)
  metrics = directory.read_metrics(workdir)
  results = directory.read_results(workdir)
  samples = directory.read_samples(workdir)
  latency = directory.read_latency(workdir)
  report = workdir / "report"
  report.mkdir(exist_ok=True)
  with matplotlib.rc_context(STYLE):
    figures = {
      "curves.png": draw_curves(results),
      "exits.png": draw_exits(results),
      "samples.png": draw_samples(samples, len(results["anytime"])),
      "training.png": draw_training(metrics, len(results["anytime"])),
    }
    if metrics["weights"]:
      figures["weights.png"] = draw_weights(metrics["weights"])
    else:
      (report / "weights.png").unlink(missing_ok=True)
    if metrics["diagnose"]:
      figures["diagnostics.png"] = draw_diagnostics(metrics["diagnose"])
    if latency:
      figures["latency.png"] = draw_latency(latency)
    write_pictures(report, figures)
  page = render_page(
    config,
    results,
    float(samples["q"]),
    bool(metrics["weights"]),
    latency,
    metrics["diagnose"],
  )
  files.write(report / "index.html", page.encode())
  return report / "index.html"


def write_pictures(folder: pathlib.Path, figures: dict[str, Any]) -> None:
  """Writes {file name: figure} as PNG, in the style that is set."""
  for name, figure in figures.items():
    png = io.BytesIO()
    figure.savefig(png, format="png")
    files.write(folder / name, png.getvalue())


def _array(values: Any) -> np.ndarray:
  """JSON's null becomes NaN, which no line is drawn through."""
  return np.array(values, dtype=float)


def cost_scale(results: dict) -> tuple[float, str]:
  """(divisor, unit) in which the largest of results["macs"] reads well."""
  most = max(results["macs"])
  for scale, word in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
    if most >= scale:
      return scale, f"{word}MACs"
  return 1.0, "MACs"


def exit_colors(num_exits: int) -> np.ndarray:
  """[K 4] colours of the exits, first to last."""
  import matplotlib

  return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, num_exits))


def new_figure(width: float, height: float):
  """An empty figure of that many inches, of no window."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def draw_curves(results: dict):
  """Accuracy against cost: each exit alone, and early exits at each q."""
  scale, unit = cost_scale(results)
  figure = new_figure(7.5, 4.4)
  axes = figure.add_subplot()
  points = _array(
    sorted(
      (entry["macs"] / scale, 100 * entry["accuracy"])
      for entry in results["budgeted"]
    )
  )
  axes.plot(
    points[:, 0],
    points[:, 1],
    ".-",
    color=ACCENT,
    markersize=5,
    label="budgeted: early exits, one point per q",
  )
  macs = [entry["macs"] / scale for entry in results["anytime"]]
  accuracy = [100 * entry["accuracy"] for entry in results["anytime"]]
  axes.plot(
    macs,
    accuracy,
    "o-",
    color="#9aa0a6",
    zorder=1,
    label="anytime: every image leaves at one exit",
  )
  axes.scatter(
    macs, accuracy, s=55, color=exit_colors(len(macs)), edgecolor="white", zorder=3
  )
  for k, point in enumerate(zip(macs, accuracy, strict=True), 1):
    axes.annotate(
      f"{k}",
      point,
      (0, -7),
      textcoords="offset points",
      ha="center",
      va="top",
      fontsize=8,
      color="#5f6368",
    )
  axes.margins(x=0.05, y=0.12)
  # At least ten test images from bottom to top, or noise looks like signal.
  low, high = axes.get_ylim()
  span = max(high - low, 1000 / max(results["samples"]["test"], 1))
  high = min((low + high + span) / 2, 100 + span / 10)
  axes.set_ylim(high - span, high)
  axes.set(
    title="Accuracy against cost (numbers: exits)",
    xlabel=f"cost per image, mean ({unit})",
    ylabel="test accuracy (%)",
  )
  figure.legend(loc="outside lower center", ncols=2)
  return figure


def draw_exits(results: dict):
  """Stacked shares of the test images that leave at each exit, per q."""
  budgeted = sorted(results["budgeted"], key=lambda entry: entry["q"])
  q = _array([entry["q"] for entry in budgeted])
  shares = 100 * _array([entry["exits"] for entry in budgeted])  # [Q K]
  width = np.diff(q).min() if len(q) > 1 else 0.05
  figure = new_figure(7.5, 3.6)
  axes = figure.add_subplot()
  below = np.zeros(len(q))
  for k, color in enumerate(exit_colors(shares.shape[1])):
    axes.bar(
      q,
      shares[:, k],
      width * 0.92,
      bottom=below,
      color=color,
      label=f"exit {k + 1}",
    )
    below += shares[:, k]
  axes.grid(False)
  axes.margins(x=0.01 if len(q) > 1 else 2)
  axes.set(
    title="Where images leave",
    ylim=(0, 100),
    xlabel="q (a larger budget to the right)",
    ylabel="test images leaving (%)",
  )
  # Reversed, so that the legend reads in the order of the stack.
  figure.legend(loc="outside right center", reverse=True)
  return figure


def draw_weights(lines: list[dict]):
  """Mean sample weight against loss, one panel per exit, early to late."""
  import matplotlib

  chosen = np.unique(
    np.linspace(0, len(lines) - 1, MAX_WEIGHT_LINES).round().astype(int)
  )
  lines = [lines[i] for i in chosen]
  num_exits = len(lines[0]["mean_weight"])
  rows = math.ceil(num_exits / 4)
  columns = math.ceil(num_exits / rows)
  figure = new_figure(max(2.1 * columns + 1.2, 4.5), 2.3 * rows + 0.9)
  panels = figure.subplots(
    rows, columns, sharex=True, sharey=True, squeeze=False
  ).ravel()
  epochs = [line["epoch"] for line in lines]
  color_of = matplotlib.cm.ScalarMappable(
    matplotlib.colors.Normalize(min(epochs), max(max(epochs), min(epochs) + 1)),
    matplotlib.colors.LinearSegmentedColormap.from_list(
      "epochs", matplotlib.colormaps["YlOrRd"](np.linspace(0.35, 1.0, 64))
    ),
  )
  for k, axes in enumerate(panels[:num_exits]):
    axes.axhline(1.0, color="#9aa0a6", linewidth=0.9)
    for line in lines:
      edges = _array(line["loss_bins"])
      axes.plot(
        (edges[:-1] + edges[1:]) / 2,
        _array(line["mean_weight"][k]),
        ".-",
        markersize=4,
        linewidth=1.2,
        color=color_of.to_rgba(line["epoch"]),
      )
    axes.set_title(f"exit {k + 1}")
    # A panel with none below it shows the ticks it shares.
    axes.tick_params(labelbottom=k + columns >= num_exits)
  for axes in panels[num_exits:]:
    axes.remove()
  figure.suptitle("Mean sample weight against loss, over training")
  figure.supxlabel("loss (nats)", fontsize=9)
  figure.supylabel("sample weight", fontsize=9)
  figure.colorbar(
    color_of,
    ax=panels[:num_exits].tolist(),
    label="epoch",
    aspect=30,
    fraction=0.03,
  )
  return figure


def draw_diagnostics(lines: list[dict]):
  """The meta-gradient and the weights over training, from "diagnose" lines."""
  figure = new_figure(9.0, 6.4)
  (error, noise), (moved, confident) = figure.subplots(2, 2)
  epochs = [line["epoch"] for line in lines]
  for name in lines[-1]["estimators"]:
    values = _array(
      [line["estimators"].get(name, {}).get("relative_error") for line in lines]
    )
    if np.nanmax(values, initial=0) > 0:
      error.plot(epochs, np.where(values > 0, values, np.nan), ".-", label=name)
  error.set(
    title="Error of the estimators",
    xlabel="epoch",
    yscale="log",
    ylabel="relative to the exact gradient",
  )
  if error.lines:
    error.legend(fontsize=7)
  snr = _array([line["signal_to_noise_by_exit"] for line in lines])
  easy, hard = (
    _array([line[name] for line in lines])
    for name in ("easy_weight", "hard_weight")
  )
  edges = _array(lines[-1]["confidence_bins"])
  for k, color in enumerate(exit_colors(snr.shape[1])):
    noise.plot(epochs, snr[:, k], ".-", color=color, label=f"exit {k + 1}")
    moved.plot(epochs, easy[:, k], ".-", color=color)
    moved.plot(epochs, hard[:, k], ".--", color=color)
    confident.plot(
      (edges[:-1] + edges[1:]) / 2,
      _array(lines[-1]["weight_by_confidence"][k]),
      ".-",
      color=color,
    )
  noise.axhline(0, color="#9aa0a6", linewidth=0.9)
  noise.set(
    title="Signal to noise of one meta half",
    xlabel="epoch",
    ylabel="|mean|² / variance",
  )
  moved.axhline(1, color="#9aa0a6", linewidth=0.9)
  moved.set(
    title="Easiest quarter (solid), hardest (dashed)",
    xlabel="epoch",
    ylabel="mean sample weight",
  )
  confident.axhline(1, color="#9aa0a6", linewidth=0.9)
  confident.set(
    title=f"Weights at epoch {epochs[-1]:g}",
    xlabel="confidence at the exit",
    ylabel="mean sample weight",
  )
  figure.legend(
    *noise.get_legend_handles_labels(), loc="outside right center", reverse=True
  )
  return figure


def estimator_rows(lines: list[dict]) -> list[list[str]]:
  """Name, cosine, error, operations, memory and time of each estimator.

  Cells of a table, means over "diagnose" lines; `ESTIMATOR_HEAD` is its head.
  """

  def mean(name, key):
    values = [
      line["estimators"][name][key]
      for line in lines
      if line["estimators"].get(name, {}).get(key) is not None
    ]
    return sum(values) / len(values) if values else math.nan

  return [
    [
      name,
      f"{mean(name, 'cosine'):.4f}",
      f"{mean(name, 'relative_error'):.1e}",
      f"{mean(name, 'flops') / 1e6:,.0f}",
      f"{mean(name, 'temporary_bytes') / 2**20:,.1f}",
      f"{mean(name, 'ms'):,.1f}",
    ]
    for name in lines[-1]["estimators"]
  ]


def estimator_table(lines: list[dict]) -> str:
  """`estimator_rows` as HTML, for the page and for notebooks."""
  return table(ESTIMATOR_HEAD, estimator_rows(lines))


def draw_latency(latency: dict):
  """Measured speed-up over the full network against the promise of MACs."""
  batches = sorted({row["batch"] for row in latency["rows"]})
  figure = new_figure(7.5, 3.8)
  panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
  for axes, batch in zip(panels, batches, strict=True):
    rows = [row for row in latency["rows"] if row["batch"] == batch]
    most = max(row["speedup_by_macs"] for row in rows)
    axes.plot(
      [1, most], [1, most], color="#9aa0a6", linewidth=0.9, label="as MACs promise"
    )
    groups = {}
    for row in rows:
      if row["kind"] != "full":
        groups.setdefault(_way(row), []).append(
          (row["speedup_by_macs"], row["speedup"])
        )
    for name, points in groups.items():
      axes.plot(*_array(sorted(points)).T, ".-", label=name)
    axes.set(title=f"batch {batch}", xlabel="times fewer MACs")
    axes.legend(fontsize=7)
  panels[0].set_ylabel("times as fast as the full network")
  return figure


def _diagnostics_section(lines: list[dict]) -> str:
  if not lines:
    return ""
  shown = picture(
    "diagnostics.png",
    "One train half and the same meta halves throughout. "
    "Signal to noise below 0: less signal than noise of its own size explains.",
  )
  return f"<h2>Meta-gradient</h2>\n{shown}\n{estimator_table(lines)}"


def _way(row: dict) -> str:
  if row["kind"] != "early":
    return row["kind"]
  if "decides" in row:
    return f"early, {row['decides']} decides"
  return f"early, {row['call']:,} images a call"


def draw_samples(samples: dict[str, np.ndarray], num_exits: int):
  """The first test images that leave at the first and at the last exit."""
  ends = sorted({0, num_exits - 1})
  figure = new_figure(7.5, 2.7 * len(ends))
  groups = figure.subfigures(len(ends), 1, squeeze=False).ravel()
  names = [str(name)[:12] for name in samples["class_names"]]
  brightest = max(int(samples["images"].max(initial=0)), 1)
  for k, group in zip(ends, groups, strict=True):
    here = np.flatnonzero(samples["exits"] == k)
    group.suptitle(
      f"Left at exit {k + 1}" + ("" if len(here) else ": none of these images")
    )
    panels = group.subplots(SAMPLE_ROWS, SAMPLE_COLUMNS).ravel()
    for axes in panels:
      axes.axis("off")
    for i, axes in zip(here, panels, strict=False):
      image = samples["images"][i]
      label, guess = samples["labels"][i], samples["predictions"][i]
      axes.imshow(
        image if image.shape[-1] == 3 else image[..., 0],
        cmap="gray_r",
        vmin=0,
        vmax=brightest,
        interpolation="nearest",
      )
      axes.set_title(
        names[label] if label == guess else f"{names[label]} → {names[guess]}",
        fontsize=8,
        color=INK if label == guess else WRONG,
      )
  return figure


def draw_training(metrics: dict[str, list[dict]], num_exits: int):
  """Losses, and calibration accuracy per exit, over the epochs.

  Many steps are drawn as means over runs of consecutive ones.
  """
  figure = new_figure(9.0, 3.6)
  losses, accuracy = figure.subplots(1, 2)
  for name, color in (("train_loss", INK), ("meta_loss", ACCENT)):
    points = _array(
      [
        (line["epoch"], line[name])
        for line in metrics["train"]
        if line.get(name) is not None
      ]
    )
    if len(points):
      means = _array(
        [
          part.mean(axis=0)
          for part in np.array_split(points, min(len(points), MAX_LOSS_POINTS))
        ]
      )
      losses.plot(
        *means.T,
        "." if len(means) == 1 else "-",
        color=color,
        label=name.replace("_", " "),
      )
      losses.legend()
  losses.set(title="Losses", xlabel="epoch", ylabel="sum over exits (nats)")
  epoch = [line["epoch"] for line in metrics["evaluate"]]
  for k, color in enumerate(exit_colors(num_exits)):
    percent = [100 * line["accuracy"][k] for line in metrics["evaluate"]]
    accuracy.plot(epoch, percent, ".-", color=color, label=f"exit {k + 1}")
  accuracy.set(
    title="Accuracy on the calibration split", xlabel="epoch", ylabel="accuracy (%)"
  )
  figure.legend(
    *accuracy.get_legend_handles_labels(), loc="outside right center", reverse=True
  )
  return figure


def table(head: list[str], rows: list[list[Any]]) -> str:
  """An HTML table; cells are escaped."""
  lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
  lines += [
    "".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows
  ]
  body = "\n".join(f"<tr>{line}</tr>" for line in lines)
  return f'<div class="scroll"><table>\n{body}\n</table></div>'


def picture(name: str, caption: str) -> str:
  """A picture beside the page, as HTML."""
  return (
    f'<figure><img src="{name}" alt="{escape(caption)}">'
    f"<figcaption>{escape(caption)}</figcaption></figure>"
  )


def _percent(fraction: float, digits: int = 2) -> str:
  return f"{100 * fraction:.{digits}f} %"


def _threshold(value: float | str | None) -> str:
  value = math.nan if value is None else float(value)
  if math.isnan(value):
    return "–"
  return f"{value:.3f}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def _cards(results: dict) -> str:
  """The headline numbers; q = 1 is shown as all exits are used alike there."""
  first, last = results["anytime"][0], results["anytime"][-1]
  middle = min(results["budgeted"], key=lambda entry: abs(entry["q"] - 1))
  device, seconds = results["device"], results["seconds"]["train"]

  def cost(entry: dict) -> str:
    return f"at {_percent(entry['macs'] / last['macs'], 0)} of the cost"

  cards = {
    "test accuracy at the last exit": _percent(last["accuracy"]),
    f"at the first exit, {cost(first)}": _percent(first["accuracy"]),
    f"with early exits at q = {middle['q']:g}, {cost(middle)}": _percent(
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
  scale, unit = cost_scale(results)
  return table(
    ["exit", unit, "parameters to here", "calibration accuracy", "test accuracy"],
    [
      [
        entry["exit"],
        f"{entry['macs'] / scale:.3f}",
        f"{params:,}",
        _percent(entry["calibration_accuracy"]),
        _percent(entry["accuracy"]),
      ]
      for entry, params in zip(
        results["anytime"], results["params_to_exit"], strict=True
      )
    ],
  )


def _budgeted_table(results: dict) -> str:
  scale, unit = cost_scale(results)
  # Of q = 1/20, 2/20, ..., every fifth: 0.25, 0.5, ...
  entries = results["budgeted"][4::5] or results["budgeted"]
  return table(
    [
      "q",
      f"mean {unit}",
      "calibration accuracy",
      "test accuracy",
      "leaving at each exit (%)",
      "confidence to leave at each exit",
    ],
    [
      [
        f"{entry['q']:g}",
        f"{entry['macs'] / scale:.3f}",
        _percent(entry["calibration_accuracy"]),
        _percent(entry["accuracy"]),
        " · ".join(f"{100 * share:.0f}" for share in entry["exits"]),
        " · ".join(map(_threshold, entry["thresholds"])),
      ]
      for entry in entries
    ],
  )


def _early_exit_section(results: dict) -> str:
  """The chosen operating point, by exit and by class, and calibration."""
  scale, unit = cost_scale(results)
  chosen = results["chosen"]
  by_exit = table(
    [
      "exit",
      "leaving (%)",
      "their accuracy",
      "temperature",
      "calibration error",
      "after scaling",
    ],
    [
      [
        k,
        f"{100 * share:.1f}",
        "–" if accuracy is None else _percent(accuracy),
        f"{entry['temperature']:.2f}",
        _percent(entry["ece"]),
        _percent(entry["ece_scaled"]),
      ]
      for k, (share, accuracy, entry) in enumerate(
        zip(
          chosen["exits"],
          chosen["exit_accuracy"],
          results["temperatures"],
          strict=True,
        ),
        1,
      )
    ],
  )
  # The hundred most expensive of many classes.
  classes = sorted(
    (entry for entry in chosen["classes"] if sum(entry["left"])),
    key=lambda entry: -entry["macs"],
  )[:100]
  by_class = table(
    ["class", "accuracy", f"mean {unit}", "images leaving at each exit"],
    [
      [
        entry["class"],
        _percent(entry["accuracy"]),
        f"{entry['macs'] / scale:.3f}",
        " · ".join(map(str, entry["left"])),
      ]
      for entry in classes
    ],
  )
  return f"""<h2>Early exits at {escape(chosen["target"])}</h2>
<p>Test accuracy {_percent(chosen["accuracy"])} at
{chosen["macs"] / scale:.3f} {unit}; {_percent(chosen["calibration_accuracy"])}
at {chosen["calibration_macs"] / scale:.3f} on the {_chosen_on(results)} split,
where the thresholds were chosen. Confidence is {escape(results["confidence"])};
temperatures are fitted on that split and judged on the test split, and change no
exit.</p>
{by_exit}
<details><summary>By class, the most expensive first</summary>
{by_class}</details>"""


def _chosen_on(results: dict) -> str:
  """Split the thresholds come from: train, as released, if none was held out."""
  return "calibration" if results["samples"]["calibration"] else "train"


def _latency_section(latency: dict | None) -> str:
  if latency is None:
    return ""
  device = latency["device"]
  rows = table(
    [
      "batch",
      "run",
      "point",
      "calls",
      "million MACs",
      "p50 (ms)",
      "p95 (ms)",
      "images/s",
      "times as fast",
      "by MACs",
    ],
    [
      [
        row["batch"],
        _way(row),
        row["point"],
        row["calls"],
        f"{row['macs'] / 1e6:.3f}",
        f"{row['p50_ms']:.3f}",
        f"{row['p95_ms']:.3f}",
        f"{row['images_per_second']:,.0f}",
        f"{row['speedup']:.2f}",
        f"{row['speedup_by_macs']:.2f}",
      ]
      for row in latency["rows"]
    ],
  )
  drawn = picture(
    "latency.png",
    "Measured on the test images, against what the simulated mean MACs promise.",
  )
  return (
    f"<h2>Latency</h2>\n<p>On {escape(device['kind'])} "
    f"({escape(device['platform'])}), after step {latency['step']:,}; "
    f"times are of whole calls.</p>\n{drawn}\n{rows}"
  )


def render_page(
  config: dict,
  results: dict,
  q: float,
  has_weights: bool,
  latency: dict | None = None,
  diagnoses: list[dict] | None = None,
) -> str:
  """The page as HTML; `q` is that of the sample pictures."""
  count = results["samples"]
  if has_weights:
    weights = picture(
      "weights.png",
      "Mean weight of the training samples in each loss bin. "
      "The last bin also holds all larger losses. The grey line is weight 1, "
      "plain training.",
    )
  elif results["method"] == "uniform":
    weights = (
      "<p>Method uniform weighs every sample alike, so there are no "
      "weights to show.</p>"
    )
  else:
    weights = "<p>metrics.jsonl holds no line of kind weights to show.</p>"
  curves = picture(
    "curves.png",
    "Anytime prediction stops every image at the same exit. "
    "Budgeted classification lets each image leave at the first exit that is "
    "confident enough; q sets how many are meant to leave where.",
  )
  exits = picture(
    "exits.png", f"Thresholds were chosen on the {_chosen_on(results)} split."
  )
  pictured = picture(
    "samples.png",
    "The first test images to leave at either end at "
    f"q = {q:g}. A wrong prediction is red: label → prediction.",
  )
  training = picture(
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
  unfinished = (
    ""
    if results["complete"]
    else (f", evaluated in mid-training after step {results['step']:,}")
  )
  title = escape(f"{results['dataset']}, {results['method']}")
  return PAGE.format(
    title=title,
    body=f"""<h1>{title}</h1>
<p>{count["train"]:,} training, {count["calibration"]:,} calibration and
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
{_early_exit_section(results)}
{_latency_section(latency)}
<h2>Weights against loss</h2>
{weights}
{_diagnostics_section(diagnoses or [])}
<h2>Training</h2>
{training}
<h2>Settings and versions</h2>
<pre>{escape(settings)}</pre>""",
  )
