"""Files that are written whole: a reader sees the old or the new one."""

from __future__ import annotations

import io
import os
import pathlib

import numpy as np
from numpy.typing import ArrayLike


def write(path: pathlib.Path, data: str | bytes) -> None:
  """Replaces a file by `data`, text in UTF-8."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_bytes(data.encode() if isinstance(data, str) else data)
  os.replace(temporary, path)


def write_arrays(path: pathlib.Path, **arrays: ArrayLike) -> None:
  """Replaces a compressed .npz file by named arrays."""
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)
  write(path, data.getvalue())
