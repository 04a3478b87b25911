"""Answers for images of one's own: a table, one row per image.

    l2w-jax --mode=predict --workdir=RUN --images=FOLDER

Images are seen as in the evaluation: decoded, resized and cropped alike, each
leaving at the first exit that is confident enough.
"""

from __future__ import annotations

import csv
import io
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from l2w_jax.data import folder, pixels, stored
from l2w_jax.exits import early_exit
from l2w_jax.run import backend, directory, files
from l2w_jax.run.progress import Progress

CHUNK = 1024  # images that are in memory at a time
OTHERS = 5  # of the likeliest classes that have a probability in the table
# Keys of config.data that say where images are and which are read, not how a
# network sees them; they may differ from the run's.
FREE_KEYS = ("data.corrupt", "data.max_pixels", "data.grey_range")


class Files:
  """Image files: `names` [N], and their pixels."""

  def __init__(self, paths, names, config: ConfigDict, channels: int):
    self._paths, self.names = paths, names
    self._config, self._channels = config.data, channels

  def read(self, i: int) -> np.ndarray:
    """uint8 [H W channels] of image i, as evaluation would see it."""
    encoded = folder.read_file(self._paths[i])
    image = pixels.decode(encoded, self._channels, self._config)
    return pixels.middle(image, self._config.image_size)


class Rows:
  """Images in one array, named by their row."""

  def __init__(self, images: np.ndarray, config: ConfigDict):
    self._images, self._size = images, config.data.image_size
    self.names = [str(i) for i in range(len(images))]

  def read(self, i: int) -> np.ndarray:
    """uint8 [H W channels] of row i, as evaluation would see it."""
    return pixels.middle(np.array(self._images[i]), self._size)


def open_images(
  where: pathlib.Path, config: ConfigDict, channels: int
) -> Files | Rows:
  """The images of a folder, at any depth, of one file, or of a .npy array.

  Args:
    where: that folder or file.
    config: of the run.
    channels: 1 or 3, of the network.

  Raises:
    ValueError: nothing is there, or nothing that can be read.
  """
  if not where.exists():
    raise ValueError(
      f"--images={where}: there is nothing; name a folder, an image or a .npy file"
    )
  if where.is_dir():
    paths = folder.image_files(where)
    if not paths:
      raise ValueError(
        f"--images={where} has no image ({', '.join(folder.SUFFIXES)})"
      )
    return Files(
      paths, [str(path.relative_to(where)) for path in paths], config, channels
    )
  if not where.is_file():
    raise ValueError(
      f"--images={where} is a pipe or a device; copy what it holds to a file first"
    )
  if where.suffix.lower() != ".npy":
    return Files([where], [where.name], config, channels)
  try:
    images = np.load(where, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(
      f"--images={where} is no array that np.load reads ({stored.reason(error)})"
    ) from error
  if channels == 1 and images.ndim == 3 and images.shape[-1] != 1:
    images = images[..., None]
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != channels:
    raise ValueError(
      f"--images={where} holds {images.dtype} {list(images.shape)}; this network "
      f"takes uint8 [N H W {channels}], pixels as they are in image files"
    )
  if not len(images):
    raise ValueError(f"--images={where} holds no image")
  return Rows(images, config)


def predict(
  workdir: files.Path, images: pathlib.Path, out: files.Path, config: ConfigDict
) -> dict[str, Any]:
  """Writes the answers of an evaluated run as CSV.

  A row has the name of the image, label, class, exit (from 1), confidence (by the
  network's measure), probability of the label (with that exit's temperature), cost
  in MACs, and then other classes with their probabilities, the likeliest first. Of
  an image that is left out it has the name alone.

  Args:
    workdir: of the run.
    images: see `open_images`.
    out: the table.
    config: of the run; its target, and keys of `FREE_KEYS`, may be others.

  Returns:
    {"images", "left_out", "seconds", "cost" (mean, of the full network's),
    "exits" [K]}.

  Raises:
    ValueError: images of another kind than the network's; one that cannot be
      read, unless config.data.corrupt is skip; or a target that is not reached.
      The first images are read before anything compiles, others when they are due.
  """
  results = directory.read_results(workdir)
  shape = tuple(results["image_shape"])
  found = open_images(images, config, shape[-1])
  parts = np.array_split(np.arange(len(found.names)), -(-len(found.names) // CHUNK))
  skip = config.data.corrupt == "skip"
  first = _read(found, parts[0], shape, skip)  # told before anything compiles
  target = config.evaluate.target
  network = early_exit.load(
    workdir, None if target == results["chosen"]["target"] else target
  )
  table, exits = io.StringIO(), np.zeros(len(results["macs"]), int)
  writer = csv.writer(table, lineterminator="\n")
  head = _head(len(results["class_names"]))
  writer.writerow(head)
  left_out, largest = [], max(map(len, parts))
  with Progress(len(found.names), unit="image", label="predict") as progress:
    progress.note(backend.describe())
    with progress.compiling("the stages"):
      network.warm_up(largest)
    began = time.monotonic()
    for part in parts:
      batch, bad = first or _read(found, part, shape, skip)
      first, rows = None, {}
      if len(batch):
        # Of one size, though some are left out: another one may be compiled anew.
        answers = network.predict(np.resize(batch, (largest, *shape)))
        good = [i for i in part if i not in bad]
        exits += np.bincount(answers.exit[: len(good)] - 1, minlength=len(exits))
        rows = dict(zip(good, _rows(answers), strict=False))
      blank = [""] * (len(head) - 1)
      writer.writerows([found.names[i], *rows.get(i, blank)] for i in part)
      left_out += [f"{found.names[i]} {why}" for i, why in bad.items()]
      progress.update(int(part[-1]) + 1, {})
  if left_out:
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    logging.warning("left out: %s%s", "; ".join(left_out[:3]), more)
  files.write(out, table.getvalue().encode(errors="backslashreplace"))
  total = max(exits.sum(), 1)
  return {
    "images": int(exits.sum()),
    "left_out": len(left_out),
    "seconds": time.monotonic() - began,
    "cost": float(exits @ results["macs"] / total / results["macs"][-1]),
    "exits": (exits / total).tolist(),
  }


def _read(found, part, shape, skip):
  """(uint8 [n H W channels], {number: why not}) of some images."""

  def read(i):
    try:
      image = found.read(int(i))
    except Exception as error:  # decoders raise anything
      return stored.reason(error)
    if image.shape != shape:
      has, takes = ("×".join(map(str, x)) for x in (image.shape, shape))
      return (
        f"has {has} pixels and channels; the network takes {takes}, and was "
        "trained without resizing (config.data.image_size)"
      )
    return image

  images, bad = [], {}
  with ThreadPoolExecutor(stored.num_threads()) as pool:
    read_all = list(pool.map(read, part))
  for i, image in zip(part, read_all, strict=True):
    if isinstance(image, str):
      bad[i] = image
    else:
      images.append(image)
  if bad and not skip:
    i, why = next(iter(bad.items()))
    raise ValueError(
      f"image {found.names[i]} {why}; mend it, or leave out such images with "
      "--config.data.corrupt=skip"
    )
  return np.array(images, np.uint8), bad


def _head(num_classes: int) -> list[str]:
  others = range(2, min(OTHERS, num_classes) + 1)
  return "image label class exit confidence probability macs".split() + [
    f"{what}_{i}" for i in others for what in ("class", "probability")
  ]


def _rows(answers: early_exit.Answers) -> Iterator[list[Any]]:
  """Cells behind the name, image by image."""
  probabilities = answers.probabilities(scaled=True)
  for i, label in enumerate(answers.label):
    # Patience may choose another label than the exit's likeliest class.
    likeliest = np.argsort(-answers.logits[i], kind="stable")[: OTHERS + 1]
    row = [label, answers.class_names[label], answers.exit[i]]
    row += [f"{answers.confidence[i]:.6g}", f"{probabilities[i, label]:.6g}"]
    row.append(f"{answers.macs[i]:.0f}")
    for c in likeliest[likeliest != label][: OTHERS - 1]:
      row += [answers.class_names[c], f"{probabilities[i, c]:.6g}"]
    yield row
