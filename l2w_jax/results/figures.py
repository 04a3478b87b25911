"""Pictures of a run, and what all pictures share: style, colours, units.

Matplotlib is imported only to draw, and figures belong to no window. Accuracy is a
fraction in the arguments and percent in pictures, cost is in MACs
(multiply-accumulates), losses are in nats, exits count from 1 in pictures.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2w_jax.run import files

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
INK, ACCENT, WRONG, GREY = "#202124", "#c2410c", "#b3261e", "#9aa0a6"
MAX_WEIGHT_LINES, MAX_LOSS_POINTS = 12, 200
SAMPLE_COLUMNS, SAMPLE_ROWS = 8, 2


def write_pictures(folder: pathlib.Path, pictures: Mapping[str, Any]) -> None:
  """Draws PNGs into a folder, which is made where it is missing.

  Args:
    folder: where they go.
    pictures: {file name: (function that draws, its arguments …)}; the picture of
      an earlier run goes where there is nothing to draw.
  """
  import matplotlib

  folder.mkdir(exist_ok=True)
  with matplotlib.rc_context(STYLE):
    drawn = {name: how and how[0](*how[1:]) for name, how in pictures.items()}
    for name, figure in drawn.items():
      if not figure:
        (folder / name).unlink(missing_ok=True)
        continue
      png = io.BytesIO()
      figure.savefig(png, format="png")
      files.write(folder / name, png.getvalue())


def cost_scale(macs: Sequence[float] | np.ndarray) -> tuple[float, str]:
  """(divisor, unit) in which the largest of some costs reads well."""
  for scale, word in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
    if max(macs) >= scale:
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


def exit_legend(figure, axes) -> None:
  """The exits of one panel beside all, last on top as they are stacked."""
  figure.legend(
    *axes.get_legend_handles_labels(), loc="outside right center", reverse=True
  )


def stack(axes, x: Sequence[float], shares: np.ndarray, width: float) -> None:
  """Bars of the shares [X K] of samples that leave at each exit, in percent."""
  below = np.zeros(len(x))
  for k, color in enumerate(exit_colors(shares.shape[1])):
    share = 100 * shares[:, k]
    axes.bar(x, share, width, bottom=below, color=color, label=f"exit {k + 1}")
    below += share
  axes.grid(False)
  axes.set_ylim(0, 100)


def band(axes, x, mean, reach, color, label) -> None:
  """A line with mean ± reach shaded."""
  axes.plot(x, mean, color=color, label=label)
  axes.fill_between(
    x, mean - reach, mean + reach, color=color, alpha=0.18, linewidth=0
  )


def middles(edges: Sequence[float]) -> np.ndarray:
  """[M] middles of the bins between M + 1 edges."""
  return (_array(edges)[:-1] + _array(edges)[1:]) / 2


def _array(values: Any) -> np.ndarray:
  """JSON's null becomes NaN, which no line is drawn through."""
  return np.array(values, dtype=float)


def draw_curves(results: dict):
  """Accuracy against cost: each exit alone, and early exits at each q."""
  scale, unit = cost_scale(results["macs"])
  figure = new_figure(7.5, 4.4)
  axes = figure.add_subplot()

  def points(entries):
    return [(entry["macs"] / scale, 100 * entry["accuracy"]) for entry in entries]

  axes.plot(
    *_array(sorted(points(results["budgeted"]))).T,
    ".-",
    color=ACCENT,
    markersize=5,
    label="budgeted: early exits, one point per q",
  )
  exits = points(results["anytime"])
  macs, accuracy = zip(*exits, strict=True)
  axes.plot(
    macs,
    accuracy,
    "o-",
    color=GREY,
    zorder=1,
    label="anytime: every image leaves at one exit",
  )
  axes.scatter(
    macs, accuracy, s=55, color=exit_colors(len(macs)), edgecolor="white", zorder=3
  )
  for k, point in enumerate(exits, 1):
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
  q = [entry["q"] for entry in budgeted]
  width = np.diff(q).min() if len(q) > 1 else 0.05
  figure = new_figure(7.5, 3.6)
  axes = figure.add_subplot()
  stack(axes, q, _array([entry["exits"] for entry in budgeted]), width * 0.92)
  axes.margins(x=0.01 if len(q) > 1 else 2)
  axes.set(
    title="Where images leave",
    xlabel="q (a larger budget to the right)",
    ylabel="test images leaving (%)",
  )
  exit_legend(figure, axes)
  return figure


def draw_weights(lines: list[dict]):
  """Mean sample weight against loss, one panel per exit, early to late."""
  import matplotlib

  chosen = np.linspace(0, len(lines) - 1, MAX_WEIGHT_LINES).round().astype(int)
  lines = [lines[i] for i in np.unique(chosen)]
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
    axes.axhline(1.0, color=GREY, linewidth=0.9)
    for line in lines:
      axes.plot(
        middles(line["loss_bins"]),
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
  epochs, last = [line["epoch"] for line in lines], lines[-1]
  for name in last["estimators"]:
    values = _array(
      [line["estimators"].get(name, {}).get("relative_error") for line in lines]
    )
    if np.nanmax(values, initial=0) > 0:
      error.plot(epochs, np.where(values > 0, values, np.nan), ".-", label=name)
  if error.lines:
    error.legend(fontsize=7)
  snr, easy, hard = (
    _array([line[name] for line in lines])
    for name in ("signal_to_noise_by_exit", "easy_weight", "hard_weight")
  )
  bins = middles(last["confidence_bins"])
  for k, color in enumerate(exit_colors(snr.shape[1])):
    noise.plot(epochs, snr[:, k], ".-", color=color, label=f"exit {k + 1}")
    moved.plot(epochs, easy[:, k], ".-", color=color)
    moved.plot(epochs, hard[:, k], ".--", color=color)
    weight = _array(last["weight_by_confidence"][k])
    confident.plot(bins, weight, ".-", color=color)
  for axes, level in ((noise, 0), (moved, 1), (confident, 1)):
    axes.axhline(level, color=GREY, linewidth=0.9)
  error.set(
    title="Error of the estimators",
    xlabel="epoch",
    yscale="log",
    ylabel="relative to the exact gradient",
  )
  noise.set(
    title="Signal to noise of one meta half",
    xlabel="epoch",
    ylabel="|mean|² / variance",
  )
  moved.set(
    title="Easiest quarter (solid), hardest (dashed)",
    xlabel="epoch",
    ylabel="mean sample weight",
  )
  confident.set(
    title=f"Weights at epoch {epochs[-1]:g}",
    xlabel="confidence at the exit",
    ylabel="mean sample weight",
  )
  exit_legend(figure, noise)
  return figure


def draw_latency(latency: dict):
  """Measured speed-up over the full network against the promise of MACs."""
  batches = sorted({row["batch"] for row in latency["rows"]})
  figure = new_figure(7.5, 3.8)
  panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
  for axes, batch in zip(panels, batches, strict=True):
    rows = [row for row in latency["rows"] if row["batch"] == batch]
    most = max(row["speedup_by_macs"] for row in rows)
    axes.plot(
      [1, most], [1, most], color=GREY, linewidth=0.9, label="as MACs promise"
    )
    groups = {}
    for row in rows:
      if row["kind"] != "full":
        point = (row["speedup_by_macs"], row["speedup"])
        groups.setdefault(way(row), []).append(point)
    for name, points in groups.items():
      axes.plot(*_array(sorted(points)).T, ".-", label=name)
    axes.set(title=f"batch {batch}", xlabel="times fewer MACs")
    axes.legend(fontsize=7)
  panels[0].set_ylabel("times as fast as the full network")
  return figure


def way(row: dict) -> str:
  """How a row of latency.json was run, in words."""
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
    points = [
      (line["epoch"], line[name])
      for line in metrics["train"]
      if line.get(name) is not None
    ]
    if points:
      parts = np.array_split(_array(points), min(len(points), MAX_LOSS_POINTS))
      losses.plot(
        *_array([part.mean(axis=0) for part in parts]).T,
        "." if len(parts) == 1 else "-",
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
  exit_legend(figure, accuracy)
  return figure
