"""The endpoints of `protocol.md` from results.json files.

    python experiments/endpoint.py experiments/results/populations

reads FOLDER/ARM-SEED/results.json, or the same file under the name ARM-SEED.json.
For every arm it prints the mean test accuracy with early exits over the budgets
q = 0.5 … 1.0, in percent, its difference to the first arm, seed by seed, with a
95 % t interval, and the two-sided p value; the accuracy at q = 0.7 and of each exit
likewise. --reference names the arm that the others are compared with.
"""

from __future__ import annotations

import argparse
import pathlib
import re

import numpy as np

from l2w_jax.results import intervals
from l2w_jax.run import directory
from l2w_jax.run.command import one_line_errors

LOW, HIGH = 0.5, 1.0  # budgets of the primary endpoint
NAMED = 0.7  # budget at which 40 % leave at the first of four exits


def read(folder: pathlib.Path) -> dict[str, dict[int, dict]]:
  """{arm: {seed: results}} of a folder.

  Raises:
    ValueError: no results there; a file that is damaged, edited, of a run that is
      not over or has no budgets q, of another network than the first, or a second
      one of its arm and seed.
  """
  found, first = {}, None
  for path in sorted([*folder.glob("*.json"), *folder.glob("*/results.json")]):
    name = path.parent.name if path.name == "results.json" else path.stem
    match = re.fullmatch(r"(.+)-(\d+)", name)
    if not match:
      continue
    try:
      results = directory.parse_results(path.read_bytes())
      first = first or (path, results["macs"])
      _check(results, *first)
      of_arm, seed = found.setdefault(match[1], {}), int(match[2])
      if seed in of_arm:
        raise ValueError(f"it is a second one of {match[1]}-{seed}")
    except ValueError as error:
      raise ValueError(f"cannot use {path}: {error}") from error
    of_arm[seed] = results
  if not found:
    raise ValueError(f"no ARM-SEED/results.json and no ARM-SEED.json in {folder}")
  return found


def _check(results: dict, first: pathlib.Path, macs: list[int]) -> None:
  if not results["complete"]:
    raise ValueError("its run is not over")
  if not all("q" in entry for entry in results["budgeted"]):
    raise ValueError("its budgets are no values of q; evaluate it by confidence")
  if results["macs"] != macs:
    raise ValueError(f"its exits cost {results['macs']}, those of {first} {macs}")


def endpoints(results: dict) -> dict[str, float]:
  """{name: percent} of one run."""
  budgeted = {
    round(entry["q"], 4): 100 * entry["accuracy"] for entry in results["budgeted"]
  }
  chosen = [value for q, value in budgeted.items() if LOW <= q <= HIGH]
  return {
    "mean of q 0.5 … 1.0": float(np.mean(chosen)),
    f"q = {NAMED}": budgeted[NAMED],
  } | {
    f"exit {entry['exit']}": 100 * entry["accuracy"] for entry in results["anytime"]
  }


def p_value(differences: np.ndarray) -> float:
  """Two-sided, of a mean difference of 0, by the t distribution."""
  from scipy import stats

  if not differences.any():  # the t of nothing
    return 1.0
  return float(stats.ttest_1samp(differences, 0.0).pvalue)


def table(runs: dict[str, dict[int, dict]], reference: str) -> str:
  """Markdown: a row for every arm, endpoint by endpoint."""
  values = {
    arm: {seed: endpoints(results) for seed, results in of_arm.items()}
    for arm, of_arm in runs.items()
  }
  order = [reference, *(arm for arm in values if arm != reference)]
  names = list(next(iter(values[reference].values())))
  lines = []
  for name in names:
    lines += [
      f"**{name}**",
      "",
      "| arm | seeds | accuracy (%) | difference | 95 % interval | p | each seed |",
      "|---|---|---|---|---|---|---|",
    ]
    for arm in order:
      seeds = sorted(set(values[arm]) & set(values[reference]))
      if not seeds:
        raise ValueError(f"{arm} and {reference} have no seed in common")
      own = np.array([values[arm][seed][name] for seed in seeds])
      spread = f" ± {own.std(ddof=1):.2f}" if len(own) > 1 else ""
      row = [arm, str(len(seeds)), f"{own.mean():.2f}{spread}"]
      if arm == reference:
        row += ["", "", "", " ".join(f"{x:.2f}" for x in own)]
      else:
        others = np.array([values[reference][seed][name] for seed in seeds])
        found, d = intervals.paired(own, others), own - others
        row += [f"{d.mean():+.2f}"]
        if found["low"] is not None:
          row += [
            f"[{found['low']:+.2f}, {found['high']:+.2f}]",
            f"{p_value(d):.3f}",
          ]
        else:  # of fewer than three seeds
          row += ["–", "–"]
        row += [" ".join(f"{x:+.2f}" for x in d)]
      lines.append("| " + " | ".join(row) + " |")
    lines.append("")
  return "\n".join(lines)


def main(arguments=None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--reference", default="uniform")
  options = parser.parse_args(arguments)
  with one_line_errors():
    runs = read(options.folder)
    if options.reference not in runs:
      raise ValueError(
        f"--reference={options.reference} is none of the arms {', '.join(runs)}"
      )
    print(table(runs, options.reference))


if __name__ == "__main__":
  main()
