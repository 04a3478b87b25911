"""What the operating system refuses, said in one line: the path and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import tempfile
from collections.abc import Generator, Iterable

_ROOM = "make room there, then give the same command again"
_RIGHTS = "change its permissions, or name another place"
ADVICE = {
  errno.ENOSPC: _ROOM,
  errno.EDQUOT: _ROOM,
  errno.EFBIG: "raise the limit (ulimit -f), then give the same command again",
  errno.EMFILE: "raise the limit (ulimit -n), then give the same command again",
  errno.ENFILE: "close other programs, then give the same command again",
  errno.ENOMEM: "close other programs, or take a machine with more memory",
  errno.EACCES: _RIGHTS,
  errno.EPERM: _RIGHTS,
  errno.EROFS: "name a place that can be written, or copy the run to one",
  errno.ENOENT: "check the path",
  errno.ENOTDIR: "a part of the path is a file; name another place",
  errno.EISDIR: "a file is wanted there; move the folder away",
  errno.EEXIST: "something else is there; move it away, or name another place",
  errno.ENOTEMPTY: "something in it cannot be removed; remove the folder yourself",
  errno.ENAMETOOLONG: "name a shorter path",
  errno.ELOOP: "its symbolic links lead in a circle; mend them",
  errno.EIO: "look after that disk, then give the same command again",
  errno.ESTALE: "mount that file system again, then give the same command again",
}
# What TensorStore adds to its messages.
_CODE = re.compile(r"os_error_code='(\d+)'")


def explain(error: OSError) -> str:
  """One line: path, what was refused, and what to do."""
  names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
  said = error.strerror or str(error) or type(error).__name__
  advice = ADVICE.get(error.errno)
  line = ": ".join(filter(None, [" -> ".join(names), said]))
  return " ".join((f"{line}; {advice}" if advice else line).split())


@contextlib.contextmanager
def naming(path: object) -> Generator[None, None, None]:
  """Errors inside name `path` where they name none, as those of a write do not.

  Also what Orbax and TensorStore make a ValueError of becomes an OSError again.
  A relative name, as `shutil.rmtree` may give, is joined to `path` if that is
  absolute.
  """
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno is not None:
      error.filename = str(path)
    elif isinstance(error.filename, str | bytes) and os.path.isabs(str(path)):
      error.filename = os.path.join(str(path), os.fsdecode(error.filename))
    raise
  except Exception as error:
    code = _CODE.search(str(error))
    if code is None:
      raise
    number = int(code[1])
    raise OSError(number, os.strerror(number), str(path)) from error


def check_writable(places: Iterable[os.PathLike]) -> None:
  """Raises OSError unless files can be made in all places of a disk.

  A place may be missing: then what counts is where it would be made.
  """
  for place in places:
    if not isinstance(place, pathlib.Path):
      continue  # on gs://
    there = place
    while not there.exists():
      there = there.parent
    with naming(there):
      if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), there)
      try:
        tempfile.TemporaryFile(dir=there).close()
      except OSError as error:  # names a file that never was
        raise OSError(error.errno, error.strerror, str(there)) from error
