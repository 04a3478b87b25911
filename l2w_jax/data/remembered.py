"""What reading through files has found, kept for the next start.

In $XDG_CACHE_HOME/l2w_jax (~/.cache/l2w_jax), one .npz for a split. Only what a
file alone says is kept, under a `stamp` of that file: what is there may be of other
files, or damaged, and then it is found anew. Files are written whole, so several
processes may do so at once.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from absl import logging

from l2w_jax.run import compile_cache, files

Arrays = dict[str, np.ndarray]


def stamp(path: pathlib.Path) -> str | None:
  """Where a file really lies, its size and times; None if it cannot be looked at.

  The time of its last change of any kind is among them: moving another file into
  its place keeps that file's own time.
  """
  try:
    found = path.stat()
  except OSError:
    return None
  times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
  return f"{os.path.realpath(path)} {found.st_size} {times}"


def key(text: str) -> int:
  """64 bits that stand for a text."""
  return int.from_bytes(hashlib.sha1(os.fsencode(text)).digest()[:8], "little")


def load(name: str, dtypes: Mapping[str, type]) -> Arrays | None:
  """The arrays kept under a name, all of one length; None if they are not there.

  Args:
    name: says what was read, and with which settings.
    dtypes: of every array.
  """
  try:
    with _path(name).open("rb") as file, np.load(file) as archive:
      arrays = {array: archive[array] for array in dtypes}
  except Exception:  # a missing or damaged file raises anything
    return None
  sound = all(arrays[array].dtype == dtype for array, dtype in dtypes.items())
  lengths = {array.shape[:1] for array in arrays.values()}
  return arrays if sound and len(lengths) == 1 and () not in lengths else None


def save(name: str, arrays: Arrays, title: str) -> None:
  """Keeps arrays under a name; where that cannot be, a warning says so."""
  try:
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_arrays(path, **arrays)
  except (OSError, RuntimeError) as error:  # the latter: there is no home
    logging.warning("what was found in %s is not remembered: %s", title, error)


def _path(name: str) -> pathlib.Path:
  kind = name.partition(" ")[0]
  digest = hashlib.sha1(os.fsencode(name)).hexdigest()
  return compile_cache.user_folder() / f"{kind}-{digest}.npz"
