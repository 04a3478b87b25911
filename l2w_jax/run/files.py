"""Where the files of a run are, on a disk or on gs://, and how they are written.

A file is written whole: a reader sees the old or the new one. On a disk it is
written beside and renamed; on gs:// putting an object is just that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Generator
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

Path = pathlib.Path | epath.Path  # of a run: on a disk, on gs://
SECONDS = 20.0  # until something that should take one is given up
BUCKETS = (
  "check that the bucket exists, the network, and that `gcloud auth "
  "application-default login` or the machine's service account may write there"
)
RETRIES = 3  # of a request to gs://, within these


def path(where: str | os.PathLike) -> Path:
  """The path of a run directory or file, local or gs://BUCKET/….

  Local ones are plain `pathlib` paths, which tell a folder that is missing from
  one that may not be read.

  Raises:
    ValueError: it is on something that runs cannot be kept on, or what that needs
      is not installed.
  """
  text = os.fspath(where)
  # `pathlib` makes gs:/BUCKET of gs://BUCKET, which is no local path either.
  if not re.match(r"(gs|gcs|s3):/|[A-Za-z][A-Za-z0-9+.-]*://", text):
    local = pathlib.Path(os.path.expanduser(where))
    try:
      os.fspath(local.absolute()).encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"{str(local.absolute())!r} has bytes that are no UTF-8, which checkpoints "
        "cannot be written under; name another place"
      ) from error
    return local
  if not re.match("gs://[^/]", text):
    raise ValueError(
      f"{text!r} is no place for a run; name a local directory or gs://BUCKET/RUN"
    )
  if importlib.util.find_spec("gcsfs") is None:
    raise ValueError(
      f"{text} needs gcsfs, which is not installed: pip install 'l2w_jax[gcs]'"
    )
  # Where TensorFlow is installed, its own file system would stand in for gcsfs.
  os.environ.setdefault("EPATH_USE_TF", "false")
  found = epath.Path(text)
  with errors(found):  # in seconds: gcsfs tries for a minute
    store(found).read("config.json").result(SECONDS)
  return found


def store(path: Path) -> Any:
  """A folder as a TensorStore KvStore, which replaces files on a condition."""
  import tensorstore as ts

  if is_local(path):
    spec = {"driver": "file", "path": f"{path.absolute()}/"}
  else:
    bucket, *folders = os.fspath(path).removeprefix("gs://").split("/")
    spec = {
      "driver": "gcs",
      "bucket": bucket,
      "path": "".join(f"{name}/" for name in folders),
      "context": {"gcs_request_retries": {"max_retries": RETRIES}},
    }
  return ts.KvStore.open(spec).result(SECONDS)


@contextlib.contextmanager
def errors(path: Path) -> Generator[None, None, None]:
  """Says in one line what TensorStore raises, which is ValueError for anything.

  Raises:
    OSError: a disk said no.
    ValueError: gs:// did, or there was no answer.
  """
  try:
    yield
  except (ValueError, TimeoutError) as error:
    reason = " ".join(str(error).split()) or f"no answer in {SECONDS:.0f} s"
    number = re.search(r"os_error_code='(\d+)'", reason)
    if number:
      code = int(number[1])
      raise OSError(code, os.strerror(code), os.fspath(path)) from error
    advice = "" if is_local(path) else f"; {BUCKETS}"
    raise ValueError(f"cannot use {path}: {reason}{advice}") from error


def is_local(path: Path) -> bool:
  """Whether it is on a disk, with folders, appending and renaming."""
  return "://" not in os.fspath(path)


def make_folder(path: Path) -> None:
  """Makes a folder and those above it; objects on gs:// need none."""
  if is_local(path):
    path.mkdir(parents=True, exist_ok=True)


def target(path: Path) -> Path:
  """What `write` replaces: the file that a link leads to, or the path itself.

  Raises:
    ValueError: a device, a pipe or a socket is there.
  """
  if not is_local(path):
    return path
  path = pathlib.Path(path)
  with contextlib.suppress(FileNotFoundError):
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # `replace` names a folder
      raise ValueError(f"{path} is there and no regular file; name another")
  return pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path


def write(path: Path, data: str | bytes) -> None:
  """Replaces a file by `data`, text in UTF-8; see `target`."""
  data = data.encode() if isinstance(data, str) else data
  path = target(path)
  if not is_local(path):
    path.write_bytes(data)
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()  # half of it may be what fills the disk
    if error.errno is not None:  # not the name of the temporary
      error.filename, error.filename2 = str(path), None
    raise


def write_arrays(path: Path, **arrays: ArrayLike) -> None:
  """Replaces a compressed .npz file by named arrays."""
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)  # ty: ignore[invalid-argument-type]
  write(path, data.getvalue())


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[pathlib.Path, None, None]:
  """A local folder to write files into, which then replaces the one at `path`.

  On gs:// it cannot do so in one go: the old files go first, and the new ones
  come in the order in which they were written.
  """
  if not is_local(path):
    with tempfile.TemporaryDirectory() as name:
      yield pathlib.Path(name)
      if path.exists():
        path.rmtree()  # ty: ignore[missing-union-attribute]
      for file in sorted(
        pathlib.Path(name).iterdir(), key=lambda file: file.stat().st_mtime_ns
      ):
        write(path / file.name, file.read_bytes())
    return
  partial = pathlib.Path(path.with_name(f".{path.name}.{os.getpid()}"))
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
