"""Slow NumPy restatements of the method, written from its definition.

Nothing here imports the package, and nothing is clever: loops, one sample at a
time, ties broken by the lowest index because it is met first.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def proportions(q: Fraction, num_exits: int) -> list[Fraction]:
  """p_k ∝ q^k in exact arithmetic."""
  powers = [q**k for k in range(1, num_exits + 1)]
  return [power / sum(powers) for power in powers]


def allocate(confidence: np.ndarray, counts) -> np.ndarray:
  """The exit of each sample: exits pick their most confident, one by one."""
  num_samples, num_exits = confidence.shape
  exit_of_sample = np.full(num_samples, num_exits - 1)
  left = list(range(num_samples))
  for k in range(num_exits - 1):
    for _ in range(min(int(counts[k]), len(left))):
      best = left[0]
      for i in left:
        if confidence[i, k] > confidence[best, k]:
          best = i
      exit_of_sample[best] = k
      left.remove(best)
  return exit_of_sample


def meta_loss(losses: np.ndarray, exit_of_sample: np.ndarray) -> float:
  """Means over the samples of an exit, summed over the exits that have any."""
  total = 0.0
  for k in range(losses.shape[1]):
    own = [losses[i, k] for i in range(len(losses)) if exit_of_sample[i] == k]
    if own:
      total += sum(own) / len(own)
  return total


def thresholds(
  confidence: np.ndarray, counts, close_short_exits: bool = True
) -> np.ndarray:
  """The threshold search on one split, for one vector of counts."""
  num_samples, num_exits = confidence.shape
  found = np.full(num_exits, np.inf, confidence.dtype)
  left = list(range(num_samples))
  for k in range(num_exits - 1):
    due = int(counts[k])
    if due > len(left) and not close_short_exits:
      due = len(left)
    if 0 < due <= len(left):
      found[k] = sorted((confidence[i, k] for i in left), reverse=True)[due - 1]
    left = [i for i in left if confidence[i, k] < found[k]]
  found[-1] = -np.inf
  return found


def budgeted(
  confidence: np.ndarray, correct: np.ndarray, macs, found: np.ndarray
) -> tuple[float, float, np.ndarray]:
  """Accuracy, mean cost and samples per exit, walking samples through exits."""
  num_samples, num_exits = confidence.shape
  right, cost, per_exit = 0, 0.0, np.zeros(num_exits, int)
  for i in range(num_samples):
    k = 0
    while k < num_exits - 1 and confidence[i, k] < found[k]:
      k += 1
    right += bool(correct[i, k])
    cost += float(macs[k])
    per_exit[k] += 1
  return right / num_samples, cost / num_samples, per_exit
