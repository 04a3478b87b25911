"""Image sets: train, calibration and test splits as arrays.

One registry; `config.data.source` names an entry. Thresholds are chosen on the
calibration split, never on the test split.
"""
from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict


class Split(NamedTuple):
  """images: uint8 [N H W channels]; labels: int32 [N], in [0, C)."""
  images: np.ndarray
  labels: np.ndarray


class Dataset(NamedTuple):
  """An image set.

  mean, std: [channels] of the train pixels, for normalisation.
  class_names: C strings.
  """
  train: Split
  calibration: Split
  test: Split
  class_names: tuple[str, ...]
  mean: np.ndarray
  std: np.ndarray

  @property
  def num_classes(self) -> int:
    """C."""
    return len(self.class_names)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, channels)."""
    return self.train.images.shape[1:]


def load(config: ConfigDict) -> Dataset:
  """The image set that a data config (`config.data`) names.

  Raises:
    ValueError: no such source.
  """
  if config.source not in SOURCES:
    raise ValueError(
        f"unknown data source {config.source!r} in config.data.source; choose "
        f"one of {', '.join(SOURCES)}")
  return SOURCES[config.source]()


def _digits() -> Dataset:
  """1,797 handwritten digits of 8×8 pixels, embedded; DIGITS.md credits them."""
  with np.load(pathlib.Path(__file__).with_name("digits.npz")) as arrays:
    splits = {
        name: Split(arrays[f"{name}_images"], arrays[f"{name}_labels"])
        for name in ("train", "calibration", "test")}
    class_names = tuple(map(str, arrays["class_names"]))
  pixels = splits["train"].images.astype(np.float64)
  return Dataset(
      **splits, class_names=class_names,
      mean=pixels.mean(axis=(0, 1, 2)), std=pixels.std(axis=(0, 1, 2)))


SOURCES = {"digits": _digits}
