"""Image sets: train, calibration and test splits.

One registry; `config.data.source` names an entry. Images are in memory for the
resident feed, and `LazyImages` for the streaming one. Samples are put in the order
of their pixels, so that the same images give the same run however they are kept.
Thresholds are chosen on the calibration split, never on the test split.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from l2w_jax.data import digits, folder, names, pixels, splits, stored, tfds_files

# Bytes of pixels that train images may take for data.feed=auto to keep them on
# the devices, and that are looked at, at most, for channel statistics.
LIMIT = 2**30
DARK = 64  # of 255: 14 bits in 16 stay below, and images that are seen do not
SYNTHETIC_IMAGES, SYNTHETIC_CLASSES = 20_000, 100


class LazyImages:
  """Images that are made when asked for; images[rows] is uint8 [n H W channels].

  Args:
    load: number -> the whole image.
    numbers: [N], for `load`, of each image.
    size: pixels of the square that evaluation and training see; 0: the whole.
    image_shape: (H, W, channels) of an image.
    digests: uint64 [N], `stored.digest` of each whole image.
  """

  def __init__(
    self,
    load: Callable[[int], pixels.Pixels],
    numbers: np.ndarray,
    size: int,
    image_shape: tuple[int, int, int],
    digests: np.ndarray,
  ):
    self._load, self._numbers, self._size = load, numbers, size
    self.digests = digests
    self.shape = (len(numbers), *image_shape)

  def __len__(self) -> int:
    """N."""
    return len(self._numbers)

  def __getitem__(self, rows) -> np.ndarray:
    """`middle` of the images of an index array or a slice."""
    images = [self.middle(i) for i in np.arange(len(self))[rows].tolist()]
    return np.array(images, np.uint8).reshape(-1, *self.shape[1:])

  def middle(self, i: int) -> np.ndarray:
    """uint8 [H W channels]: image i as evaluation sees it."""
    return pixels.middle(self._load(int(self._numbers[i])), self._size)

  def random_crop(self, i: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H W channels]: a random crop of image i, resized."""
    return pixels.random_crop(self._load(int(self._numbers[i])), self._size, rng)

  def keep(self, rows: np.ndarray) -> LazyImages:
    """The images of an index or bool array."""
    return LazyImages(
      self._load,
      self._numbers[rows],
      self._size,
      self.shape[1:],
      self.digests[rows],
    )


class Split(NamedTuple):
  """images: uint8 [N H W channels] or lazy; labels: int32 [N], in [0, C)."""

  images: np.ndarray | LazyImages
  labels: np.ndarray

  def keep(self, rows: np.ndarray) -> Split:
    """The samples of an index or bool array."""
    lazy = isinstance(self.images, LazyImages)
    images = self.images.keep(rows) if lazy else self.images[rows]
    return Split(images, self.labels[rows])


class Dataset(NamedTuple):
  """An image set.

  calibration: empty if everything is trained on.
  meta: what meta halves are drawn from; empty if that is train, as published.
  mean, std: [channels] of the train pixels, for normalisation.
  class_names: C strings.
  """

  train: Split
  calibration: Split
  test: Split
  class_names: tuple[str, ...]
  mean: np.ndarray
  std: np.ndarray
  meta: Split = Split(np.zeros((0, 0, 0, 0), np.uint8), np.zeros(0, np.int32))

  @property
  def splits(self) -> dict[str, Split]:
    """All splits by name, meta only where there is one."""
    names = ("train", "calibration", "test") + ("meta",) * bool(
      len(self.meta.labels)
    )
    return {name: getattr(self, name) for name in names}

  @property
  def num_classes(self) -> int:
    """C."""
    return len(self.class_names)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, channels)."""
    return tuple(self.train.images.shape[1:])


class Source(NamedTuple):
  """A set as it is kept: arrays in memory, or records on disk.

  calibration: only of sources that hold it out themselves.
  """

  train: Split | stored.Records
  test: Split | stored.Records
  class_names: tuple[str, ...]
  calibration: Split | None = None


def load(config: ConfigDict) -> Dataset:
  """The image set that a data config (`config.data`) names.

  Raises:
    ValueError: no such source, or files that do not hold what they should.
  """
  kind, _, where = config.source.partition(":")
  where = os.path.expanduser(where)
  openers = {name.partition(":")[0]: opener for name, opener in SOURCES.items()}
  known = config.source in SOURCES if kind == "digits" else where
  if kind not in openers or not known:
    raise ValueError(
      f"unknown data source {config.source!r} in config.data.source; choose "
      f"one of {', '.join(SOURCES)}"
    )
  if "://" in where:
    raise ValueError(
      f"config.data.source={config.source}: images are read from a disk; copy or "
      "mount them, and name that place"
    )
  _check_crops(config)
  source = openers[kind](where, config)
  streams = _streams(source.train, config)
  if streams and config.meta:
    raise ValueError(
      f"config.data.meta={config.meta} needs images that stay on the devices, and "
      f"{config.source} streams; set config.data.feed=resident, or meta to 0"
    )
  if streams and importlib.util.find_spec("grain") is None:
    raise ValueError(
      f"{config.source} needs the streaming feed, and that needs "
      'Grain: pip install "l2w_jax[streaming]"'
    )
  class_names = tuple(map(names.readable, source.class_names))
  num_classes = len(class_names)
  if num_classes < 2:
    raise ValueError(
      f"{config.source} has one class, {class_names[0]!r}; it takes two to tell "
      "them apart"
    )
  train, test = (
    _open(split, config, streams) for split in (source.train, source.test)
  )
  _check_labels(train.labels, num_classes, f"train split of {config.source}")
  _check_labels(test.labels, num_classes, f"test split of {config.source}")
  _check_classes(train.labels, class_names, config.source)
  _check_size("test", test, train, config.source)
  if source.calibration is None:
    held_out = splits.hold_out(
      train.labels, num_classes, config.calibration, config.seed
    )
    train, calibration = train.keep(~held_out), train.keep(held_out)
  else:
    calibration = _open(source.calibration, config, streams)
    _check_labels(
      calibration.labels, num_classes, f"calibration split of {config.source}"
    )
    _check_size("calibration", calibration, train, config.source)
  for_meta = splits.hold_out(
    train.labels, num_classes, config.meta, config.seed, "meta"
  )
  train, meta = train.keep(~for_meta), train.keep(for_meta)
  if config.imbalance > 1:
    train = train.keep(
      splits.long_tail(train.labels, num_classes, config.imbalance, config.seed)
    )
  labels = splits.noisy_labels(
    train.labels, num_classes, config.label_noise, config.seed
  )
  train = train._replace(labels=labels)
  mean, std = _statistics(train.images, config)
  constant = np.flatnonzero(std == 0)
  if len(constant):
    more = f" and {len(constant) - 5} more" if len(constant) > 5 else ""
    logging.warning(
      "channel %s of the train images of %s has one value everywhere, %s; it is "
      "kept, and the network sees 0 in it",
      " and ".join(map(str, constant[:5])) + more,
      config.source,
      " and ".join(f"{value:g}" for value in mean[constant[:5]]) + more,
    )
    std = np.where(std == 0, 1.0, std)
  return Dataset(train, calibration, test, class_names, mean, std, meta)


def _check_crops(config: ConfigDict) -> None:
  """Raises ValueError if keys about crops do not fit each other."""
  if config.augment != "crop_flip":
    return
  if not config.image_size:
    raise ValueError(
      "config.data.augment=crop_flip needs the size of its crops; "
      "set config.data.image_size, such as 224"
    )
  if config.feed == "resident":
    raise ValueError(
      "config.data.augment=crop_flip cuts whole images, so the resident feed "
      "cannot serve it; set config.data.feed=streaming, or augment=shift_flip"
    )


def _open(
  split: Split | stored.Records, config: ConfigDict, streams: bool
) -> Split:
  """A split as its feed needs it: images in memory, or lazy ones."""
  size = config.image_size
  if isinstance(split, Split):
    if not (streams or size):
      return split
    height, width, channels = split.images.shape[1:]
    if size and channels not in (1, 3):
      raise ValueError(
        f"images of {channels} channels cannot be resized; set "
        "config.data.image_size to 0"
      )
    images = LazyImages(
      split.images.__getitem__,
      np.arange(len(split.labels)),
      size,
      (size or height, size or width, channels),
      np.array([stored.digest(image) for image in split.images], np.uint64),
    )
    return split._replace(images=images if streams else images[:])
  if streams:
    index = stored.read_index(split, config)
    if not size:
      stored.check_one_size(split, index)
    height, width = map(int, index.shapes[0])
    images = LazyImages(
      lambda i: stored.load(split, config, i),
      index.rows,
      size,
      (size or height, size or width, split.channels),
      index.digests,
    )
  else:
    index, images = stored.read_all(split, config)
  return Split(images, index.labels).keep(np.lexsort((index.labels, index.digests)))


def _streams(train: Split | stored.Records, config: ConfigDict) -> bool:
  """Whether the streaming feed is to be used."""
  if config.feed != "auto":
    return config.feed == "streaming"
  if config.augment == "crop_flip":
    return True
  if isinstance(train, Split):
    count, shape = len(train.labels), train.images.shape[1:]
  else:
    count, shape = len(train), _shape_of_one(train, config)
  if config.image_size:
    shape = (config.image_size, config.image_size, shape[-1])
  return count * math.prod(shape) > LIMIT


def _shape_of_one(records: stored.Records, config: ConfigDict) -> tuple[int, ...]:
  """Shape of the first image that can be read, of a few."""
  for i in range(min(len(records), 100)):
    try:
      image = pixels.decode(records.read(i)[0], records.channels, config)
      return pixels.to_array(image).shape
    except Exception:  # it will be named when all images are read
      continue
  return (0, 0, records.channels)


def _check_size(name: str, split: Split, train: Split, source: str) -> None:
  if train.images.shape[1:] != split.images.shape[1:]:
    raise ValueError(
      f"train images of {source} are {train.images.shape[1:]} and {name} "
      f"images {split.images.shape[1:]} (height, width, channels); set "
      "config.data.image_size to bring them to one size"
    )


def _check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
  wrong = labels[(labels < 0) | (labels >= num_classes)]
  if len(wrong):
    raise ValueError(
      f"the {where} has a label {wrong[0]} ({len(wrong)} are out of range); "
      f"labels count from 0 to {num_classes - 1} here"
      + (": subtract 1" if (labels.min(), labels.max()) == (1, num_classes) else "")
    )


def _check_classes(labels: np.ndarray, class_names: tuple, source: str) -> None:
  """Raises ValueError if a class has no train image; TFDS's are only named."""
  empty = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
  if not len(empty):
    return
  says = (
    f"{len(empty)} of the {len(class_names)} classes of {source} have no train "
    f"image, such as class {empty[0]} ({class_names[empty[0]]!r})"
  )
  kind = source.partition(":")[0]
  if kind == "tfds":
    logging.warning("%s; nothing can be learnt about them", says)
    return
  if kind == "folder":
    advice = "add some that can be read, or remove its directories"
  elif empty.tolist() == [0]:
    advice = "labels count from 0: if yours count from 1, subtract 1 from all"
  elif len(class_names) == 256 and labels.max() == 255:
    advice = (
      "if label 255 marks images to ignore, leave these out; labels count from 0 "
      "on without gaps"
    )
  else:
    advice = (
      "number those that have images from 0 on without gaps, and name no others in "
      "class_names"
    )
  raise ValueError(f"{says}; {advice}")


def _statistics(
  images: np.ndarray | LazyImages, config: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
  """(mean, standard deviation) [channels] of train pixels, or as configured.

  Of every s-th image, s being the least that leaves at most `LIMIT` bytes.
  """
  channels = images.shape[-1]
  if config.mean or config.std:
    if not len(config.mean) == len(config.std) == channels:
      raise ValueError(
        f"config.data.mean and config.data.std need {channels} number(s) each, "
        f"one for each channel of {config.source}, or none; got "
        f"{config.mean} and {config.std}"
      )
    return np.array(config.mean), np.array(config.std)
  rows = range(0, len(images), -(-math.prod(images.shape) // LIMIT))

  def counts_of(image):
    return np.stack(
      [np.bincount(image[..., c].ravel(), minlength=256) for c in range(channels)]
    )

  # Counting the 256 values of a byte is exact, and never needs a float copy.
  if isinstance(images, LazyImages):
    counts = sum(
      stored.in_threads(
        lambda i: counts_of(images.middle(i)), rows, "channel statistics"
      )
    )
  else:
    counts = counts_of(images[:: rows.step])
  brightest = np.flatnonzero(counts.any(axis=0)).max()
  if config.source.startswith(("folder:", "tfds:")) and brightest < DARK:
    logging.warning(
      "no train pixel of %s is brighter than %d of 255; if its files hold fewer "
      "bits than they have room for, such as 12 in 16, set "
      "config.data.grey_range, to 4095 for these",
      config.source,
      brightest,
    )
  values = np.tile(np.arange(256), (channels, 1))
  mean = np.average(values, axis=1, weights=counts)
  var = np.average((values - mean[:, None]) ** 2, axis=1, weights=counts)
  return mean, np.sqrt(var)


def _digits(where: str, config: ConfigDict) -> Source:
  del config
  arrays = digits.read(where)
  train, calibration, test = (
    Split(arrays[f"{name}_images"], arrays[f"{name}_labels"])
    for name in ("train", "calibration", "test")
  )
  return Source(train, test, tuple(map(str, arrays["class_names"])), calibration)


def _npz(where: str, config: ConfigDict) -> Source:
  """train_images, train_labels, test_images, test_labels in one .npz file.

  calibration_images and calibration_labels are optional, and so is class_names.
  """
  path = pathlib.Path(where)
  if not path.is_file():
    raise ValueError(f"no file {where!r} for config.data.source={config.source}")
  wanted = [
    f"{name}_{what}" for name in ("train", "test") for what in ("images", "labels")
  ]
  found = _read_npz(path, wanted)
  train, test = (
    _checked(path, name, found[f"{name}_images"], found[f"{name}_labels"])
    for name in ("train", "test")
  )
  calibration = None
  if "calibration_images" in found:
    calibration = _checked(
      path, "calibration", found["calibration_images"], found["calibration_labels"]
    )
  count = 1 + max(
    int(split.labels.max()) for split in (train, test, calibration or test)
  )
  if "class_names" not in found and count > len(train.labels):
    raise ValueError(
      f"labels in {path} go up to {count - 1}, with {len(train.labels)} train "
      "images; number the classes that have images from 0 on without gaps"
    )
  class_names = found.get("class_names")
  if class_names is None:
    class_names = np.arange(count)
  if class_names.size != max(class_names.shape, default=0):
    raise ValueError(
      f"class_names in {path} must be a row of names, got {class_names.dtype} "
      f"{list(class_names.shape)}"
    )
  class_names = tuple(map(names.readable, class_names.ravel().tolist()))
  names.check(class_names, str(path))
  return Source(train, test, class_names, calibration)


def _read_npz(path: pathlib.Path, wanted: list[str]) -> dict[str, np.ndarray]:
  found = {}
  with path.open("rb") as file:
    try:
      arrays = np.load(file)
      held = arrays.files
    except Exception as error:  # whatever a file that is no zip brings
      raise ValueError(
        f"{path} is not an .npz file, or damaged; it must hold "
        f"{', '.join(wanted)}, as np.savez writes them"
      ) from error
    calibration = ["calibration_images", "calibration_labels"]
    if set(calibration) & set(held):
      wanted = wanted + calibration
    missing = [name for name in wanted if name not in held]
    if missing:
      raise ValueError(
        f"{path} has no array {missing[0]}; it must hold "
        f"{', '.join(wanted)}, and holds {', '.join(held)}"
      )
    for name in [*wanted, *({"class_names"} & set(held))]:
      try:
        found[name] = arrays[name]
      except Exception as error:  # a damaged or a pickled array
        raise ValueError(
          f"array {name} in {path} cannot be read ({error}); write the file again"
        ) from error
  return found


def _checked(path, name, images, labels) -> Split:
  if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
    raise ValueError(
      f"{name}_images in {path} must be uint8 [N H W channels], got "
      f"{images.dtype} {list(images.shape)}"
    )
  if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
    raise ValueError(
      f"{name}_labels in {path} must be {len(images)} whole numbers, one for "
      f"each image, got {labels.dtype} {list(labels.shape)}"
    )
  if _channels_first(images.shape):
    raise ValueError(
      f"{name}_images in {path} are {list(images.shape)}, which looks like [N "
      "channels H W]; channels come last here: save "
      f"{name}_images.transpose(0, 2, 3, 1)"
    )
  if labels.max() >= 2**31 or labels.min() < -(2**31):
    raise ValueError(
      f"{name}_labels in {path} hold {labels.min()} to {labels.max()}; labels "
      "count the classes from 0 on"
    )
  labels = labels.astype(np.int32)
  digests = np.array([stored.digest(image) for image in images], np.uint64)
  return Split(images, labels).keep(np.lexsort((labels, digests)))


def _channels_first(shape: tuple[int, ...]) -> bool:
  """Whether [N a b c] can only be meant as N images of a channels."""
  _, a, b, c = shape
  return a < min(b, c) and (a <= 4 < c or b == c)


def _synthetic(where: str, config: ConfigDict) -> Source:
  """Noise for benchmarks: up to 20,000 images and 1 GiB, 100 classes in turn."""
  match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", where)
  shape = tuple(map(int, match.groups())) if match else (0,)
  if not math.prod(shape):
    raise ValueError(
      f"config.data.source={config.source} must name a shape as "
      "HEIGHTxWIDTHxCHANNELS, such as synthetic:32x32x3"
    )
  rng = np.random.default_rng(config.seed)

  def split(count):
    images = np.frombuffer(rng.bytes(count * math.prod(shape)), np.uint8)
    labels = np.arange(count, dtype=np.int32) % SYNTHETIC_CLASSES
    return Split(images.reshape(count, *shape), labels)

  count = max(
    2 * SYNTHETIC_CLASSES, min(SYNTHETIC_IMAGES, LIMIT // math.prod(shape))
  )
  return Source(
    split(count),
    split(max(SYNTHETIC_CLASSES, count // 10)),
    tuple(map(str, range(SYNTHETIC_CLASSES))),
  )


# What config.data.source may be -> opens it, given what is behind the colon.
SOURCES = {
  "digits": _digits,
  "digits:mixed": _digits,
  "npz:PATH": _npz,
  "tfds:NAME": lambda name, config: Source(
    *tfds_files.open_tfds(name, config.data_dir)
  ),
  "folder:PATH": lambda path, config: Source(*folder.open_folder(path)),
  "synthetic:HEIGHTxWIDTHxCHANNELS": _synthetic,
}
