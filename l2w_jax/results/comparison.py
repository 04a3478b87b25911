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

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2w_jax.results import drawing, figures, intervals, page
from l2w_jax.run import directory, files

NUM_POINTS = 5  # mean costs in the table
NUM_DRAWN = 60  # mean costs in the pictures
NUM_GROUPS = 5  # of test images, from easy to hard
AT_Q = 0.75  # budget at which exits are counted
TITLES = {
  "anytime": "Test accuracy (%) of every exit",
  "budgeted": "Test accuracy (%) with early exits, at equal mean cost",
}
CAPTIONS = {
  "curves": "Lines: images leave early, at the first exit that is confident "
  "enough. Dots: every image leaves at the same exit. MACs: multiply-accumulates.",
  "gain": "Differences at equal mean cost, seed by seed, so that what a seed does "
  "to both does not count.",
  "weights": "Mean weight of the training samples by their loss at the exit, late "
  "in training; 1 is plain training.",
  "leaving": f"Test images in {NUM_GROUPS} groups of one size, from those that the "
  "exits of the reference are surely right about to those they are surely wrong "
  "about, and where they leave at ",
}
# "q" or "patience" of a point, see `drawing.point_of`.
MEANINGS = {
  "q": "q sets how late images leave",
  "patience": "patience is how many exits in a row must agree",
}


class Run(NamedTuple):
  """What a comparison needs of one run directory.

  accuracy: [K] of the exits on the test split.
  curve: [P 2] mean cost and accuracy, with early exits.
  macs: [K].
  weights: lines of kind "weights" of metrics.jsonl, by epoch.
  correct: [N K] bool; confidence: [N K]; exits: [N] exit taken at `point`.
  seconds: of training, without compiling.
  point: the one nearest to `AT_Q`, as `drawing.point_of` has it.
  """

  accuracy: np.ndarray
  curve: np.ndarray
  macs: np.ndarray
  weights: list[dict]
  correct: np.ndarray
  confidence: np.ndarray
  exits: np.ndarray
  seconds: float
  point: tuple[str, float]


def read_run(workdir: files.Path) -> Run:
  """The run of a directory.

  Raises:
    ValueError: a file is missing or cannot be read.
  """
  results = directory.read_results(workdir)
  num_exits = len(results["macs"])
  metrics = directory.read_metrics(workdir, num_exits)
  scores = directory.read_scores(workdir, results)
  at_q = min(
    results["budgeted"], key=lambda entry: abs(drawing.point_of(entry)[1] - AT_Q)
  )
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
    correct=scores["test_prediction"] == scores["test_label"][:, None],
    confidence=scores["test_confidence"],
    exits=np.argmax(scores["test_confidence"] >= thresholds, axis=1),
    seconds=results["seconds"]["train"],
    point=drawing.point_of(at_q),
  )


def accuracy_at(curve: np.ndarray, macs: np.ndarray) -> np.ndarray:
  """Accuracy of a budgeted curve [P 2] at mean costs, straight between points.

  Points of one cost count as their mean.
  """
  costs, place = np.unique(curve[:, 0], return_inverse=True)
  means = np.bincount(place, curve[:, 1]) / np.bincount(place)
  return np.interp(macs, costs, means)


def common_costs(runs: Sequence[Run], num: int) -> np.ndarray:
  """Up to `num` evenly spaced mean costs that the curves of all runs reach.

  One, if they have but one in common, as those of a single exit.

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
  return np.linspace(low, high, 1 if np.isclose(low, high) else num)


def at_equal_cost(
  runs: Mapping[str, Sequence[Run]], num: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(mean costs [P], {method: accuracies [S P]}), see `common_costs`."""
  costs = common_costs([run for found in runs.values() for run in found], num)
  return costs, {
    name: np.array([accuracy_at(run.curve, costs) for run in found])
    for name, found in runs.items()
  }


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
    "confidence": intervals.CONFIDENCE,
    "macs": everything[0].macs.tolist(),
    "costs": costs.tolist(),
    "leaving_at": [list(x) for x in sorted({run.point for run in everything})],
    "methods": {
      name: {
        "anytime": intervals.spread(anytime[name]),
        "budgeted": intervals.spread(budgeted[name]),
        "leaving": leaving(found, group).tolist(),
        "seconds": intervals.spread(np.array([run.seconds for run in found])),
      }
      for name, found in runs.items()
    },
    "differences": {
      name: {
        "anytime": intervals.paired(anytime[name], anytime[reference]),
        "budgeted": intervals.paired(budgeted[name], budgeted[reference]),
      }
      for name in others
    },
  }


def rows(summary: dict[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
  """(head, rows) of a table in percent; kind is "anytime" or "budgeted"."""
  scale, unit = drawing.cost_scale(summary["macs"])
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
  if all(found[name] is not None for name in names):
    columns += [found[name] for name in names]
    mean += spread
  return [
    mean.format(*(100 * x for x in column)) for column in zip(*columns, strict=True)
  ]


def _explain(summary: dict[str, Any]) -> str:
  images, seeds = summary["test_images"], summary["seeds"]
  if seeds == 1:
    spoken = "One seed, so nothing is said about spread"
  elif seeds < intervals.MIN_SEEDS:
    spoken = (
      f"Mean ± standard deviation over {seeds} seeds, too few for an interval"
    )
  else:
    spoken = (
      f"Mean ± standard deviation over {seeds} seeds, and the mean difference "
      "seed by seed with its 95 % t interval, which speaks of new seeds on the "
      "same images"
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
  workdir: files.Path,
  runs: Mapping[str, Sequence[files.Path]],
  figure_format: str | None = None,
) -> dict[str, Any]:
  """Writes comparison.json, comparison.txt and comparison/index.html.

  Args:
    workdir: where they go.
    runs: run directories of each method, in the order of the seeds.
    figure_format: of `drawing.FORMATS`, to write the pictures into
      `comparison/figures/`, too.

  Returns:
    what comparison.json holds.

  Raises:
    ValueError: a run is not finished, or the runs cannot be compared.
  """
  found = {name: [read_run(x) for x in paths] for name, paths in runs.items()}
  summary = summarize(found)
  drawn = draw(found, summary)
  folder = workdir / "comparison"
  files.make_folder(folder)
  files.write(folder / "index.html", render(summary, drawn))
  if figure_format:
    drawing.save(folder / "figures", drawn, figure_format)
  files.write(workdir / "comparison.json", json.dumps(summary, indent=2) + "\n")
  files.write(workdir / "comparison.txt", as_text(summary))
  return summary


def render(summary: dict[str, Any], drawn: Mapping[str, Any]) -> str:
  """The page, with the figures there are."""
  names = [*summary["differences"], summary["reference"]]
  return page.render(
    "comparison.html",
    drawn,
    title=" against ".join(filter(None, [", ".join(names[:-1]), names[-1]])),
    explanation=_explain(summary),
    captions=CAPTIONS | {"leaving": _leaving_caption(summary)},
    tables={heading: rows(summary, kind) for kind, heading in TITLES.items()},
  )


def _leaving_caption(summary: dict[str, Any]) -> str:
  points = summary["leaving_at"]
  at = " or ".join(f"{name} = {value:g}" for name, value in points)
  meanings = [MEANINGS[name] for name in dict(points)]
  return f"{CAPTIONS['leaving']}{at}; {', '.join(meanings)}."


def draw(
  runs: Mapping[str, Sequence[Run]], summary: dict[str, Any]
) -> dict[str, Any]:
  """{name: figure} of a comparison, those that there is something to show in."""
  macs = np.array(summary["macs"])
  costs, curves = at_equal_cost(runs, NUM_DRAWN)
  drawn = {
    "curves": figures.draw_comparison(
      costs,
      curves,
      macs,
      {
        name: np.array([run.accuracy for run in found])
        for name, found in runs.items()
      },
    )
  }
  if summary["differences"]:
    _, budgeted = at_equal_cost(runs, NUM_POINTS)
    drawn["gain"] = figures.draw_gain(
      summary["costs"],
      macs,
      {
        name: budgeted[name] - budgeted[summary["reference"]]
        for name in summary["differences"]
      },
      {name: found["budgeted"] for name, found in summary["differences"].items()},
      list(runs),
    )
  weights = {
    name: [run.weights[-1] for run in found]
    for name, found in runs.items()
    if all(run.weights for run in found)
  }
  if weights:
    drawn["weights"] = figures.draw_weights_compared(weights)
  leaving = {name: found["leaving"] for name, found in summary["methods"].items()}
  return drawn | {"leaving": figures.draw_leaving(leaving)}
