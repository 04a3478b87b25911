"""Encoded images, one record each: checked once, decoded all at once or later.

A set is read through once: every image is decoded, so that a broken one is known
by name before training begins, and gets a digest of its pixels, by which samples
are put in an order that does not depend on how they are kept. A set that stays on
disk remembers the outcome in a cache file, for as long as its files do not change.
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

from l2w_jax.data import pixels
from l2w_jax.run import compile_cache, files
from l2w_jax.run.progress import Progress

CHUNK = 64  # images that a thread takes at a time


@runtime_checkable
class Records(Protocol):
  """N encoded images of a split.

  title: names the split in messages. channels: 1 or 3. files: that hold it.
  """

  title: str
  channels: int
  files: Sequence[pathlib.Path]

  def __len__(self) -> int:
    """N."""

  def read(self, i: int) -> tuple[bytes, int]:
    """(encoded image, label) of record i."""

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
    hashlib.sha1(np.ascontiguousarray(image)).digest()[:8], "little"
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
    for results in pool.map(chunk, parts):
      yield from results
      done += len(results)
      progress.update(done, {})


def read_all(records: Records, size: int, corrupt: str) -> tuple[Index, np.ndarray]:
  """(index, uint8 [N H W channels]) of a split that fits into memory.

  Args:
    records: the split.
    size: pixels of the square that `pixels.middle` makes of an image; 0: images
      stay as they are.
    corrupt: "fail" or "skip".

  Raises:
    ValueError: unreadable images, or images of different sizes.
  """
  found, images = _examine(records, lambda image: pixels.middle(image, size))
  index = _judge(records, found, corrupt)
  if size == 0:
    check_one_size(records, index)
  return index, np.stack(images)


def read_index(records: Records, corrupt: str) -> Index:
  """The index of a split that stays on disk; from the cache if it is there.

  Raises:
    ValueError: unreadable images.
  """
  found = cached("index", records, lambda: _examine(records, lambda image: None)[0])
  return _judge(records, found, corrupt)


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


def _examine(records: Records, view) -> tuple[dict[str, np.ndarray], list]:
  """What an index file holds, and view(image) of every readable image."""

  def examine(i):
    try:
      encoded, label = records.read(i)
      image = pixels.decode(encoded, records.channels)
      whole = pixels.to_array(image)
      return label, digest(whole), whole.shape[:2], view(image)
    except Exception as error:  # decoders and record readers raise anything
      return f"{type(error).__name__}: {error}".splitlines()[0]

  good, bad, reasons = [], [], []
  for i, result in enumerate(
    in_threads(examine, range(len(records)), f"read {records.title}")
  ):
    if isinstance(result, str):
      bad.append(i)
      reasons.append(result)
    else:
      good.append((i, *result))
  rows, labels, digests, shapes, images = (
    zip(*good, strict=True) if good else [()] * 5
  )
  return {
    "rows": np.array(rows, np.int64),
    "labels": np.array(labels, np.int32),
    "digests": np.array(digests, np.uint64),
    "shapes": np.array(shapes, np.int64).reshape(-1, 2),
    "bad": np.array(bad, np.int64),
    "reasons": np.array(reasons, str),
  }, list(images)


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


def cached(
  kind: str, records: Records, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """What `compute` returned for these files before, or returns now.

  Kept in $XDG_CACHE_HOME/l2w_jax (~/.cache/l2w_jax), by path, size and time of
  every file of the split.
  """
  key = hashlib.sha1(f"{kind} 1 {records.channels} {len(records)}".encode())
  for path in records.files:
    stat = path.stat()
    key.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  path = compile_cache.user_folder() / f"{kind}-{key.hexdigest()}.npz"
  try:
    with path.open("rb") as file, np.load(file) as arrays:
      return dict(arrays)
  except FileNotFoundError:
    pass
  except Exception as error:  # a damaged cache file raises anything
    logging.warning(
      "%s cannot be used (%s); reading %s again", path, error, records.title
    )
  arrays = compute()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_arrays(path, **arrays)
  except OSError as error:
    logging.warning(
      "what was found in %s is not remembered: %s", records.title, error
    )
  return arrays
