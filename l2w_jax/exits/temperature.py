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
  bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
  return np.array(
    [
      np.abs(np.bincount(bins[:, k], correct[:, k] - confidence[:, k])).sum()
      for k in range(confidence.shape[1])
    ]
  ) / len(confidence)
