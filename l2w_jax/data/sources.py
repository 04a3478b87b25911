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
    ValueError: no such source, or files that do not hold what they should.
  """
  kind, _, where = config.source.partition(":")
  if kind not in SOURCES:
    raise ValueError(
        f"unknown data source {config.source!r} in config.data.source; choose "
        f"one of {', '.join(SOURCES.values())}")
  return {"digits": _digits, "npz": _npz}[kind](where, config)


def hold_out(split: Split, count: int, seed: int = 0) -> tuple[Split, Split]:
  """(what is left, `count` samples drawn from it, class-balanced and seeded).

  Every class gives count // C samples; the first classes in a seeded order give
  one more until the count is reached. Both parts keep the order of the split.

  Raises:
    ValueError: a class has too few samples.
  """
  rng = np.random.default_rng(seed)
  classes = rng.permutation(np.unique(split.labels))
  drawn = np.zeros(len(split.labels), bool)
  for i, label in enumerate(classes):
    own = np.flatnonzero(split.labels == label)
    share = count // len(classes) + (i < count % len(classes))
    if share >= len(own):
      raise ValueError(
          f"cannot hold {share} of the {len(own)} train images of class {label} "
          f"out for calibration; set config.data.calibration below {count}")
    drawn[rng.permutation(own)[:share]] = True
  return (Split(split.images[~drawn], split.labels[~drawn]),
          Split(split.images[drawn], split.labels[drawn]))


def _digits(where: str, config: ConfigDict) -> Dataset:
  """1,797 handwritten digits of 8×8 pixels, embedded; DIGITS.md credits them."""
  del where, config
  with np.load(pathlib.Path(__file__).with_name("digits.npz")) as arrays:
    splits = {
        name: Split(arrays[f"{name}_images"], arrays[f"{name}_labels"])
        for name in ("train", "calibration", "test")}
    class_names = tuple(map(str, arrays["class_names"]))
  return _dataset(**splits, class_names=class_names)


def _npz(where: str, config: ConfigDict) -> Dataset:
  """train_images, train_labels, test_images, test_labels in one .npz file.

  class_names is optional. Calibration is held out of train.
  """
  path = pathlib.Path(where)
  if not path.is_file():
    raise ValueError(f"no file {where!r} for config.data.source={config.source}")
  with np.load(path) as arrays:
    wanted = [f"{name}_{what}" for name in ("train", "test")
              for what in ("images", "labels")]
    missing = [name for name in wanted if name not in arrays]
    if missing:
      raise ValueError(f"{path} has no array {missing[0]}; it must hold "
                       f"{', '.join(wanted)}, and holds {', '.join(arrays)}")
    splits = {
        name: _checked(path, name, arrays[f"{name}_images"],
                       arrays[f"{name}_labels"]) for name in ("train", "test")}
    num_classes = 1 + max(int(s.labels.max()) for s in splits.values())
    class_names = tuple(
        map(str, arrays["class_names"] if "class_names" in arrays
            else range(num_classes)))
  if num_classes > len(class_names):
    raise ValueError(f"{path} has a label {num_classes - 1}, but only "
                     f"{len(class_names)} class_names")
  train, calibration = hold_out(splits["train"], config.calibration)
  return _dataset(train, calibration, splits["test"], class_names)


def _checked(path, name, images, labels) -> Split:
  if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
    raise ValueError(
        f"{name}_images in {path} must be uint8 [N H W channels], got "
        f"{images.dtype} {list(images.shape)}")
  if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
    raise ValueError(
        f"{name}_labels in {path} must be {len(images)} whole numbers, one for "
        f"each image, got {labels.dtype} {list(labels.shape)}")
  if labels.min() < 0:
    raise ValueError(f"{name}_labels in {path} has a label {labels.min()}; "
                     "labels count from 0")
  return Split(images, labels.astype(np.int32))


def _dataset(train: Split, calibration: Split, test: Split,
             class_names: tuple[str, ...]) -> Dataset:
  """A Dataset with the channel statistics of its train split."""
  # Counting the 256 values of a byte is exact, and never needs a float copy.
  values = np.arange(256)
  counts = [np.bincount(train.images[..., c].ravel(), minlength=256)
            for c in range(train.images.shape[-1])]
  mean = np.array([np.average(values, weights=n) for n in counts])
  var = np.array([np.average((values - m)**2, weights=n)
                  for m, n in zip(mean, counts, strict=True)])
  return Dataset(train, calibration, test, class_names, mean, np.sqrt(var))


# Kind of source -> how config.data.source names it.
SOURCES = {"digits": "digits", "npz": "npz:PATH"}
