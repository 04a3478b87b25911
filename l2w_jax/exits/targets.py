"""Thresholds for what a user wants: a cost, an accuracy, a bounded loss.

    q:0.75            the share p_k ∝ q^k of the calibration split per exit
    macs:2e7          mean MACs at most 2e7, as accurate as the family gets
    accuracy:0.93     accuracy at least 0.93, as cheap as the family gets
    risk:0.01:0.05    accuracy at most 0.01 below the full network's, with
                      probability at least 1 - 0.05

The family is the exponential one of `exit_policy.find_thresholds`, for 241 q
from 1/1000 to 1000 and both ends: everyone leaves first, everyone leaves last.
All but `risk` hold on the calibration split itself and promise nothing of other
samples. Shapes: N samples of the calibration split, K exits, Q threshold vectors;
cost in MACs per sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from l2w_jax.exits import policy as exit_policy

FAMILY_QS = np.geomspace(1e-3, 1e3, 241)
FORMS = "q:Q, macs:M, accuracy:A or risk:R:DELTA"
_NUMBERS = {"q": 1, "macs": 1, "accuracy": 1, "risk": 2}


class Target(NamedTuple):
  """kind: q, macs, accuracy or risk; values: its numbers."""

  kind: str
  values: tuple[float, ...]


class Choice(NamedTuple):
  """Thresholds [K] and what they give on the calibration split."""

  thresholds: np.ndarray
  accuracy: float
  macs: float
  exits: np.ndarray


def parse(text: str) -> Target:
  """The target that a text such as "macs:2e7" states.

  Raises:
    ValueError: not one of the four forms, or a number out of range.
  """
  kind, *numbers = text.split(":")
  try:
    values = tuple(map(float, numbers))
  except ValueError:
    values = ()
  if len(values) != _NUMBERS.get(kind):
    raise ValueError(f"target {text!r} is not of the form {FORMS}")
  if not all(math.isfinite(value) and value >= 0 for value in values):
    raise ValueError(f"target {text!r} needs finite numbers, not below 0")
  if kind == "q" and values[0] == 0:
    raise ValueError(f"target {text!r} needs q above 0")
  if kind in ("accuracy", "risk") and values[0] > 1:
    raise ValueError(
      f"target {text!r} is a fraction, at most 1; did you mean "
      f"{kind}:{values[0] / 100:g}?"
    )
  if kind == "risk" and not 0 < values[1] < 1:
    raise ValueError(f"target {text!r} needs a DELTA between 0 and 1")
  return Target(kind, values)


def choose(
  target: Target,
  confidence: ArrayLike,
  correct: ArrayLike,
  macs: ArrayLike,
  calibration: str = "held_out",
) -> Choice:
  """Thresholds that reach a target on the calibration split.

  Args:
    target: from `parse`.
    confidence, correct: [N K] on the calibration split.
    macs: [K] cost up to each exit.
    calibration: "held_out" or "released", see `find_thresholds`.

  Raises:
    ValueError: no thresholds reach the target (it says the nearest), an empty
      split, a NaN confidence, or shapes that do not fit.
  """
  # Refuses bad splits before anything is searched.
  exit_policy.exits_taken(confidence, np.zeros(np.shape(macs)))
  exit_policy.anytime(correct, macs)
  confidence, correct = np.asarray(confidence), np.asarray(correct, bool)
  macs = np.asarray(macs, np.float64)
  if target.kind == "q":
    thresholds = _find(confidence, target.values[0], calibration)
  elif target.kind == "risk":
    thresholds = _for_risk(confidence, correct, macs, *target.values, calibration)
  else:
    family = _family(confidence, calibration)
    right, cost = _score(confidence, correct, macs, family)
    if target.kind == "macs":
      found = _for_macs(right, cost, target.values[0])
    else:
      found = _for_accuracy(right, cost, target.values[0], len(correct))
    thresholds = family[found]
  right, left = exit_policy.counts(confidence, correct, thresholds)
  exits = np.asarray(left) / len(correct)
  return Choice(
    thresholds, int(right.sum()) / len(correct), float(exits @ macs), exits
  )


def _for_macs(right, cost, most) -> np.integer:
  """The most accurate within a cost; of equally accurate ones the cheapest."""
  allowed = np.flatnonzero(cost <= most)
  if not len(allowed):
    raise ValueError(
      f"no thresholds cost at most {most:g} MACs on average: the nearest is "
      f"{cost.min():g}, where everyone leaves at the first exit"
    )
  return max(allowed, key=lambda i: (right[i], -cost[i]))


def _for_accuracy(right, cost, least, num_samples) -> np.integer:
  """The cheapest of an accuracy; of equally cheap ones the most accurate."""
  # In whole samples, so that rounding decides nothing.
  allowed = np.flatnonzero(right >= math.ceil(least * num_samples - 1e-6))
  if not len(allowed):
    near = max(range(len(right)), key=lambda i: (right[i], -cost[i]))
    raise ValueError(
      f"no thresholds reach accuracy {least:g} on the {num_samples} "
      f"calibration samples: the nearest is {right[near] / num_samples:.4f},"
      f" at {cost[near]:g} MACs"
    )
  return min(allowed, key=lambda i: (cost[i], -right[i]))


def _for_risk(confidence, correct, macs, most, delta, calibration) -> np.ndarray:
  """Learn Then Test by fixed-sequence testing (Angelopoulos et al., 2021).

  A sample is harmed if the full network is right and its early answer is not,
  so accuracy falls by at most the fraction harmed. One random half of the split
  sets the family and its order, from the full network down in cost; the other
  half tests, in that order, whether the fraction harmed is above `most`, until
  the first test that cannot reject this at level delta. The test is exact: of n
  samples at most b are harmed with probability P(Binomial(n, most) <= b). The
  full network harms nobody, needs no test, and is the answer where no early
  exit passes.
  """
  from scipy import special  # JAX needs it anyway

  order = np.random.default_rng(0).permutation(len(correct))
  first, second = order[::2], order[1::2]
  family = _family(confidence[first], calibration)
  _, cost = _score(confidence[first], correct[first], macs, family)
  best = family[-1]  # the full network
  family = family[np.argsort(-cost, kind="stable")]
  taken = np.asarray(exit_policy.exits_taken(confidence[second], family))
  early = correct[second][np.arange(len(second)), taken]  # [Q N]
  harmed = (correct[second, -1] & ~early).sum(1)
  for thresholds, count in zip(family, harmed, strict=True):
    if not len(second) or special.bdtr(count, len(second), most) > delta:
      break
    best = thresholds
  return best


def _find(confidence, q, calibration) -> np.ndarray:
  """[K] thresholds, or [Q K] for Q values of q."""
  shares = exit_policy.proportions(q, confidence.shape[1])
  return np.asarray(
    exit_policy.find_thresholds(confidence, shares, calibration=calibration)
  )


def _family(confidence, calibration) -> np.ndarray:
  """[Q K] thresholds; the first lets everyone go at once, the last nobody."""
  all_first, all_last = np.full(
    (2, 1, confidence.shape[1]), -np.inf, confidence.dtype
  )
  all_last[:, :-1] = np.inf
  inside = _find(confidence, FAMILY_QS, calibration)
  return np.concatenate([all_first, inside, all_last])


def _score(confidence, correct, macs, thresholds):
  """(samples right [Q], mean MACs [Q]), exact up to one float64 division."""
  right, left = exit_policy.counts(confidence, correct, thresholds)
  return np.asarray(right).sum(-1), np.asarray(left) @ macs / len(confidence)
