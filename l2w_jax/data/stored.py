"""Encoded images, one record each: checked once, decoded all at once or later.

A set is read through once: every image is decoded, so that a broken one is known
by name before training begins, and gets a digest of its pixels, by which samples
are put in an order that does not depend on how they are kept. Of a set that stays
on disk the outcome is remembered, file by file, for as long as a file does not
change; what could not be read is tried again at every start.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from l2w_jax.data import pixels, remembered
from l2w_jax.run.progress import Progress

CHUNK = 64  # images that a thread takes at a time


@runtime_checkable
class Records(Protocol):
  """N encoded images of a split.

  title: names the split in messages. channels: 1 or 3. files: that hold it.
  labels: int [N], where something other than the files says them; else None.
  """

  title: str
  channels: int

  @property
  def files(self) -> Sequence[pathlib.Path]:
    """See above."""

  @property
  def labels(self) -> np.ndarray | None:
    """See above."""

  def __len__(self) -> int:
    """N."""

  def read(self, i: int) -> tuple[bytes, int]:
    """(encoded image, label) of record i."""

  def place(self, i: int) -> tuple[int, int]:
    """(number of the file that record i is in, number of the record in it)."""

  def where(self, i: int) -> str:
    """Where record i lies, for a message."""


class Index(NamedTuple):
  """What reading through a split has found, one row per readable image.

  rows: int64 [N] record numbers. labels: int32 [N]. digests: uint64 [N].
  shapes: int64 [N 2], height and width in pixels.
  """

  rows: np.ndarray
  labels: np.ndarray
  digests: np.ndarray
  shapes: np.ndarray


# Of every readable record; labels are left out where the files do not say them.
REMEMBERED = {
  "keys": np.uint64,
  "labels": np.int32,
  "digests": np.uint64,
  "shapes": np.int64,
}


def num_threads() -> int:
  """Cores that this process may use."""
  return (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count() or 1
  )


def digest(image: np.ndarray) -> int:
  """64 bits of the SHA-1 of the pixels."""
  return int.from_bytes(
    hashlib.sha1(np.ascontiguousarray(image).data).digest()[:8], "little"
  )


def in_threads(
  work: Callable[[int], Any], rows: Sequence[int], label: str, unit: str = "image"
) -> Iterator[Any]:
  """work(row) of every row, in order, on all cores, with a progress line."""

  def chunk(part):
    return list(map(work, part))

  parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
  done = 0
  with (
    Progress(len(rows), unit=unit, label=label) as progress,
    ThreadPoolExecutor(num_threads()) as pool,
  ):
    progress.begin()  # parts end together, not one after the other
    for results in pool.map(chunk, parts):
      yield from results
      done += len(results)
      progress.update(done, {})


def read_all(records: Records, config: ConfigDict) -> tuple[Index, np.ndarray]:
  """(index, uint8 [N H W channels]) of a split that fits into memory.

  Args:
    records: the split.
    config: the data config.

  Raises:
    ValueError: unreadable images, or images of different sizes.
  """
  size = config.image_size
  found, images = _examine(
    records, config, lambda image: pixels.middle(image, size), range(len(records))
  )
  index = _judge(records, found, config.corrupt)
  if size == 0:
    check_one_size(records, index)
  return index, np.stack(images)


def read_index(records: Records, config: ConfigDict) -> Index:
  """The index of a split that stays on disk; what is remembered is not read again.

  Raises:
    ValueError: unreadable images.
  """
  where = os.path.abspath(os.path.commonpath(records.files))
  name = (
    f"index 3 {records.title} {where} {records.channels} {config.max_pixels}"
    f" {config.grey_range}"
  )
  keys = _keys(records)
  before = remembered.load(name, REMEMBERED)
  known = (
    {}
    if before is None
    else {key: i for i, key in enumerate(before["keys"].tolist())}
  )
  new = [row for row, key in enumerate(keys) if key not in known]
  found, _ = _examine(records, config, lambda image: None, new)
  if before is not None and len(new) < len(keys):
    rows = np.array([row for row, key in enumerate(keys) if key in known])
    places = [known[keys[row]] for row in rows]
    merged = np.concatenate([rows, found["rows"]])
    order = np.argsort(merged)
    found["rows"] = merged[order]
    for field in ("labels", "digests", "shapes"):
      merged = np.concatenate([before[field][places], found[field]])
      found[field] = merged[order]
  if records.labels is not None:  # those of now
    found["labels"] = records.labels[found["rows"]].astype(np.int32)
  if len(found["rows"]) + len(new) > len(keys):  # some of the new can be read
    keep = [row for row in found["rows"] if keys[row] is not None]
    at = np.isin(found["rows"], keep)
    arrays = {field: found[field][at] for field in ("labels", "digests", "shapes")}
    arrays["keys"] = np.array([keys[row] for row in keep], np.uint64)
    remembered.save(name, arrays, records.title)
  return _judge(records, found, config.corrupt)


def _keys(records: Records) -> list[int | None]:
  """What stands for every record and does not outlast a change of its file."""
  stamps = [remembered.stamp(path) for path in records.files]
  places = map(records.place, range(len(records)))
  return [
    None if stamps[file] is None else remembered.key(f"{stamps[file]} {number}")
    for file, number in places
  ]


def check_one_size(records: Records, index: Index) -> None:
  """Raises ValueError unless all images are of one size."""
  other = np.flatnonzero((index.shapes != index.shapes[0]).any(axis=1))
  if len(other):
    one, another = (
      f"{index.shapes[i][1]}×{index.shapes[i][0]} pixels in "
      f"{records.where(int(index.rows[i]))}"
      for i in (0, other[0])
    )
    raise ValueError(
      f"images of {records.title} differ in size: {one}, {another}; set "
      "config.data.image_size to bring them to one"
    )


def _examine(
  records: Records, config: ConfigDict, view: Callable, rows: Sequence[int]
) -> tuple[dict[str, np.ndarray], list]:
  """What an `Index` holds, and what is bad; view(image) of every readable image."""

  def examine(i):
    try:
      encoded, label = records.read(i)
      image = pixels.decode(encoded, records.channels, config)
      whole = pixels.to_array(image)
      return label, digest(whole), whole.shape[:2], view(image)
    except Exception as error:  # decoders and record readers raise anything
      return reason(error)

  good, bad, reasons = [], [], []
  results = in_threads(examine, rows, f"read {records.title}") if rows else ()
  for i, result in zip(rows, results, strict=True):
    if isinstance(result, str):
      bad.append(i)
      reasons.append(result)
    else:
      good.append((i, *result))
  good_rows, labels, digests, shapes, images = (
    zip(*good, strict=True) if good else [()] * 5
  )
  return {
    "rows": np.array(good_rows, np.int64),
    "labels": np.array(labels, np.int32),
    "digests": np.array(digests, np.uint64),
    "shapes": np.array(shapes, np.int64).reshape(-1, 2),
    "bad": np.array(bad, np.int64),
    "reasons": np.array(reasons, str),
  }, list(images)


def reason(error: Exception) -> str:
  """What an error says, in one line, without the path that will stand before it."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror.lower()
  kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
  return " ".join(f"{kind}{error}".split())


def load(records: Records, config: ConfigDict, i: int) -> Image.Image:
  """The image of record i, which could be read when training began.

  Raises:
    ValueError: it cannot be read any more.
  """
  try:
    return pixels.decode(records.read(i)[0], records.channels, config)
  except Exception as error:  # decoders and record readers raise anything
    raise ValueError(
      f"{records.where(i)} cannot be read any more ({reason(error)}); bring it "
      "back, and the same command goes on from the last checkpoint"
    ) from error


def _judge(records: Records, found: dict, corrupt: str) -> Index:
  """Names and counts unreadable images; raises unless they are to be skipped."""
  index = Index(*(found[name] for name in Index._fields))
  bad = found["bad"].tolist()
  if not bad:
    return index
  named = "; ".join(
    f"{records.where(i)} ({reason})"
    for i, reason in zip(bad[:3], found["reasons"][:3], strict=True)
  )
  more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
  says = (
    f"{len(bad)} of {len(records)} images of {records.title} cannot be "
    f"read: {named}{more}"
  )
  if corrupt != "skip" or len(bad) == len(records):
    raise ValueError(
      f"{says}; repair or delete them, or set "
      "config.data.corrupt=skip to go on without them"
    )
  logging.warning("%s; going on without them", says)
  return index
