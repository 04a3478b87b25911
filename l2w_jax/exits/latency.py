"""How much time early exits really save, beside what their MACs promise.

Every way of running the network is timed on the same test images, a few calls of
each in turn, so that a machine that slows down slows all of them and each finds
the caches as it left them. Times are of whole calls, with images handed over as
NumPy arrays and answers read back: medians over rounds, each with the interval of
order statistics that holds the median of such rounds with at least 95 %.

    full       the whole network with all its exits in one program, which is what
               the MACs of the last exit count
    anytime    the stages up to one exit in one program; it leaves out the
               classifiers of earlier exits, though their MACs are counted
    early      `EarlyExit` at one of the evaluated operating points; batch 1
               twice, with the device or the host deciding; larger batches
               also as one long call, whose queues stay full
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from l2w_jax.data.sources import LazyImages
from l2w_jax.exits import early_exit
from l2w_jax.exits import policy as exit_policy
from l2w_jax.run import backend, directory, files
from l2w_jax.run.progress import Progress
from l2w_jax.training import identity

# Batch size -> (rounds, calls in a row): timed calls of each way of running.
CALLS = {1: (20, 20), 256: (12, 1)}
P95_CALLS = 100  # calls of one way without which nothing is said of the slowest
QS = (0.25, 0.5, 0.75, 1.0, 1.5)  # operating points beside the chosen one


class Way(NamedTuple):
  """One way of running: what the table says of it, and the call to be timed.

  images: how many one call answers. macs: simulated mean cost per image.
  """

  row: dict[str, Any]
  call: Callable[[np.ndarray], Any]
  images: int
  macs: float


def measure(workdir: files.Path, config: ConfigDict) -> dict[str, Any]:
  """Times an evaluated run; writes latency.json.

  Returns:
    what latency.json holds: "device" and "rows", one per way and batch size.

  Raises:
    ValueError: the run is not evaluated, or its data is not what it was
      trained on.
  """
  network = early_exit.load(workdir)
  results = directory.read_results(workdir)
  dataset, _ = identity.open_data(workdir, config)
  points = {
    f"q = {row['q']:g}" if "q" in row else f"patience {row['patience']:g}": (
      np.asarray(row["thresholds"], np.float32)
    )
    for row in results["budgeted"]
    if row.get("q", QS[0]) in QS
  }
  points = {f"target {results['chosen']['target']}": network.thresholds} | {
    name: thresholds
    for name, thresholds in points.items()
    if not np.array_equal(thresholds, network.thresholds)  # timed already
  }
  rows = time_all(network, dataset.test.images, points)
  latency = {
    "step": results["step"],
    "checkpoint": results["checkpoint"],
    "target": results["chosen"]["target"],
    "confidence": results["confidence"],
    "device": {
      "platform": jax.default_backend(),
      "kind": jax.local_devices()[0].device_kind,
    },
    "jax": jax.__version__,
    "rows": rows,
  }
  files.write(workdir / "latency.json", json.dumps(latency, indent=2) + "\n")
  return latency


def time_all(
  network: early_exit.EarlyExit,
  images: np.ndarray | LazyImages,
  points: dict[str, np.ndarray],
  calls: dict[int, tuple[int, int]] = CALLS,
) -> list[dict[str, Any]]:
  """Rows of latency.json.

  Args:
    network: what is timed; its own thresholds are not used.
    images: uint8 [N H W channels], repeated as needed.
    points: {name of an operating point: thresholds [K]}.
    calls: {batch size: (rounds, calls of each way in a row in a round)}.
  """
  rows = []
  total = sum(rounds for rounds, _ in calls.values())
  with Progress(total, unit="round", label="latency") as progress:
    progress.note(backend.describe())
    done = 0
    for batch, (rounds, in_a_row) in calls.items():
      needed = np.resize(np.arange(len(images)), batch * rounds * in_a_row)
      own = images[needed]
      with progress.compiling(f"batch {batch}"):
        ways = _ways(network, own, points, batch)
        network.warm_up(batch)
        for way in ways:
          way.call(own[: way.images])
      seconds = {i: [] for i in range(len(ways))}
      for r in range(rounds):
        for i, way in enumerate(ways):
          for call in range(r * in_a_row, (r + 1) * in_a_row):
            start = 0 if way.images > batch else call * batch
            began = time.perf_counter()
            way.call(own[start : start + way.images])
            seconds[i].append(time.perf_counter() - began)
        done += 1
        progress.update(done, {"batch": batch})
      rows += _rows(ways, seconds, rounds, batch)
  return rows


def _ways(network, images, points, batch) -> list[Way]:
  macs = network.backbone.macs
  num_exits = len(macs)
  ways = []
  last = num_exits - 1
  kinds = [("full", "all exits", last, slice(None))] + [
    ("anytime", f"exit {k + 1}", k, slice(k, None)) for k in range(num_exits)
  ]
  for kind, point, k, kept in kinds:
    program = jax.jit(lambda x, k=k, kept=kept: _answers(network, x, k)[kept])
    ways.append(
      Way(
        {"kind": kind, "point": point},
        lambda x, f=program: jax.device_get(f(x)),
        batch,
        float(macs[k]),
      )
    )
  _, confidence = network.simulate(images)
  for name, thresholds in points.items():
    taken = np.asarray(exit_policy.exits_taken(confidence, thresholds))
    cost = float(macs[taken].mean())
    other = network.with_thresholds(thresholds)
    if batch == 1:
      ways += [
        Way(
          {"kind": "early", "point": name, "decides": "device"},
          lambda x, n=other: n.answer(x[0]),
          1,
          cost,
        ),
        Way(
          {"kind": "early", "point": name, "decides": "host"},
          other.predict,
          1,
          cost,
        ),
      ]
    else:
      ways += [
        Way(
          {"kind": "early", "point": name, "call": size}, other.predict, size, cost
        )
        for size in (batch, len(images))
      ]
  return ways


def _answers(network: early_exit.EarlyExit, images, last: int):
  """[(label, confidence)] of every exit up to one, in one program."""
  state, answers = images, []
  for k in range(last + 1):
    state = network.stage(k, state)
    answers.append((state.label, state.confidence))
  return answers


def _rows(ways, seconds, rounds, batch) -> list[dict[str, Any]]:
  full = next(i for i, way in enumerate(ways) if way.row["kind"] == "full")
  # [rounds] seconds per image of each way, a round being the median of its calls.
  by_round = [
    np.median(np.reshape(seconds[i], (rounds, -1)), 1) / way.images
    for i, way in enumerate(ways)
  ]
  rows = []
  for i, way in enumerate(ways):
    time_, low, high = (1e3 * way.images * x for x in median_interval(by_round[i]))
    speedup = median_interval(by_round[full] / by_round[i])
    many = len(seconds[i]) >= P95_CALLS
    rows.append(
      {
        **way.row,
        "batch": batch,
        "rounds": rounds,
        "calls": len(seconds[i]),
        "macs": way.macs,
        "ms": time_,
        "ms_low": low,
        "ms_high": high,
        "p95_ms": 1e3 * float(np.percentile(seconds[i], 95)) if many else None,
        "images_per_second": 1e3 * way.images / time_,
        "speedup": speedup[0],
        "speedup_low": speedup[1],
        "speedup_high": speedup[2],
        "speedup_by_macs": ways[full].macs / way.macs,
      }
    )
  return rows


def median_interval(values: ArrayLike) -> tuple[float, float, float]:
  """(median, low, high) of n values, distribution-free.

  Low and high are the innermost two of the sorted values, equally far from both
  ends, that hold the median of the population with at least 95 %; the smallest
  and the largest where no two do (n < 6).
  """
  from scipy import stats  # JAX needs it anyway

  values = np.sort(np.asarray(values, float))
  n = len(values)
  # P(the median lies outside the j-th from either end) = 2 P(Binomial(n, ½) < j).
  j = max(1, int(stats.binom.ppf(0.025, n, 0.5)))
  return float(np.median(values)), float(values[j - 1]), float(values[n - j])
