"""Thresholds for what a user wants: a cost, an accuracy, a bounded loss.

    q:0.75            the share p_k ∝ q^k of the calibration split per exit
    macs:2e7          mean MACs at most 2e7, as accurate as the family gets
    accuracy:0.93     accuracy at least 0.93, as cheap as the family gets
    risk:0.01:0.05    accuracy at most 0.01 below the full network's, with
                      probability at least 1 - 0.05

The family is the exponential one of `exit_policy.find_thresholds`, for 241 q
from 1/1000 to 1000 and both ends: everyone leaves first, everyone leaves last.
Patience has few values, so its family is its levels: leave where 2, 3, … K exits
in a row have agreed. Risk tries thresholds that all exits share and that no data
chose. All but `risk` hold on the calibration split itself and promise nothing of
other samples. Shapes: N samples of the calibration split, K exits, Q threshold
vectors; cost in MACs per sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from l2w_jax.exits import policy as exit_policy
from l2w_jax.models.backbone import Backbone

QS = tuple(i / 20 for i in range(1, 40))  # the paper's 39 budgets
FAMILY_QS = np.geomspace(1e-3, 1e3, 241)
# Thresholds that `risk` tries, strict first, down to those of 1,000 classes.
SHARED = np.concatenate(
  [1 - np.geomspace(1e-6, 0.5, 220), np.geomspace(0.5, 1e-4, 60)[1:], [0]]
)
FORMS = "q:Q, macs:M, accuracy:A or risk:R:DELTA"
_NUMBERS = {"q": 1, "macs": 1, "accuracy": 1, "risk": 2}


class Target(NamedTuple):
  """What a user wants, as `parse` reads it.

  Attributes:
    kind: q, macs, accuracy or risk.
    values: its numbers.
  """

  kind: str
  values: tuple[float, ...]


class Choice(NamedTuple):
  """Thresholds and what they give on the calibration split.

  Attributes:
    thresholds: [K].
    accuracy: fraction of images right where they leave.
    macs: mean cost of an image.
    exits: [K], fraction of images leaving at each exit.
    note: what the user should know of the choice, or "".
  """

  thresholds: np.ndarray
  accuracy: float
  macs: float
  exits: np.ndarray
  note: str = ""


def parse(text: str) -> Target:
  """The target that a text such as "macs:2e7" states.

  Raises:
    ValueError: not one of the four forms, or a number out of range.
  """
  kind, *numbers = str(text).split(":")
  try:
    # Which takes "1_0", " 1" and other digits than ours as well.
    plain = all(
      re.fullmatch(r"[\w.+-]+", x, re.A) and "_" not in x for x in numbers
    )
    values = tuple(map(float, numbers)) if plain else ()
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


def check(text: str, holds_out: bool) -> None:
  """Raises ValueError for a target that the split it is chosen on cannot keep.

  Args:
    text: the target.
    holds_out: whether there is a calibration split, which nothing was trained on.
  """
  if parse(text).kind == "risk" and not holds_out:
    raise ValueError(
      f"config.evaluate.target={text} promises something of new images, which the "
      "train split cannot; hold images out with config.data.calibration, or choose "
      "another target"
    )


def check_run(text: str, backbone: Backbone, holds_out: bool) -> None:
  """As `check`, and ValueError for a cost below that of a backbone's first exit."""
  check(text, holds_out)
  kind, values = parse(text)
  if kind == "macs" and values[0] < backbone.macs[0]:
    raise _too_cheap(values[0], backbone.macs[0])


def choose(
  target: Target,
  confidence: ArrayLike,
  correct: ArrayLike,
  macs: ArrayLike,
  calibration: str = "held_out",
  measure: str = "probability",
) -> Choice:
  """Thresholds that reach a target on the calibration split.

  Args:
    target: from `parse`.
    confidence, correct: [N K] on the calibration split.
    macs: [K] cost up to each exit.
    calibration: "held_out" or "released", see `find_thresholds`.
    measure: what confidence is, one of `exit_policy.MEASURES`.

  Raises:
    ValueError: no thresholds reach the target (it says the nearest), an empty
      split, a NaN confidence, or shapes that do not fit.
  """
  exit_policy.check_split(confidence, correct, macs)
  confidence, correct = np.asarray(confidence), np.asarray(correct, bool)
  macs, note = np.asarray(macs, np.float64), ""
  if target.kind == "q":
    thresholds = for_budgets(confidence, target.values, macs, calibration, measure)[
      0
    ]
  elif target.kind == "risk":
    thresholds, note = _for_risk(confidence, correct, *target.values, measure)
  else:
    family = _family(confidence, calibration, measure)
    right, cost = _score(confidence, correct, macs, family)
    if target.kind == "macs":
      found = _for_macs(right, cost, target.values[0])
    else:
      found = _for_accuracy(right, cost, target.values[0], len(correct))
    thresholds = family[found]
  right, left = exit_policy.counts(confidence, correct, thresholds)
  exits = np.asarray(left) / len(correct)
  return Choice(
    thresholds, int(np.sum(right)) / len(correct), float(exits @ macs), exits, note
  )


def curve(
  confidence: ArrayLike, calibration: str = "held_out", measure: str = "probability"
) -> tuple[str, list[float], np.ndarray]:
  """("q", the paper's 39 budgets, thresholds [39 K]), the points of a curve.

  For patience: ("patience", 2 … K, thresholds [K - 1, K]).
  """
  if measure == "patience":
    levels = _levels(np.shape(confidence)[1])
    return "patience", levels[:, 0].astype(int).tolist(), levels
  shares = exit_policy.proportions(QS, np.shape(confidence)[1])
  return (
    "q",
    list(QS),
    np.asarray(
      exit_policy.find_thresholds(confidence, shares, calibration=calibration)
    ),
  )


def for_budgets(
  confidence: ArrayLike,
  qs: ArrayLike | Sequence[float],
  macs: ArrayLike,
  calibration: str = "held_out",
  measure: str = "probability",
) -> np.ndarray:
  """[Q K] thresholds, one row for each q.

  Patience cannot let a chosen share leave. Its row is the level whose mean cost
  is nearest to the cost that the shares of q would have.

  Args:
    confidence: [N K] on the calibration split.
    qs: Q values above 0.
    macs: [K] cost up to each exit.
    calibration, measure: see `choose`.
  """
  confidence = np.asarray(confidence)
  num_exits = confidence.shape[1]
  shares = exit_policy.proportions(qs, num_exits)
  if measure != "patience":
    return np.asarray(
      exit_policy.find_thresholds(confidence, shares, calibration=calibration)
    )
  levels = _levels(num_exits)
  _, left = exit_policy.counts(confidence, np.zeros_like(confidence, bool), levels)
  cost = np.asarray(left) @ macs / len(confidence)
  return levels[np.abs(cost - (np.asarray(shares) @ macs)[:, None]).argmin(1)]


def _for_macs(right, cost, most) -> np.integer:
  """The most accurate within a cost; of equally accurate ones the cheapest."""
  allowed = np.flatnonzero(cost <= most)
  if not len(allowed):
    raise _too_cheap(most, cost.min())
  return max(allowed, key=lambda i: (right[i], -cost[i]))


def _too_cheap(most, cheapest) -> ValueError:
  return ValueError(
    f"no thresholds cost at most {most:g} MACs on average: the nearest is "
    f"{cheapest:g}, where everyone leaves at the first exit"
  )


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


def _for_risk(confidence, correct, most, delta, measure) -> tuple[np.ndarray, str]:
  """Learn Then Test by fixed-sequence testing (Angelopoulos et al., 2021).

  A sample is harmed if the full network is right and its early answer is not,
  so accuracy falls by at most the fraction harmed. Thresholds that all exits
  share are tried from the full network down, in a sequence that no sample had a
  part in, so the whole split may test: whether the fraction harmed is above
  `most`, until the first test that cannot reject this at level delta. The test
  is exact: of n samples at most b are harmed with probability
  P(Binomial(n, most) <= b). The full network harms nobody, needs no test, and is
  the answer where no early exit passes.
  """
  from scipy import special  # JAX needs it anyway

  num_samples, num_exits = confidence.shape
  if measure == "patience":
    family = _levels(num_exits)[::-1]
  else:
    family = _shared(SHARED, num_exits)
  taken = np.asarray(exit_policy.exits_taken(confidence, family))
  early = correct[np.arange(num_samples), taken]  # [Q N]
  harmed = (correct[:, -1] & ~early).sum(1)
  passes = special.bdtr(harmed, num_samples, most) <= delta
  num_passing = len(passes) if passes.all() else int(passes.argmin())
  # Thresholds that no sample reaches harm nobody, and are the full network.
  if num_passing and taken[num_passing - 1].min() < num_exits - 1:
    return family[num_passing - 1], ""
  needed = samples_for_risk(most, delta)
  if needed == math.inf:
    why = ": no number of calibration images is enough"
  elif needed > num_samples:
    why = f": it needs {needed} calibration images at least, of {num_samples}"
  else:
    why = f" on {num_samples} calibration images"
  note = f"nothing but the full network passes risk:{most:g}:{delta:g}{why}"
  return _shared([np.inf], num_exits)[0], note


def samples_for_risk(most: float, delta: float) -> float:
  """Samples with which a test passes if it harms none: (1 - most)^n <= delta."""
  if most in (0, 1):
    return math.inf if most == 0 else 1
  return math.ceil(math.log(delta) / math.log1p(-most))


def _shared(values, num_exits) -> np.ndarray:
  """[Q K], each value at all exits but the last."""
  rows = np.repeat(np.asarray(values, np.float32)[:, None], num_exits, 1)
  rows[:, -1] = -np.inf
  return rows


def _levels(num_exits) -> np.ndarray:
  """[Q K] patience 2, 3, … K; at K only the last exit answers."""
  return _shared(np.arange(2, max(num_exits, 2) + 1), num_exits)


def _family(confidence, calibration, measure) -> np.ndarray:
  """[Q K] thresholds; the first lets everyone go at once, the last nobody."""
  num_exits = confidence.shape[1]
  first, last = _shared([-np.inf, np.inf], num_exits)[:, None]
  if measure == "patience":
    inside = _levels(num_exits)
  else:
    inside = for_budgets(confidence, FAMILY_QS, np.zeros(num_exits), calibration)
  return np.concatenate([first, inside, last])


def _score(confidence, correct, macs, thresholds):
  """(samples right [Q], mean MACs [Q]), exact up to one float64 division."""
  right, left = exit_policy.counts(confidence, correct, thresholds)
  return np.asarray(right).sum(-1), np.asarray(left) @ macs / len(confidence)
