"""Several methods from the same seeds: a table, and pictures of the differences.

Reads run directories and needs neither JAX nor the networks. Every method has one
run for each seed; runs of one seed start from the same weights and see the same
batches, so differences to the first method, the reference, are taken seed by seed:
d_s = accuracy of the method - accuracy of the reference, and the interval is

    mean d ± t_{0.975, n-1} · standard deviation of d / √n

which covers the mean difference in 95 of 100 comparisons if the d_s are normal.
It speaks of new seeds on the same images, not of new images.

Accuracies at equal mean cost are read off each run's budgeted curve, straight
lines between its points. Accuracy is a fraction in `comparison.json` and percent in
tables, cost is in multiply-accumulates (MACs). Shapes: S seeds, K exits, P points
of a curve, N test images.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from l2w_jax.results import figures, page
from l2w_jax.run import directory, files

NUM_POINTS = 5  # mean costs in the table
NUM_DRAWN = 60  # mean costs in the pictures
NUM_GROUPS = 5  # of test images, from easy to hard
AT_Q = 0.75  # budget at which exits are counted
CONFIDENCE = 0.95
TITLES = {
  "anytime": "Test accuracy (%) of every exit",
  "budgeted": "Test accuracy (%) with early exits, at equal mean cost",
}
CAPTIONS = {
  "curves.png": "Mean over the seeds, and a band of one standard deviation. "
  "Lines: early exits. Circles: every image at one exit.",
  "gain.png": "Accuracy beyond that of the reference at equal mean cost, mean "
  "of the differences seed by seed with its 95 % t interval at each cost.",
  "weights.png": "Mean weight of the training samples in each loss bin, early "
  "and late in training; the band is one standard deviation over the seeds.",
  "leaving.png": f"Test images in {NUM_GROUPS} groups of one size, from those "
  "that the exits of the reference are surely right about to those they are "
  f"surely wrong about, and where they leave at q = {AT_Q}.",
}
# The reference is grey; the others differ in hue and lightness.
REFERENCE_COLOR = "#5f6368"
COLORS = "#c2410c #1d4ed8 #15803d #7e22ce #a16207 #0e7490 #be185d".split()


class Run(NamedTuple):
  """What a comparison needs of one run directory.

  accuracy: [K] of the exits on the test split.
  curve: [P 2] mean cost and accuracy, with early exits.
  macs: [K].
  weights: lines of kind "weights" of metrics.jsonl, by epoch.
  correct: [N K] bool; confidence: [N K]; exits: [N] exit taken at `AT_Q`.
  seconds: of training, without compiling.
  """

  accuracy: np.ndarray
  curve: np.ndarray
  macs: np.ndarray
  weights: list[dict]
  correct: np.ndarray
  confidence: np.ndarray
  exits: np.ndarray
  seconds: float


def read_run(workdir: pathlib.Path) -> Run:
  """The run of a directory.

  Raises:
    ValueError: a file is missing or cannot be read.
  """
  results = directory.read_results(workdir)
  metrics = directory.read_metrics(workdir)
  scores = directory.read_scores(workdir)
  at_q = min(results["budgeted"], key=lambda entry: abs(entry["q"] - AT_Q))
  # A threshold that is null in the file, NaN, lets nobody leave.
  thresholds = np.nan_to_num(
    np.array(at_q["thresholds"], dtype=float),
    nan=np.inf,
    posinf=np.inf,
    neginf=-np.inf,
  )
  return Run(
    accuracy=np.array([entry["accuracy"] for entry in results["anytime"]]),
    curve=np.array(
      [(entry["macs"], entry["accuracy"]) for entry in results["budgeted"]]
    ),
    macs=np.array(results["macs"]),
    weights=metrics["weights"],
    correct=scores["correct"],
    confidence=scores["confidence"],
    exits=np.argmax(scores["confidence"] >= thresholds, axis=1),
    seconds=results["seconds"]["train"],
  )


def accuracy_at(curve: np.ndarray, macs: np.ndarray) -> np.ndarray:
  """Accuracy of a budgeted curve [P 2] at mean costs, straight between points.

  Points of one cost count as their mean.
  """
  costs, place = np.unique(curve[:, 0], return_inverse=True)
  means = np.bincount(place, curve[:, 1]) / np.bincount(place)
  return np.interp(macs, costs, means)


def common_costs(runs: Sequence[Run], num: int) -> np.ndarray:
  """Evenly spaced mean costs that the curves of all runs reach.

  Raises:
    ValueError: there is no such range.
  """
  low = max(run.curve[:, 0].min() for run in runs)
  high = min(run.curve[:, 0].max() for run in runs)
  if low > high:
    raise ValueError(
      f"no mean cost is on the curves of all runs: one begins at {low:.4g} "
      f"MACs and one ends at {high:.4g}"
    )
  return np.linspace(low, high, num)


def at_equal_cost(
  runs: Mapping[str, Sequence[Run]], num: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(mean costs [num], {method: accuracies [S num]}), see `common_costs`."""
  costs = common_costs([run for found in runs.values() for run in found], num)
  return costs, {
    name: np.array([accuracy_at(run.curve, costs) for run in found])
    for name, found in runs.items()
  }


def spread(values: np.ndarray) -> dict[str, Any]:
  """{"n", "mean", "std"} over the first axis; std is None for a single value."""
  n = len(values)
  return {
    "n": n,
    "mean": values.mean(axis=0).tolist(),
    "std": values.std(axis=0, ddof=1).tolist() if n > 1 else None,
  }


def paired(values: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
  """Differences seed by seed, [S …], with the t interval of their mean.

  Returns:
    "n", "mean", "std", "low" and "high"; the last three are None for one seed.
  """
  from scipy import stats

  difference = values - reference
  found = spread(difference)
  if found["n"] == 1:
    return found | {"low": None, "high": None}
  reach = (
    stats.t.ppf((1 + CONFIDENCE) / 2, found["n"] - 1)
    * np.array(found["std"])
    / math.sqrt(found["n"])
  )
  mean = np.array(found["mean"])
  return found | {"low": (mean - reach).tolist(), "high": (mean + reach).tolist()}


def easy_to_hard(reference: Sequence[Run]) -> np.ndarray:
  """[N] group of each test image, 0 the easiest of `NUM_GROUPS` equal ones.

  Ranked by the confidence of the reference's exits, counted negative where they
  are wrong, in the mean over exits and runs: from surely right to surely wrong.
  """
  ease = np.mean(
    [np.where(run.correct, run.confidence, -run.confidence) for run in reference],
    axis=(0, 2),
  )
  group = np.empty(len(ease), int)
  group[np.argsort(-ease, kind="stable")] = (
    np.arange(len(ease)) * NUM_GROUPS // len(ease)
  )
  return group


def leaving(runs: Sequence[Run], group: np.ndarray) -> np.ndarray:
  """[NUM_GROUPS K] share of each group that leaves at each exit, over all runs."""
  num_exits = len(runs[0].macs)
  return np.array(
    [
      np.mean(
        [np.bincount(run.exits[group == g], minlength=num_exits) for run in runs],
        axis=0,
      )
      / max((group == g).sum(), 1)
      for g in range(NUM_GROUPS)
    ]
  )


def summarize(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
  """What comparison.json holds.

  Args:
    runs: the runs of each method, in the order of the seeds; the first method is
      the reference.

  Raises:
    ValueError: numbers of seeds, networks or test images that differ.
  """
  everything = [run for found in runs.values() for run in found]
  reference, *others = runs
  for name, found in runs.items():
    if len(found) != len(runs[reference]):
      raise ValueError(
        f"{name} has {len(found)} runs and {reference} {len(runs[reference])}; "
        "each needs one for every seed"
      )
  for run in everything:
    if not np.array_equal(run.macs, everything[0].macs) or len(run.exits) != len(
      everything[0].exits
    ):
      raise ValueError(
        "the runs have other networks or other test images, so they cannot "
        "be compared; use another workdir"
      )
  costs, budgeted = at_equal_cost(runs, NUM_POINTS)
  anytime = {
    name: np.array([run.accuracy for run in found]) for name, found in runs.items()
  }
  group = easy_to_hard(runs[reference])
  return {
    "reference": reference,
    "seeds": len(runs[reference]),
    "test_images": len(group),
    "confidence": CONFIDENCE,
    "macs": everything[0].macs.tolist(),
    "costs": costs.tolist(),
    "methods": {
      name: {
        "anytime": spread(anytime[name]),
        "budgeted": spread(budgeted[name]),
        "leaving": leaving(found, group).tolist(),
        "seconds": spread(np.array([run.seconds for run in found])),
      }
      for name, found in runs.items()
    },
    "differences": {
      name: {
        "anytime": paired(anytime[name], anytime[reference]),
        "budgeted": paired(budgeted[name], budgeted[reference]),
      }
      for name in others
    },
  }


def rows(summary: dict[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
  """(head, rows) of a table in percent; kind is "anytime" or "budgeted"."""
  scale, unit = figures.cost_scale(summary["macs"])
  if kind == "anytime":
    points = [(f"exit {k}:", cost) for k, cost in enumerate(summary["macs"], 1)]
  else:
    points = [("mean", cost) for cost in summary["costs"]]
  head = ["", *(f"{point} {cost / scale:.3g} {unit}" for point, cost in points)]
  table = [
    [
      f"{name} (n = {found[kind]['n']})",
      *_cells(found[kind], "{:.2f}", " ± {:.2f}", "std"),
    ]
    for name, found in summary["methods"].items()
  ]
  table += [
    [
      f"{name} - {summary['reference']}",
      *_cells(found[kind], "{:+.2f}", " [{:+.2f}, {:+.2f}]", "low", "high"),
    ]
    for name, found in summary["differences"].items()
  ]
  return head, table


def _cells(found, mean: str, spread: str, *names: str) -> list[str]:
  """Means in percent, and what is known of their spread, if anything is."""
  columns = [found["mean"]]
  if found["std"] is not None:
    columns += [found[name] for name in names]
    mean += spread
  return [
    mean.format(*(100 * x for x in column)) for column in zip(*columns, strict=True)
  ]


def _explain(summary: dict[str, Any]) -> str:
  images, seeds = summary["test_images"], summary["seeds"]
  spoken = (
    "One seed, so nothing is said about spread"
    if seeds == 1
    else f"Mean ± standard deviation over {seeds} seeds, and the mean "
    "difference seed by seed with its 95 % t interval, which speaks of "
    "new seeds on the same images"
  )
  return f"{spoken}. {images:,} test images; one is {100 / images:.2g} points."


def as_text(summary: dict[str, Any]) -> str:
  """The tables in Markdown, which is readable as it is."""
  parts = [_explain(summary)]
  for kind, title in TITLES.items():
    parts += [title, page.markdown(*rows(summary, kind))]
  seconds = []
  for name, found in summary["methods"].items():
    mean, std = found["seconds"]["mean"], found["seconds"]["std"]
    seconds.append(f"{name} {mean:.0f}" + ("" if std is None else f" ± {std:.0f}"))
  parts.append(f"Seconds of training: {', '.join(seconds)}\n")
  return "\n\n".join(parts)


def write(
  workdir: pathlib.Path, runs: Mapping[str, Sequence[pathlib.Path]]
) -> dict[str, Any]:
  """Writes comparison.json, comparison.txt and comparison/index.html.

  Args:
    workdir: where they go.
    runs: run directories of each method, in the order of the seeds.

  Returns:
    what comparison.json holds.

  Raises:
    ValueError: a run is not finished, or the runs cannot be compared.
  """
  found = {name: [read_run(path) for path in paths] for name, paths in runs.items()}
  summary = summarize(found)
  folder = workdir / "comparison"
  weighted = {
    name: runs for name, runs in found.items() if all(run.weights for run in runs)
  }
  pictures = {
    "curves.png": (draw_curves, found),
    "gain.png": summary["differences"] and (draw_gain, found),
    "weights.png": weighted and (draw_weights, weighted),
    "leaving.png": (draw_leaving, summary),
  }
  figures.write_pictures(folder, pictures)
  drawn = [name for name, how in pictures.items() if how]
  files.write(folder / "index.html", render(summary, drawn))
  files.write(workdir / "comparison.json", json.dumps(summary, indent=2) + "\n")
  files.write(workdir / "comparison.txt", as_text(summary))
  return summary


def render(summary: dict[str, Any], pictures: Sequence[str]) -> str:
  """The page, with the pictures there are."""
  others = ", ".join(summary["differences"])
  tables = "\n".join(
    f"<h2>{heading}</h2>\n{page.table(*rows(summary, kind))}"
    for kind, heading in TITLES.items()
  )
  shown = "\n".join(
    page.picture(name, caption)
    for name, caption in CAPTIONS.items()
    if name in pictures
  )
  return page.render(
    " against ".join(filter(None, [others, summary["reference"]])),
    f"""<p>{escape(_explain(summary))}
All numbers: <a href="../comparison.json">comparison.json</a>.</p>
{tables}
<h2>Pictures</h2>
{shown}""",
  )


def _colors(names) -> dict[str, str]:
  reference, *others = names
  return {
    reference: REFERENCE_COLOR,
    **dict(zip(others, itertools.cycle(COLORS), strict=False)),
  }


def draw_curves(runs: Mapping[str, Sequence[Run]]):
  """Accuracy against mean cost with a band per method, and the single exits."""
  figure, axes, scale = _over_cost(runs, 4.6)
  costs, accuracy = at_equal_cost(runs, NUM_DRAWN)
  for name, color in _colors(runs).items():
    found = 100 * accuracy[name]
    figures.band(axes, costs / scale, found.mean(0), _std(found), color, name)
    axes.plot(
      runs[name][0].macs / scale,
      100 * np.mean([run.accuracy for run in runs[name]], axis=0),
      "o",
      color=color,
      markerfacecolor="none",
      markersize=6,
    )
  axes.set(title="Accuracy against cost", ylabel="test accuracy (%)")
  figure.legend(loc="outside lower center", ncols=4)
  return figure


def draw_gain(runs: Mapping[str, Sequence[Run]]):
  """Accuracy beyond the reference at equal mean cost, with its t interval."""
  figure, axes, scale = _over_cost(runs, 3.8)
  costs, accuracy = at_equal_cost(runs, NUM_DRAWN)
  (reference, color), *others = _colors(runs).items()
  axes.axhline(0, color=color, linewidth=1)
  for name, color in others:
    found = paired(100 * accuracy[name], 100 * accuracy[reference])
    mean = np.array(found["mean"])
    reach = 0 if found["high"] is None else np.array(found["high"]) - mean
    figures.band(axes, costs / scale, mean, reach, color, name)
  axes.set(title=f"Gain over {reference} at equal mean cost", ylabel="points")
  figure.legend(loc="outside lower center", ncols=4)
  return figure


def _over_cost(runs, height: float):
  """(figure, axes over cost, divisor of the costs)."""
  scale, unit = figures.cost_scale(next(iter(runs.values()))[0].macs)
  figure = figures.new_figure(7.5, height)
  axes = figure.add_subplot(xlabel=f"cost per image, mean ({unit})")
  return figure, axes, scale


def draw_weights(runs: Mapping[str, Sequence[Run]]):
  """Mean weight against loss: a row per method, a panel per exit."""
  num_exits = len(next(iter(runs.values()))[0].macs)
  figure = figures.new_figure(max(2.1 * num_exits, 4.5), 2.2 * len(runs) + 0.8)
  panels = figure.subplots(
    len(runs), num_exits, sharex=True, sharey=True, squeeze=False
  )
  for row, (name, found) in zip(panels, runs.items(), strict=True):
    for which, color in ((0, "#f59e0b"), (-1, "#7f1d1d")):
      lines = [run.weights[which] for run in found]
      bins, label = figures.middles(lines[0]["loss_bins"]), lines[0]["epoch"]
      # A bin counts where every seed has samples in it.
      weight = np.array([line["mean_weight"] for line in lines], float)
      for axes, mean, std in zip(row, weight.mean(0), _std(weight), strict=True):
        figures.band(axes, bins, mean, std, color, f"epoch {label:g}")
    for k, axes in enumerate(row, 1):
      axes.set_title(f"{name}, exit {k}", fontsize=8)
      axes.axhline(1, color=figures.GREY, linewidth=0.8)
  panels[0, 0].legend(fontsize=7)
  figure.supxlabel("loss (nats)", fontsize=9)
  figure.supylabel("sample weight", fontsize=9)
  return figure


def draw_leaving(summary: dict[str, Any]):
  """Shares of easy and hard test images that leave at each exit, per method."""
  methods = summary["methods"]
  columns = min(len(methods), 4)
  count = math.ceil(len(methods) / columns)
  figure = figures.new_figure(max(2.4 * columns + 1.2, 5), 2.6 * count + 0.6)
  panels = figure.subplots(count, columns, sharey=True, squeeze=False).ravel()
  for axes, (name, found) in zip(panels, methods.items(), strict=False):
    figures.stack(axes, range(NUM_GROUPS), np.array(found["leaving"]), 0.9)
    axes.set_title(name)
    axes.set_xticks([0, NUM_GROUPS - 1], ["easy", "hard"])
  for axes in panels[len(methods) :]:
    axes.remove()
  figure.supylabel("test images leaving (%)", fontsize=9)
  figures.exit_legend(figure, panels[0])
  return figure


def _std(values: np.ndarray) -> np.ndarray:
  """Over the first axis; 0 for a single value."""
  return values.std(axis=0, ddof=min(len(values) - 1, 1))
