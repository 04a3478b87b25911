"""Class folders: PATH/train/CLASS/… with images at any depth, and PATH/test or val.

A class is told by its directory's name in Unicode's composed form (NFC), as the
same name may be written in two ways that look alike.
"""

from __future__ import annotations

import collections
import os
import pathlib
import stat
import unicodedata

import numpy as np
from absl import logging

from l2w_jax.data import pixels

SUFFIXES = tuple(suffix for own in pixels.FORMATS.values() for suffix in own)
TESTS = ("test", "val", "valid", "validation")  # the first that is labelled is used
MAX_BYTES = 2**30  # of a file; more is no image that fits into memory beside others
TINY_IMAGENET = "val_annotations.txt"


class FolderRecords:
  """The image files of one split, by class and then by name; see `Records`."""

  channels = 3

  def __init__(self, path: pathlib.Path, class_names: tuple[str, ...]):
    self.title = str(path)
    folders = _classes(path)
    images, left_out = [], [x for x in path.iterdir() if not x.is_dir()]
    for name in class_names:
      found = _files(folders[name]) if name in folders else []
      images.append([file for file in found if _is_image(file)])
      left_out += [file for file in found if not _is_image(file)]
    self.files = [file for own in images for file in own]
    self.left_out = [file for file in left_out if not file.name.startswith(".")]
    self.labels = np.repeat(np.arange(len(images)), [len(own) for own in images])

  def __len__(self) -> int:
    """Number of files."""
    return len(self.files)

  def read(self, i: int) -> tuple[bytes, int]:
    """(contents, label) of file i.

    Raises:
      ValueError: no regular file, or a huge one.
      OSError: it cannot be read.
    """
    return read_file(self.files[i]), int(self.labels[i])

  def place(self, i: int) -> tuple[int, int]:
    """One image in a file."""
    return i, 0

  def where(self, i: int) -> str:
    """Path of file i."""
    return str(self.files[i])


def read_file(path: pathlib.Path) -> bytes:
  """What is in a file.

  Raises:
    ValueError: no regular file, or a huge one.
    OSError: it cannot be read.
  """
  if path.is_symlink() and not os.path.exists(path):
    raise ValueError(f"is a link to {os.readlink(path)}, which is not there")
  found = path.stat()
  if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
    raise ValueError("is no regular file, so it is not opened")
  if found.st_size > MAX_BYTES:
    raise ValueError(f"holds {found.st_size} bytes, more than {MAX_BYTES}")
  return path.read_bytes()


def image_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Image files below a directory at any depth, by name; others are named."""
  found = _files(path)
  _name_left_out([file for file in found if not _is_image(file)])
  return [file for file in found if _is_image(file)]


def open_folder(where: str) -> tuple[FolderRecords, FolderRecords, tuple[str, ...]]:
  """(train, test, class names) of an image folder; classes in sorted order.

  The test split is the first of `TESTS` that has images in directories of train's
  classes: the test directory of many sets has no labels, and their val has.

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
  class_names = tuple(sorted(_classes(train)))
  if not class_names:
    raise ValueError(
      f"{train} has no class directories; images belong in "
      f"{train}/CLASS/*.jpg or *.png"
    )
  tests = [root / name for name in TESTS if (root / name).is_dir()]
  if not tests:
    raise ValueError(
      f"{root} has neither a test nor a val directory beside "
      "train; images to evaluate belong in one of them"
    )
  records = FolderRecords(train, class_names)
  for label, name in enumerate(class_names):
    if label not in records.labels:
      raise ValueError(f"{train / name} has no image ({', '.join(SUFFIXES)})")
  found = {path: FolderRecords(path, class_names) for path in tests}
  test = next((path for path in tests if len(found[path])), tests[0])
  in_a_list = [path for path in tests if (path / TINY_IMAGENET).is_file()]
  if not len(found[test]) and in_a_list:
    raise ValueError(
      f"{in_a_list[0]} has its labels in {TINY_IMAGENET}; put its images into "
      f"class directories, such as by: (cd {in_a_list[0]} && while read f c _; do "
      f"mkdir -p $c && mv images/$f $c; done < {TINY_IMAGENET})"
    )
  for name, path in _classes(test).items():
    # An empty directory is no class, such as one whose images were moved.
    empty = len(found[test]) and not any(map(_is_image, _files(path)))
    if name not in class_names and not empty:
      raise ValueError(f"{test} has a class {name!r} that {train} has not")
  if not len(found[test]):
    raise ValueError(f"{test} has no images in its class directories")
  if len(tests) > 1:
    others = " and ".join(str(path) for path in tests if path != test)
    logging.warning("%s is the test split; %s is not looked at", test, others)
  splits = records, found[test]
  _name_left_out([file for split in splits for file in split.left_out])
  return *splits, class_names


def _name_left_out(files: list[pathlib.Path]) -> None:
  """Says in one line how many files are not read, and what they are."""
  if files:
    suffixes = collections.Counter(file.suffix.lower() or "none" for file in files)
    logging.warning(
      "%d files beside the images are left out, such as %s (suffixes: %s)",
      len(files),
      files[0],
      ", ".join(f"{suffix} {n}" for suffix, n in suffixes.most_common(5)),
    )


def _classes(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """{name: directory} of the classes below a directory."""
  found = {}
  for entry in sorted(path.iterdir()):
    if not entry.name.startswith(".") and entry.is_dir():
      name = unicodedata.normalize("NFC", entry.name)
      if name in found:
        raise ValueError(
          f"{path} has two directories whose names look alike, "
          f"{ascii(entry.name)} and {ascii(found[name].name)}; keep one of them"
        )
      found[name] = entry
  return found


def _files(path: pathlib.Path, around: tuple = ()) -> list[pathlib.Path]:
  """Files and the like, but hidden ones, below a directory at any depth, by name.

  around: real paths of the directories that were gone through to come here.
  """
  found, around = [], (*around, path.resolve())
  for name in sorted(os.listdir(path)):
    here = path / name
    if name.startswith("."):
      continue
    if not here.is_dir():
      found.append(here)
      continue
    real = here.resolve()
    if any(outer.is_relative_to(real) for outer in around):
      raise ValueError(f"{here} is a link to a directory around it; delete it")
    found += _files(here, around)
  return found


def _is_image(path: pathlib.Path) -> bool:
  return path.suffix.lower() in SUFFIXES
