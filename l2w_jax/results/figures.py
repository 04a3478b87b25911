"""Every picture there is: of a run, and of a comparison of methods.

Functions take what the files of a run directory hold and return figures of
Matplotlib; pages, papers and the notebook draw with the same ones. Accuracy is a
fraction in the arguments and percent in pictures, cost is percent of the full
network's, losses are in nats, exits count from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2w_jax.results import drawing, intervals
from l2w_jax.results.drawing import ACCENT, GREY, INK, STAR, WRONG, array, styled

MAX_LINES, MAX_PANELS, MAX_LOSS_POINTS = 5, 6, 200
MIN_IN_BIN = 10  # samples, below which a mean is not drawn
MAX_CLASSES = 30  # rows of the heat map: the cheapest and the most expensive half
SAMPLE_COLUMNS, SAMPLE_ROWS = 5, 2
LABELLED = 6.0  # percent of the images: the height of a label of an exit's area
LETTER = 0.016  # width of a letter of it, of that of the panel


@styled
def draw_curves(results: dict):
  """Accuracy over cost, and below it where images leave, on one axis.

  A line for early exits with its 95 % interval, numbered circles for every image
  at one exit, and a star for the deployed point.
  """
  count, full = results["samples"]["test"], results["macs"][-1]
  chosen = results["chosen"]

  def points(entries) -> np.ndarray:
    """[P 2] cost and accuracy in percent."""
    found = [(e["macs"] / full, e["accuracy"]) for e in entries]
    return 100 * np.array(found, float)

  budgeted = sorted(results["budgeted"], key=lambda entry: entry["macs"])
  cost, accuracy = points(budgeted).T
  shares = 100 * np.array([e["exits"] for e in budgeted])
  alone = np.ptp(cost) == 0
  if alone:  # lines and areas need a width
    cost = np.array([0.97, 1.03]) * cost[0]
    accuracy, shares = (np.repeat(x[:1], 2, 0) for x in (accuracy, shares))
  exits = points(results["anytime"])
  figure = drawing.new_figure(5.2)
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
  low, high = (100 * x for x in intervals.of_accuracy(accuracy / 100, count))
  drawing.band(above, cost, low, high, ACCENT)
  above.plot(cost, accuracy, color=ACCENT, label="early exits")
  above.axhline(exits[-1, 1], color=GREY, linewidth=1, linestyle=":")
  above.plot(
    *exits.T,
    "o",
    markersize=13 if len(exits) < 7 else 10,
    markerfacecolor="white",
    color=INK,
    markeredgewidth=1,
    label="every image at exit k",
  )
  for k, point in enumerate(exits, 1):
    above.annotate(
      f"{k}",
      point,
      ha="center",
      va="center_baseline",
      fontsize=8 if len(exits) < 7 else 6.5,
      color=INK,
    )
  above.plot(
    *points([chosen])[0],
    "*",
    markersize=14,
    color=STAR,
    markeredgecolor="white",
    label=f"deployed: {target_words(chosen['target'], results['macs'])}",
    zorder=5,
  )
  # At least ten test images from bottom to top, or noise looks like signal; what
  # lies far below the line, such as a poor first exit, is left to its circle.
  bottom, top = above.get_ylim()
  span = max(top - bottom, 1000 / max(count, 1))
  top = min((bottom + top + span) / 2, 100 + span / 15)
  above.set_ylim(top - span, top)
  above.set(ylabel="test accuracy (%)")
  handles, labels = above.get_legend_handles_labels()
  circle = labels.index("every image at exit k")
  handles[circle] = _small_circle()
  from matplotlib.patches import Patch

  handles.insert(1, Patch(color=ACCENT, alpha=0.18, linewidth=0))
  labels.insert(1, f"its 95 % interval ({count:,} images)")
  above.legend(handles, labels, loc="best")
  deployed = 100 * chosen["macs"] / full
  colors = drawing.exit_colors(shares.shape[1])
  below.stackplot(cost, shares.T, colors=colors, linewidth=0)
  below.grid(False)
  below.set_ylim(0, 100)
  below.axvline(deployed, color="white", linewidth=1.4, linestyle="--")
  scale, unit = drawing.cost_scale([full])
  below.set(
    xlabel=f"mean cost, % of the full network ({full / scale:.3g} {unit})",
    ylabel="images leaving (%)",
  )
  drawing.log_if_wide(below.xaxis, [*cost, *exits[:, 0]])
  if alone and len(exits) == 1:  # and it is not all there is to see
    below.set_xlim(85, 105)
  _label_shares(below, cost, shares, deployed)
  return figure


def _small_circle():
  from matplotlib.lines import Line2D

  return Line2D(
    [],
    [],
    marker="o",
    color=INK,
    markerfacecolor="white",
    linestyle="",
    markersize=7,
  )


def _label_shares(axes, cost: np.ndarray, shares: np.ndarray, deployed: float):
  """Names the areas of the shares [P K] in percent over the cost [P].

  In an area where it is as wide and high as its name, and off the line at the
  cost `deployed` if there is such a place; otherwise to the right of where the
  area ends, if there is room.
  """
  num_exits = shares.shape[1]
  axes.get_xlim()  # what follows needs the limits that it settles
  scale = axes.transScale + axes.transLimits
  at, line = (
    scale.transform(np.c_[x, np.zeros_like(x)])[:, 0]
    for x in (cost, np.array([deployed]))
  )
  tops = np.c_[np.zeros(len(cost)), np.cumsum(shares, axis=1)]
  for k, color in enumerate(drawing.exit_colors(num_exits)):
    name = f"exit {k + 1}" if num_exits < 7 else f"{k + 1}"
    width = LETTER * len(name)
    place, align = _place(at, tops[:, k], tops[:, k + 1], width, line[0]), "center"
    ink = "white" if np.dot(color[:3], (0.3, 0.59, 0.11)) < 0.55 else INK
    if place is None:
      ink, align = INK, "left"
      if shares[-1, k] < LABELLED or at[-1] + 0.01 + width > 1:
        continue
      place = at[-1] + 0.01, tops[-1, k] + shares[-1, k] / 2
    axes.text(
      *place,
      name,
      ha=align,
      va="center",
      fontsize=8,
      color=ink,
      transform=axes.get_yaxis_transform(),
    )


def _place(at, low, high, width: float, line: float) -> tuple[float, float] | None:
  """(x, y) of the middle of a label in the area between two lines, if it fits.

  Args:
    at: [P] in fractions of the panel, ascending; low, high: [P] in percent.
    width: of the label, as `at`.
    line: that the label should not lie on, as `at`.
  """
  steps = np.linspace(-0.5, 0.5, 9) * width
  middles = np.linspace(at[0] + width / 2, at[-1] - width / 2, 101)
  if at[-1] - at[0] < width:
    return None
  under = middles[:, None] + steps
  floor = np.interp(under, at, low).max(1)
  room = np.interp(under, at, high).min(1) - floor
  fits = room >= LABELLED
  free = fits & (np.abs(middles - line) > width / 2 + 0.01)
  if not fits.any():
    return None
  best = np.where(free if free.any() else fits, room, -np.inf).argmax()
  return middles[best], floor[best] + room[best] / 2


def target_words(target: str, macs: Sequence[float] | np.ndarray) -> str:
  """As a reader sees a target, in short: `q:0.75` is "q = 0.75".

  Args:
    target: one of the forms of `exits.targets`; what is none stays as it is.
    macs: costs of the run, whose unit a cost is said in.
  """
  kind, values = target_values(target)
  if kind == "q":
    return f"q = {target.partition(':')[2]}"
  if kind == "macs":
    return f"≤ {cost_words(values[0], macs)}"
  if kind == "accuracy":
    return f"accuracy ≥ {100 * values[0]:.6g} %"
  if kind == "risk":
    return (
      f"≤ {100 * values[0]:.6g} points lost, {100 * (1 - values[1]):.6g} % sure"
    )
  return target


def target_values(target: str) -> tuple[str, list[float]]:
  """(kind, its numbers) of a target, ("", []) of what is none."""
  kind, *numbers = target.split(":")
  try:
    values = [float(number) for number in numbers]
  except ValueError:
    return "", []
  known = {"q": 1, "macs": 1, "accuracy": 1, "risk": 2}.get(kind) == len(values)
  return (kind, values) if known else ("", [])


def cost_words(cost: float, macs: Sequence[float] | np.ndarray) -> str:
  """A cost in the unit that suits the costs `macs` of a run."""
  scale, unit = drawing.cost_scale(macs)
  return f"{cost / scale:,.6g} {unit}"


@styled
def draw_weights(lines: list[dict]):
  """Mean sample weight against loss, early to late in training, a panel per exit.

  Of many exits some are shown, evenly. The band is one standard deviation of the
  weights in a bin at the last epoch.
  """
  import matplotlib

  lines = [lines[i] for i in _some(len(lines), MAX_LINES)]
  exits = _some(len(lines[0]["mean_weight"]), MAX_PANELS)
  figure, panels = drawing.panels(len(exits), 2, 1.9, sharex=True, sharey=True)
  colors = matplotlib.colormaps["YlOrRd"](np.linspace(0.4, 1.0, len(lines)))
  for k, axes in zip(exits, panels, strict=True):
    axes.axhline(1.0, color=GREY, linewidth=0.9)
    for line, color in zip(lines, colors, strict=True):
      x, mean = drawing.middles(line["loss_bins"]), array(line["mean_weight"][k])
      enough = _enough(line, k)
      mean = np.where(enough, mean, np.nan)
      axes.plot(x, mean, color=color, label=f"epoch {line['epoch']:g}")
      if line is lines[-1] and "std_weight" in line:
        std = array(line["std_weight"][k])
        drawing.band(axes, x, mean - std, mean + std, color)
    axes.set_title(f"exit {k + 1}")
  figure.supxlabel("loss (nats)", fontsize=9)
  figure.supylabel("sample weight", fontsize=9)
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc="outside upper center",
    ncols=len(lines) if len(lines) < 4 else 3,
  )
  return figure


def _enough(line: dict, k: int) -> np.ndarray:
  """[M] of which loss bins at exit k have enough samples for a mean."""
  counts = array(line["count"][k] if "count" in line else np.inf)
  total = counts.sum() if np.isfinite(counts).all() else np.inf
  return counts >= min(MIN_IN_BIN, total / 100)


def _some(count: int, most: int) -> list[int]:
  """Indices of up to `most` of `count` things, evenly, with first and last."""
  return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


@styled
def draw_reliability(results: dict):
  """Accuracy against confidence at up to four exits, on the test split."""
  entries = results["temperatures"]
  chosen = [entries[i] for i in _some(len(entries), 4)]
  colors = drawing.exit_colors(len(entries))
  figure, panels = drawing.panels(len(chosen), 2, 2.2, sharex=True, sharey=True)
  for entry, axes in zip(chosen, panels, strict=True):
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.9)
    x, y, counts = (
      array([b[name] for b in entry["reliability"]])
      for name in ("confidence", "accuracy", "samples")
    )
    low, high = intervals.of_accuracy(y, counts)
    color = colors[entry["exit"] - 1]
    axes.vlines(
      100 * x, 100 * low, 100 * high, color=color, alpha=0.45, linewidth=1
    )
    size = 10 + 90 * counts / max(counts.sum(), 1)
    axes.scatter(100 * x, 100 * y, s=size, color=color)
    axes.set(title=f"exit {entry['exit']}", xlim=(0, 102), ylim=(0, 102))
  figure.supxlabel("confidence (%)", fontsize=9)
  figure.supylabel("accuracy (%)", fontsize=9)
  return figure


@styled
def draw_classes(results: dict):
  """Shares of each class that leave at each exit, the cheapest class on top."""
  classes = sorted(
    (entry for entry in results["chosen"]["classes"] if sum(entry["left"])),
    key=lambda entry: entry["macs"],
  )
  if len(classes) > MAX_CLASSES:
    half = MAX_CLASSES // 2
    classes = classes[:half] + classes[-half:]
  shares = np.array([np.divide(e["left"], sum(e["left"])) for e in classes])
  rows, num_exits = shares.shape
  figure = drawing.new_figure(0.9 + 0.2 * rows)
  axes = figure.add_subplot()
  axes.pcolormesh(
    100 * shares, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.8
  )
  if num_exits <= 8:
    for (row, k), share in np.ndenumerate(shares):
      axes.text(
        k + 0.5,
        row + 0.5,
        f"{100 * share:.0f}",
        ha="center",
        va="center",
        fontsize=7.5,
        color="white" if share > 0.55 else INK,
      )
  names = [drawing.clean(entry["class"], 18) for entry in classes]
  axes.set_yticks(np.arange(rows) + 0.5, names)
  axes.set_xticks(np.arange(num_exits) + 0.5, range(1, num_exits + 1))
  axes.tick_params(length=0)
  axes.invert_yaxis()
  axes.grid(False)
  axes.spines[:].set_visible(False)
  axes.set(title="images of a class that leave there (%)", xlabel="exit")
  return figure


@styled
def draw_latency(latency: dict):
  """Times as fast as the full network, with intervals, beside what MACs promise."""
  batches = sorted({row["batch"] for row in latency["rows"]})
  costs = [row["macs"] for row in latency["rows"]]
  groups = [
    [r for r in latency["rows"] if r["batch"] == batch and r["kind"] != "full"]
    for batch in batches
  ]
  sizes = [len(rows) + 1.5 for rows in groups]
  figure = drawing.new_figure(0.5 + 0.2 * sum(sizes))
  panels = figure.subplots(
    len(groups), 1, sharex=True, squeeze=False, height_ratios=sizes
  )[:, 0]
  for axes, batch, rows in zip(panels, batches, groups, strict=True):
    y = np.arange(len(rows))
    speed, low, high, macs = (
      array([row[name] for row in rows])
      for name in ("speedup", "speedup_low", "speedup_high", "speedup_by_macs")
    )
    axes.axvline(1, color=GREY, linewidth=0.9)
    axes.hlines(y, low, high, color=ACCENT, alpha=0.5)
    axes.plot(speed, y, "o", color=ACCENT, label="measured")
    axes.plot(
      macs, y, "o", markerfacecolor="none", color=GREY, label="as MACs promise"
    )
    axes.set_yticks(
      y, [f"{point_words(row, costs)} · {way(row)}" for row in rows], size=7.5
    )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(f"batch {batch:,}")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
  drawing.log_if_wide(
    panels[-1].xaxis,
    [
      row[x]
      for rows in groups
      for row in rows
      for x in ("speedup", "speedup_by_macs")
    ],
  )
  panels[-1].set_xlabel("times as fast as the full network")
  figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2
  )
  return figure


def point_words(row: dict, macs: Sequence[float] | np.ndarray) -> str:
  """The operating point of a row of latency.json, in short, see `target_words`."""
  return target_words(row["point"].removeprefix("target "), macs)


def way(row: dict) -> str:
  """How a row of latency.json was run, in words."""
  if row["kind"] == "full":
    return "one program"
  if row["kind"] == "anytime":
    return "all images"
  if "decides" in row:
    return f"{row['decides']} decides"
  return f"{row.get('call', row['batch']):,} a call"


@styled
def draw_samples(samples: dict[str, np.ndarray], num_exits: int):
  """The first test images that leave at the first and at the last exit."""
  ends = sorted({0, num_exits - 1})
  # A row without images takes no place, but the title of its exit does.
  shown = [(samples["exits"] == k).sum() for k in ends]
  rows = [min(-(-n // SAMPLE_COLUMNS), SAMPLE_ROWS) for n in shown]
  heights = [0.35 + 1.2 * n for n in rows]
  figure = drawing.new_figure(sum(heights))
  groups = figure.subfigures(
    len(ends), 1, squeeze=False, height_ratios=heights
  ).ravel()
  names = [drawing.clean(name, 12) for name in samples["class_names"]]
  brightest = max(int(samples["images"].max(initial=0)), 1)
  for k, group, num_rows in zip(ends, groups, rows, strict=True):
    here = np.flatnonzero(samples["exits"] == k)
    group.suptitle(
      f"Left at exit {k + 1}" + ("" if len(here) else ": none of these images"),
      fontsize=9.5,
    )
    if not num_rows:
      continue
    panels = group.subplots(num_rows, SAMPLE_COLUMNS, squeeze=False).ravel()
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
        names[label] if label == guess else f"{names[label]}\n→ {names[guess]}",
        loc="center",
        fontsize=7.5,
        color=INK if label == guess else WRONG,
      )
  return figure


@styled
def draw_training(metrics: dict[str, list[dict]], num_exits: int):
  """Losses, and calibration accuracy per exit, over the epochs.

  Many steps are drawn as means over runs of consecutive ones. Where no image was
  held out there is no accuracy, and no panel of it.
  """
  rows = 2 if metrics["evaluate"] else 1
  figure = drawing.new_figure(2.2 * rows)
  losses, *others = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
  drawn = []
  for name, color in (("train_loss", INK), ("meta_loss", ACCENT)):
    points = [
      (line["epoch"], line[name])
      for line in metrics["train"]
      if line.get(name) is not None
    ]
    if points:
      parts = np.array_split(array(points), min(len(points), MAX_LOSS_POINTS))
      means = np.array([part.mean(axis=0) for part in parts])
      losses.plot(
        *means.T,
        "." if len(parts) == 1 else "-",
        color=color,
        label=name.replace("_", " "),
      )
      losses.legend()
      drawn += list(means[:, 1])
  losses.set(title="Losses", ylabel="sum over exits (nats)")
  drawing.log_if_wide(losses.yaxis, drawn)
  (others or [losses])[-1].set_xlabel("epoch")
  if not others:
    return figure
  accuracy = others[0]
  epoch = [line["epoch"] for line in metrics["evaluate"]]
  for k, color in enumerate(drawing.exit_colors(num_exits)):
    percent = [100 * line["accuracy"][k] for line in metrics["evaluate"]]
    accuracy.plot(epoch, percent, ".-", color=color)
  accuracy.set(title="On the calibration split", ylabel="accuracy (%)")
  drawing.exit_legend(accuracy, num_exits)
  return figure


@styled
def draw_diagnostics(lines: list[dict]):
  """The meta-gradient and the weights over training, from "diagnose" lines."""
  figure = drawing.new_figure(5.2)
  (error, noise), (moved, confident) = figure.subplots(2, 2)
  epochs, last = [line["epoch"] for line in lines], lines[-1]
  for name in last["estimators"]:
    values = array(
      [line["estimators"].get(name, {}).get("relative_error") for line in lines]
    )
    if np.nanmax(values, initial=0) > 0:
      error.plot(epochs, np.where(values > 0, values, np.nan), ".-", label=name)
  if error.lines:
    error.legend(fontsize=7)
  snr, easy, hard = (
    array([line[name] for line in lines])
    for name in ("signal_to_noise_by_exit", "easy_weight", "hard_weight")
  )
  bins = drawing.middles(last["confidence_bins"])
  for k, color in enumerate(drawing.exit_colors(snr.shape[1])):
    noise.plot(epochs, snr[:, k], ".-", color=color)
    moved.plot(epochs, easy[:, k], ".-", color=color)
    moved.plot(epochs, hard[:, k], ".--", color=color)
    confident.plot(bins, array(last["weight_by_confidence"][k]), ".-", color=color)
  for axes, level in ((noise, 0), (moved, 1), (confident, 1)):
    axes.axhline(level, color=GREY, linewidth=0.9)
  error.set(
    title="Error of the estimators",
    xlabel="epoch",
    yscale="log",
    ylabel="relative to exact",
  )
  noise.set(
    title="Signal to noise, meta half", xlabel="epoch", ylabel="|mean|² / variance"
  )
  moved.set(
    title="Easiest quarter; hardest: - -", xlabel="epoch", ylabel="mean weight"
  )
  confident.set(
    title=f"Weights, epoch {epochs[-1]:g}",
    xlabel="confidence",
    ylabel="mean weight",
  )
  drawing.exit_legend(noise, snr.shape[1])
  return figure


def colors_of(methods) -> dict[str, str]:
  """A colour for each method, grey for the first, the reference."""
  reference, *others = methods
  first, *rest = drawing.METHOD_COLORS
  return {reference: first} | {
    name: rest[i % len(rest)] for i, name in enumerate(others)
  }


@styled
def draw_comparison(
  costs: np.ndarray,
  curves: Mapping[str, np.ndarray],
  macs: np.ndarray,
  exits: Mapping[str, np.ndarray],
):
  """Accuracy over cost of several methods: every seed, and the mean over seeds.

  Args:
    costs: [P] mean costs in MACs.
    curves: {method: accuracies with early exits [S P]}.
    macs: [K]; exits: {method: accuracies of the exits alone [S K]}.
  """
  figure = drawing.new_figure(4.2)
  axes = figure.add_subplot()
  x, at = 100 * costs / macs[-1], 100 * macs / macs[-1]
  colors = colors_of(curves)
  mark = "-" if len(x) > 1 else "_"  # of one cost there is no line
  for i, (name, color) in enumerate(colors.items()):
    for curve in curves[name]:
      axes.plot(x, 100 * curve, mark, color=color, linewidth=0.7, alpha=0.35)
    mean = 100 * curves[name].mean(0)
    axes.plot(x, mean, mark, color=color, linewidth=2, markersize=12)
    shift = (i - (len(colors) - 1) / 2) * 0.9
    for accuracy in exits[name]:
      axes.plot(at + shift, 100 * accuracy, ".", color=color, alpha=0.8)
  axes.set(xlabel=_cost_label(macs), ylabel="test accuracy (%)")
  _method_legend(
    figure,
    colors,
    ("mean with early exits", mark),
    ("a seed, all at one exit", "."),
  )
  return figure


def _cost_label(macs) -> str:
  scale, unit = drawing.cost_scale(macs)
  return f"mean cost, % of the full network ({macs[-1] / scale:.3g} {unit})"


def _method_legend(figure, colors, *marks: tuple[str, str], at="lower") -> None:
  """Methods by colour, and what each mark stands for, below or above the panel."""
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  handles: list[Any] = [
    Patch(color=color, label=drawing.clean(name, 40))
    for name, color in colors.items()
  ]
  handles += [
    Line2D(
      [],
      [],
      color=INK,
      label=label,
      linestyle="-" if mark == "-" else "",
      marker=None if mark == "-" else mark,
    )
    for label, mark in marks
  ]
  figure.legend(handles=handles, loc=f"outside {at} center", ncols=2)


@styled
def draw_gain(
  costs: Sequence[float],
  macs: np.ndarray,
  gains: Mapping[str, np.ndarray],
  differences: Mapping[str, dict[str, Any]],
  methods: Sequence[str],
):
  """Accuracy beyond the reference at equal mean cost: every seed a dot.

  Args:
    costs: [P] mean costs in MACs.
    macs: [K].
    gains: {method: differences to the reference, seed by seed [S P]}.
    differences: {method: `intervals.paired` of them}.
    methods: all of them, the reference first.
  """
  figure = drawing.new_figure(3.6)
  axes = figure.add_subplot()
  x = 100 * np.asarray(costs) / macs[-1]
  colors = colors_of(methods)
  step = np.diff(x).min() / (len(methods) + 1) if len(x) > 1 else 1.0
  axes.axhline(0, color=colors[methods[0]], linewidth=1.2)
  for i, (name, found) in enumerate(gains.items()):
    at = x + (i - (len(gains) - 1) / 2) * step
    color, difference = colors[name], differences[name]
    axes.plot(at, 100 * found.T, ".", color=color, alpha=0.55)
    axes.plot(at, 100 * array(difference["mean"]), "_", color=color, markersize=12)
  # The dots set the axis; an interval may leave it.
  axes.set_ylim(axes.get_ylim())
  for i, (name, difference) in enumerate(differences.items()):
    if difference["low"] is not None:
      at = x + (i - (len(gains) - 1) / 2) * step
      low, high = (100 * array(difference[end]) for end in ("low", "high"))
      axes.vlines(at, low, high, color=colors[name], linewidth=1.2)
  axes.set(
    xlabel=_cost_label(macs),
    ylabel=f"points beyond {drawing.clean(methods[0], 30)}",
  )
  marks = [("a seed", "."), ("mean", "_")]
  if any(difference["low"] is not None for difference in differences.values()):
    marks.append(("95 % interval", "|"))
  _method_legend(figure, {name: colors[name] for name in gains}, *marks)
  return figure


@styled
def draw_weights_compared(weights: Mapping[str, Sequence[dict]]):
  """Weight against loss at the last epoch: a panel per exit, a line per seed.

  Args:
    weights: {method: last "weights" line of each seed}.
  """
  exits = _some(len(next(iter(weights.values()))[0]["mean_weight"]), MAX_PANELS)
  figure, panels = drawing.panels(len(exits), 2, 1.9, sharex=True, sharey=True)
  colors = dict(
    zip(weights, drawing.METHOD_COLORS[1:] * len(weights), strict=False)
  )
  for k, axes in zip(exits, panels, strict=True):
    axes.axhline(1, color=GREY, linewidth=0.9)
    axes.set_title(f"exit {k + 1}")
    for name, lines in weights.items():
      found = []
      for line in lines:
        mean = np.where(_enough(line, k), array(line["mean_weight"][k]), np.nan)
        found.append(mean)
        x = drawing.middles(line["loss_bins"])
        axes.plot(x, mean, color=colors[name], linewidth=0.7, alpha=0.4)
      # A bin counts where every seed has samples in it.
      axes.plot(x, np.mean(found, 0), color=colors[name])
  figure.supxlabel("loss (nats)", fontsize=9)
  figure.supylabel("sample weight", fontsize=9)
  # Below, it would lie on the label of the figure.
  _method_legend(figure, colors, ("mean; thin: a seed", "-"), at="upper")
  return figure


@styled
def draw_leaving(leaving: Mapping[str, Sequence[Sequence[float]]]):
  """Shares of easy and hard test images that leave at each exit, per method.

  Args:
    leaving: {method: shares [G K] of groups of images, from easy to hard}.
  """
  figure, panels = drawing.panels(len(leaving), 2, 2.0, sharex=True, sharey=True)
  for axes, (name, shares) in zip(panels, leaving.items(), strict=True):
    shares = 100 * np.array(shares)
    below = np.zeros(len(shares))
    for k, color in enumerate(drawing.exit_colors(shares.shape[1])):
      axes.bar(range(len(shares)), shares[:, k], 0.9, bottom=below, color=color)
      below += shares[:, k]
    axes.set_title(drawing.clean(name, 26))
    axes.set_xticks([0, len(shares) - 1], ["easy", "hard"])
    axes.set_ylim(0, 100)
    axes.grid(False)
  figure.supylabel("test images leaving (%)", fontsize=9)
  drawing.exit_legend(panels[min(1, len(panels) - 1)], shares.shape[1])
  return figure
