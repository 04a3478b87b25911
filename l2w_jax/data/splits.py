"""Which samples are held out, left out, or given a wrong label: seeded draws.

All of them look at labels alone, so they do not depend on how images are kept.
"""

from __future__ import annotations

import numpy as np


def hold_out(
  labels: np.ndarray,
  num_classes: int,
  count: int,
  seed: int,
  key: str = "calibration",
) -> np.ndarray:
  """[N] bool: `count` samples for calibration, the same number of every class.

  Or, where `key` is meta, for meta halves; `config.data` has the count under it.

  Every class gives count // C samples; the first classes in a seeded order give
  one more until the count is reached.

  Raises:
    ValueError: a class has too few samples, or none would be held out of it.
  """
  held_out = np.zeros(len(labels), bool)
  if count == 0:
    return held_out
  if count < num_classes:
    raise ValueError(
      f"config.data.{key}={count} holds no image out of some of the "
      f"{num_classes} classes; set it to {num_classes} or more, or to 0 to "
      "train on everything"
    )
  rng = np.random.default_rng((seed, {"calibration": 0, "meta": 3}[key]))
  for i, label in enumerate(rng.permutation(num_classes)):
    own = np.flatnonzero(labels == label)
    share = count // num_classes + (i < count % num_classes)
    if share >= len(own):
      raise ValueError(
        f"cannot hold {share} of the {len(own)} train images of class {label} "
        f"out for {key}; set config.data.{key} below {count}, or to 0 to train on "
        "everything"
      )
    held_out[rng.permutation(own)[:share]] = True
  return held_out


def long_tail(
  labels: np.ndarray, num_classes: int, factor: float, seed: int
) -> np.ndarray:
  """[N] bool: the samples that an exponentially long-tailed set keeps.

  Class c keeps n · factor^(-c / (C-1)) samples, rounded and at least one, where n
  is the size of the smallest class: the first class is `factor` times as large
  as the last (Cui et al., CVPR 2019).
  """
  kept = np.zeros(len(labels), bool)
  sizes = np.bincount(labels, minlength=num_classes)
  rng = np.random.default_rng((seed, 1))
  for c in range(num_classes):
    share = sizes.min() * factor ** (-c / max(num_classes - 1, 1))
    own = rng.permutation(np.flatnonzero(labels == c))
    kept[own[: max(1, round(share))]] = True
  return kept


def noisy_labels(
  labels: np.ndarray, num_classes: int, rate: float, seed: int
) -> np.ndarray:
  """Labels of which round(rate · N) are replaced by one of the other classes.

  Which ones, and by which class, is uniform (symmetric noise).
  """
  rng = np.random.default_rng((seed, 2))
  changed = rng.permutation(len(labels))[: round(rate * len(labels))]
  labels = labels.copy()
  labels[changed] += rng.integers(
    1, max(num_classes, 2), len(changed), labels.dtype
  )
  return labels % num_classes
