"""Where a sample leaves the network, and what that costs and scores.

A sample leaves at the first exit whose confidence reaches that exit's
threshold; the last exit takes whoever is left. Budgeted batch classification
(Huang et al., ICLR 2018, Section 3) sets the thresholds on a calibration split,
never on the test set, so that exit k sees about the share p_k ∝ q^k of it:

    thresholds = find_thresholds(calibration confidence, proportions(q, K))
    curve = budgeted(test confidence, test correct, macs, thresholds)

with one point of the curve per q. `anytime` is the other curve: every sample
answered at the same exit. Shapes: N samples of a split, K exits, Q values of q.
Accuracy is a fraction, cost is in multiply-accumulates (MACs) per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from l2w_jax.method.allocation import counts_per_exit, proportions
from l2w_jax.method.confidence import MEASURES, confidence, exit_confidence

__all__ = [
  "MEASURES",
  "Breakdown",
  "Budgeted",
  "anytime",
  "breakdown",
  "budgeted",
  "check_split",
  "confidence",
  "counts",
  "exit_confidence",
  "exits_taken",
  "find_thresholds",
  "proportions",
]


class Budgeted(NamedTuple):
  """One operating point per row of thresholds.

  Attributes:
    accuracy: [] or [Q], fraction of samples right where they left.
    macs: [] or [Q], mean cost of a sample.
    exits: [K] or [Q K], fraction of samples leaving at each exit.
  """

  accuracy: Float[Array, "*Q"]
  macs: Float[Array, "*Q"]
  exits: Float[Array, "*Q K"]


def find_thresholds(
  confidence: ArrayLike,
  proportions: ArrayLike | Sequence[float],
  calibration: str = "released",
) -> Float[Array, "*Q K"]:
  """Exit k's threshold is met by its share of the samples still there.

  Exits choose in order. Of the samples no earlier exit let go, exit k's
  threshold is the confidence of the floor(N·p_k)-th most confident, and every
  remaining sample at or above it leaves: all of a tie, so more than the share
  may go. All values of q are searched in one call.

  An exit whose share is below one sample is closed: its threshold is +inf. The
  last threshold is -inf. The released code writes 1e8 and -1e8 for the two;
  apart from that, "released" equals it exactly.

  Ties can leave an exit fewer samples than its share. "released" then closes
  that exit and sends all of them on, often to the last exit: where 86 remained
  of 96 due, this cost 1.55 times the intended MACs. "held_out" lets them leave
  here. Without ties the two agree.

  Args:
    confidence: [N K] on the calibration split.
    proportions: [K], or [Q K] for Q values of q.
    calibration: "released" or "held_out", as above.

  Returns:
    Thresholds of the shape of `proportions`, in the dtype of `confidence`.

  Raises:
    ValueError: an empty split, a NaN confidence, shapes that do not fit, or
      an unknown calibration.
  """
  if calibration not in ("released", "held_out"):
    raise ValueError(
      f"calibration is {calibration!r}; give 'released' or 'held_out'."
    )
  confidence, proportions = _checked(confidence, proportions, "proportions")
  return _search(confidence, proportions, calibration)


@partial(jax.jit, static_argnames="calibration")
def _search(
  confidence: Float[Array, "N K"],
  proportions: Float[Array, "*Q K"],
  calibration: str,
) -> Float[Array, "*Q K"]:
  """Each exit is sorted once; who is still there is counted in that order."""
  num_samples = len(confidence)
  due = counts_per_exit(num_samples, proportions)
  confidence = jnp.where(confidence == 0, 0, confidence).T  # one zero, not two
  order = jnp.argsort(confidence, stable=True, descending=True)

  def one_exit(present, exit_k):
    confidence_k, order_k, due_k = exit_k
    counted = jnp.cumsum(present[order_k])
    if calibration == "held_out":
      due_k = jnp.minimum(due_k, counted[-1])
    last = confidence_k[order_k[jnp.searchsorted(counted, due_k)]]
    open_ = (due_k > 0) & (due_k <= counted[-1])
    threshold = jnp.where(open_, last, jnp.inf)
    return present & (confidence_k < threshold), threshold

  def one_q(due):
    everyone = jnp.ones(num_samples, bool)
    _, thresholds = lax.scan(one_exit, everyone, (confidence, order, due))
    return thresholds.at[-1].set(-jnp.inf)

  return one_q(due) if due.ndim == 1 else jax.vmap(one_q)(due)


def exits_taken(
  confidence: ArrayLike, thresholds: ArrayLike | Sequence[float]
) -> Int[Array, "*Q N"]:
  """A sample leaves at the first exit where confidence ≥ threshold.

  Args:
    confidence: [N K].
    thresholds: [K] or [Q K]; the last column is not read, as the last exit
      takes whoever is left.

  Returns:
    0-based exit of each sample, [N] or [Q N].

  Raises:
    ValueError: an empty split, a NaN confidence, or shapes that do not fit.
  """
  return _exits_taken(*_checked(confidence, thresholds, "thresholds"))


@jax.jit
def _exits_taken(
  confidence: Float[Array, "N K"], thresholds: Float[Array, "*Q K"]
) -> Int[Array, "*Q N"]:
  leaves = confidence >= thresholds[..., None, :]
  return jnp.argmax(leaves.at[..., -1].set(True), axis=-1)


def budgeted(
  confidence: ArrayLike,
  correct: ArrayLike,
  macs: ArrayLike | Sequence[float],
  thresholds: ArrayLike | Sequence[float],
) -> Budgeted:
  """Each sample is answered, and paid for, at the exit where it leaves.

  Samples are counted in integers and the counts divided by N once.

  Args:
    confidence: [N K] on the split to be scored.
    correct: [N K] bool, whether the answer at each exit is right.
    macs: [K] cost up to each exit.
    thresholds: [K], or [Q K] for Q operating points at once.

  Returns:
    `Budgeted`, with a leading Q where the thresholds have one.

  Raises:
    ValueError: an empty split, a NaN confidence, or shapes that do not fit.
  """
  confidence, thresholds = _checked(confidence, thresholds, "thresholds")
  correct, macs = _checked_table(correct, macs)
  if correct.shape != confidence.shape:
    raise ValueError(
      "correct must be [N K] like confidence; got "
      f"{correct.shape} and {confidence.shape}."
    )
  return _curve(confidence, correct, macs, thresholds)


@jax.jit
def _curve(
  confidence: Float[Array, "N K"],
  correct: Bool[Array, "N K"],
  macs: Float[Array, " K"],
  thresholds: Float[Array, "*Q K"],
) -> Budgeted:
  num_samples = len(confidence)
  right, left = counts(confidence, correct, thresholds)
  exits = _fraction(left, num_samples)
  return Budgeted(
    accuracy=_fraction(right.sum(-1), num_samples),
    macs=(exits * macs).sum(-1),
    exits=exits,
  )


@jax.jit
def counts(
  confidence: Float[Array, "N K"],
  correct: Bool[Array, "N K"],
  thresholds: Float[Array, "*Q K"],
) -> tuple[Int[Array, "*Q K"], Int[Array, "*Q K"]]:
  """(samples that leave right, samples that leave) at each exit, as counts."""
  taken = _exits_taken(confidence, thresholds)
  at_exit = taken[..., None] == jnp.arange(confidence.shape[1])
  return (at_exit & correct).sum(-2), at_exit.sum(-2)


class Breakdown(NamedTuple):
  """One operating point, by class (C) and exit (K).

  Attributes:
    left: [C K], samples of each class that leave at each exit; its sum over
      classes is the histogram of exits.
    right: [C K], those of them that are right.
  """

  left: Int[Array, "C K"]
  right: Int[Array, "C K"]

  @property
  def exit_accuracy(self) -> np.ndarray:
    """[K], of the samples that leave at each exit; NaN where none does."""
    return _ratio(self.right.sum(0), self.left.sum(0))

  @property
  def class_accuracy(self) -> np.ndarray:
    """[C], of each class's samples where they leave; NaN without samples."""
    return _ratio(self.right.sum(1), self.left.sum(1))

  def class_macs(self, macs: ArrayLike | Sequence[float]) -> np.ndarray:
    """[C], mean cost of each class's samples; NaN without samples."""
    return _ratio(np.asarray(self.left) @ np.asarray(macs), self.left.sum(1))


def breakdown(
  confidence: ArrayLike,
  correct: ArrayLike,
  labels: ArrayLike,
  thresholds: ArrayLike | Sequence[float],
  num_classes: int,
) -> Breakdown:
  """Which classes leave where, and how many of them are right.

  Args:
    confidence, correct: [N K] on the split to be scored.
    labels: [N] true classes, in [0, C).
    thresholds: [K], one operating point.
    num_classes: C.

  Raises:
    ValueError: an empty split, a NaN confidence, or shapes that do not fit.
  """
  confidence, thresholds = _checked(confidence, thresholds, "thresholds")
  num_exits = confidence.shape[1]
  correct, _ = _checked_table(correct, np.zeros(num_exits))
  labels = np.asarray(labels)
  if thresholds.ndim != 1 or labels.shape != confidence.shape[:1]:
    raise ValueError(
      f"breakdown needs thresholds [{num_exits}] and labels "
      f"[{len(confidence)}]; got {thresholds.shape} and {labels.shape}."
    )
  taken = np.asarray(exits_taken(confidence, thresholds))
  right = np.take_along_axis(np.asarray(correct), taken[:, None], 1)[:, 0]
  cell = labels * num_exits + taken

  def table(weights):
    flat = np.bincount(cell, weights, num_classes * num_exits)
    return flat.astype(int).reshape(num_classes, num_exits)

  return Breakdown(table(None), table(right))


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
  part, whole = np.asarray(part, float), np.asarray(whole, float)
  return np.divide(part, whole, np.full_like(part, np.nan), where=whole > 0)


def anytime(
  correct: ArrayLike, macs: ArrayLike | Sequence[float]
) -> Float[Array, " K"]:
  """Stopped at exit k, all samples are answered there, at macs[k] each.

  Args:
    correct: [N K] bool, whether the answer at each exit is right.
    macs: [K] cost up to each exit, the abscissa; only its length is read.

  Returns:
    [K], accuracy at each exit.

  Raises:
    ValueError: an empty split, or not one cost per exit.
  """
  correct, _ = _checked_table(correct, macs)
  return _anytime(correct)


@jax.jit
def _anytime(correct: Bool[Array, "N K"]) -> Float[Array, " K"]:
  return _fraction(correct.sum(0), len(correct))


def check_split(
  confidence: ArrayLike, correct: ArrayLike, macs: ArrayLike | Sequence[float]
) -> None:
  """Raises ValueError for what `budgeted` would refuse, whatever the thresholds."""
  _checked(confidence, np.asarray(macs, float), "macs")
  _checked_table(correct, macs)


def _fraction(count: Int[Array, "*Q"], total: int) -> Float[Array, "*Q"]:
  # Given a scalar, XLA multiplies by 1 / total, which is not count / total.
  return count / lax.optimization_barrier(jnp.full_like(count, total))


def _checked(
  confidence: ArrayLike, per_exit: ArrayLike | Sequence[float], name: str
) -> tuple[Float[Array, "N K"], Float[Array, "*Q K"]]:
  confidence, per_exit = jnp.asarray(confidence), jnp.asarray(per_exit)
  if confidence.ndim != 2 or 0 in confidence.shape:
    raise ValueError(
      "confidence must be [N K] with at least one sample and one exit; got "
      f"{confidence.shape}. Is the split empty?"
    )
  num_exits = confidence.shape[1]
  if per_exit.ndim not in (1, 2) or per_exit.shape[-1] != num_exits:
    raise ValueError(
      f"{name} must be [{num_exits}] or [Q {num_exits}], one per exit of "
      f"confidence {confidence.shape}; got {per_exit.shape}."
    )
  # Values are known only outside jit; inside, the caller vouches for them.
  if not isinstance(confidence, jax.core.Tracer):
    unknown = np.isnan(np.asarray(confidence)).any(1).sum()
    if unknown:
      raise ValueError(
        f"confidence is NaN for {unknown} of {len(confidence)} samples, so "
        "they have no exit; look for NaN in the logits."
      )
  return confidence, per_exit


def _checked_table(
  correct: ArrayLike, macs: ArrayLike | Sequence[float]
) -> tuple[Bool[Array, "N K"], Float[Array, " K"]]:
  correct, macs = jnp.asarray(correct, bool), jnp.asarray(macs, float)
  if correct.ndim != 2 or not len(correct) or macs.shape != correct.shape[1:]:
    raise ValueError(
      "correct must be [N K] with at least one sample, and macs [K]; got "
      f"{correct.shape} and {macs.shape}."
    )
  return correct, macs
