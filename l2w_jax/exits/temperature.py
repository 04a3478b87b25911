"""Whether confidences are honest: calibration error, and one number to mend it.

Dividing the logits of exit k by a temperature T_k, fitted by the likelihood of a
calibration split, changes no prediction (Guo et al., ICML 2017). Shapes: N
samples, K exits, C classes, M bins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

NUM_BINS = 15
LOWEST, HIGHEST = 0.01, 100.0
ENOUGH = 1_000  # samples, for an error that says more than their number


def fit(logits: ArrayLike, labels: ArrayLike) -> Float[Array, " K"]:
  """Temperature of each exit that makes the labels most likely.

  The mean negative log-likelihood is convex in s = 1 / T, with derivative
  mean(E_p[z] - z_label) for logits z; its root is bisected in ln s. A split that
  an exit gets wholly right has none: T is kept within [0.01, 100].

  Args:
    logits: [N K C] on the calibration split.
    labels: [N].

  Raises:
    ValueError: an empty split, NaN logits, or shapes that do not fit.
  """
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  if logits.ndim != 3 or not len(logits) or labels.shape != logits.shape[:1]:
    raise ValueError(
      "temperatures need logits [N K C] of at least one sample and labels "
      f"[N]; got {logits.shape} and {labels.shape}. Is the split empty?"
    )
  unknown = np.isnan(np.asarray(logits)).any((1, 2)).sum()
  if unknown:
    raise ValueError(
      f"the logits of {unknown} of {len(logits)} samples hold "
      "NaN, so no temperature fits them"
    )
  return _fit(logits, labels)


@jax.jit
def _fit(logits, labels):
  picked = jnp.take_along_axis(logits, labels[:, None, None], -1)[..., 0]

  def derivative(log_s):
    p = jax.nn.softmax(logits * jnp.exp(log_s)[:, None], -1)
    return ((p * logits).sum(-1) - picked).mean(0)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    rising = derivative(middle) > 0
    return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

  start = jnp.full(logits.shape[1], jnp.log(HIGHEST), logits.dtype)
  low, high = lax.fori_loop(0, 40, halve, (-start, start))
  return jnp.exp(-(low + high) / 2)


def scaled_confidence(
  logits: ArrayLike, temperatures: ArrayLike
) -> Float[Array, "N K"]:
  """Largest softmax probability of logits / T, [N K]."""
  scaled = jnp.asarray(logits) / jnp.asarray(temperatures)[:, None]
  return jax.nn.softmax(scaled, -1).max(-1)


def calibration_error(
  confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> np.ndarray:
  """Expected calibration error of each exit, [K], a fraction.

  The mean over samples of |accuracy - mean confidence| of the sample's bin; M
  bins of equal width on (0, 1], closed above (Guo et al., 2017, Eq. 3).

  Args:
    confidence: [N K], probabilities.
    correct: [N K] bool.
    num_bins: M.
  """
  confidence, correct = np.asarray(confidence, float), np.asarray(correct)
  bins = _bins(confidence, num_bins)
  return np.array(
    [
      np.abs(np.bincount(bins[:, k], correct[:, k] - confidence[:, k])).sum()
      for k in range(confidence.shape[1])
    ]
  ) / len(confidence)


def error_if_calibrated(
  confidence: ArrayLike, num_bins: int = NUM_BINS, draws: int = 200, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """([K] mean, [K] 97.5th percentile) of the error without any miscalibration.

  Of so few samples the error is above 0 even where every confidence is the
  probability of being right. Whether each sample is right is drawn with just that
  probability, and `calibration_error` taken of the draws.

  Args:
    confidence: [N K], probabilities.
    num_bins: M.
    draws: of the N samples.
    seed: of the draws.
  """
  confidence = np.asarray(confidence, float)
  rng = np.random.default_rng(seed)
  errors = [
    calibration_error(
      confidence, rng.random(confidence.shape) < confidence, num_bins
    )
    for _ in range(draws)
  ]
  return np.mean(errors, 0), np.percentile(errors, 97.5, 0)


def reliability(
  confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> list[dict[str, float]]:
  """Mean confidence, accuracy and number of the samples in each bin that has any.

  Args:
    confidence: [N] of one exit, probabilities.
    correct: [N] bool.
    num_bins: M.
  """
  bins = _bins(np.asarray(confidence, float), num_bins)
  return [
    {
      "confidence": float(confidence[bins == b].mean()),
      "accuracy": float(correct[bins == b].mean()),
      "samples": int((bins == b).sum()),
    }
    for b in np.unique(bins)
  ]


def _bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
  """Bins of equal width on (0, 1], closed above, counted from 0."""
  return np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
