"""Intervals: of an accuracy on n images, and of differences over seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
MIN_SEEDS = 3  # of two, it is 13 times as wide as they are apart


def of_accuracy(accuracy: ArrayLike, n: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of the 95 % interval of accuracies on n images each, any shape.

  Wilson's score interval: it speaks of other images of the same kind, and holds
  near 0 and 1 as well.
  """
  z, p, n = 1.959964, np.asarray(accuracy, float), np.maximum(n, 1)
  middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  reach = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  return np.asarray(middle - reach), np.asarray(middle + reach)


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
    "n", "mean", "std", "low" and "high"; the last two are None below `MIN_SEEDS`
    seeds, "std" for one.
  """
  from scipy import stats

  difference = values - reference
  found = spread(difference)
  if found["n"] < MIN_SEEDS:
    return found | {"low": None, "high": None}
  reach = (
    stats.t.ppf((1 + CONFIDENCE) / 2, found["n"] - 1)
    * np.array(found["std"])
    / math.sqrt(found["n"])
  )
  mean = np.array(found["mean"])
  return found | {"low": (mean - reach).tolist(), "high": (mean + reach).tolist()}
