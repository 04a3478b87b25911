"""Class folders: PATH/train/CLASS/*.jpg or *.png, and PATH/test or PATH/val."""

from __future__ import annotations

import pathlib

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderRecords:
  """The image files of one split, by class and then by name; see `Records`."""

  channels = 3

  def __init__(self, path: pathlib.Path, class_names: tuple[str, ...]):
    self.title = str(path)
    images = [_images(path / name) for name in class_names]
    self.files = [file for own in images for file in own]
    self._labels = np.repeat(np.arange(len(images)), [len(own) for own in images])

  def __len__(self) -> int:
    """Number of files."""
    return len(self.files)

  def read(self, i: int) -> tuple[bytes, int]:
    """(contents, label) of file i."""
    return self.files[i].read_bytes(), int(self._labels[i])

  def where(self, i: int) -> str:
    """Path of file i."""
    return str(self.files[i])


def open_folder(where: str) -> tuple[FolderRecords, FolderRecords, tuple[str, ...]]:
  """(train, test, class names) of an image folder; classes in sorted order.

  Raises:
    ValueError: a directory is missing, or a class has no images.
  """
  root = pathlib.Path(where)
  train = root / "train"
  if not train.is_dir():
    raise ValueError(
      f"no directory {train} for config.data.source=folder:{where}; images "
      f"belong in {train}/CLASS/*.jpg or *.png, and {root}/test or {root}/val"
    )
  class_names = _classes(train)
  if not class_names:
    raise ValueError(
      f"{train} has no class directories; images belong in "
      f"{train}/CLASS/*.jpg or *.png"
    )
  test = next(
    (root / name for name in ("test", "val") if (root / name).is_dir()), None
  )
  if test is None:
    raise ValueError(
      f"{root} has neither a test nor a val directory beside "
      "train; images to evaluate belong in one of them"
    )
  unknown = sorted(set(_classes(test)) - set(class_names))
  if unknown:
    raise ValueError(f"{test} has a class {unknown[0]!r} that {train} has not")
  for name in class_names:
    if not _images(train / name):
      raise ValueError(f"{train / name} has no image ({', '.join(SUFFIXES)})")
  records = [FolderRecords(path, class_names) for path in (train, test)]
  if not len(records[1]):
    raise ValueError(f"{test} has no images in its class directories")
  return *records, class_names


def _classes(path: pathlib.Path) -> tuple[str, ...]:
  return tuple(
    sorted(
      entry.name
      for entry in path.iterdir()
      if entry.is_dir() and not entry.name.startswith(".")
    )
  )


def _images(path: pathlib.Path) -> list[pathlib.Path]:
  if not path.is_dir():
    return []
  return sorted(
    entry
    for entry in path.iterdir()
    if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")
  )
