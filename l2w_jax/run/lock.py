"""One run, one writer: whoever writes into a run directory holds its lock.json.

    with lock.held(workdir):
      ...

The file names the process that holds it, which writes it anew every `BEAT` seconds.
TensorStore writes it, and only if it is as it was when it was read (on a disk by a
file lock, on gs:// by a generation match): of two that come at once one is refused.
A process of this machine is looked up. One of another machine or container is gone
when `PATIENCE` seconds pass without a sign of life, as counted here: clocks are not
compared. Whoever finds its lock gone, after a sleep longer than that, ends at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Generator
from typing import Any

from l2w_jax.run import files, parallel

NAME = "lock.json"
BEAT = 10.0
PATIENCE = 60.0


@contextlib.contextmanager
def held(workdir: files.Path) -> Generator[None, None, None]:
  """Within it nobody else writes into the run directory, which is made if need be.

  With several processes the writer holds it. One that was made for nothing goes.

  Raises:
    ValueError: another process holds it.
    OSError: it cannot be written.
  """
  if not parallel.is_writer():
    yield
    return
  new = files.is_local(workdir) and not workdir.exists()
  files.make_folder(workdir)
  try:
    lock = _Lock(workdir)
    lock.acquire()
    try:
      yield
    finally:
      lock.release()
  finally:
    if new:
      with contextlib.suppress(OSError):  # it holds something now
        workdir.rmdir()


class _Lock:
  """The lock file of a run directory, as this process sees it."""

  def __init__(self, workdir: files.Path):
    self._workdir = workdir
    self._store = files.store(workdir)
    self._me = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "started": _started(os.getpid()),
      "machine": _machine(),
    }
    self._generation = b""
    self._ended = threading.Event()
    self._beat = threading.Thread(target=self._keep, daemon=True)

  def acquire(self) -> None:
    """Takes the lock, also one whose holder is gone, or raises ValueError."""
    while True:
      found = self._read()
      holder = _parse(found.value)
      if found.state == "value" and self._lives(holder, found.stamp.generation):
        raise ValueError(
          f"workdir {self._workdir} is being written by {_name(holder)}; wait for "
          "it, or name another workdir"
        )
      self._generation = self._write(found.stamp.generation)
      if self._generation:
        break  # or another one was quicker
    if found.state == "value":
      _say(f"{self._workdir}: taken over from {_name(holder)}, which is gone")
    self._beat.start()

  def release(self) -> None:
    """Removes the lock, if it is still there and ours."""
    self._ended.set()
    self._beat.join()
    with contextlib.suppress(ValueError, TimeoutError):
      self._store.write(NAME, None, if_equal=self._generation).result(files.SECONDS)

  def _lives(self, holder: dict[str, Any], generation: bytes) -> bool:
    """Whether the holder of the lock, as it was at a generation, is alive."""
    if holder.get("machine") and holder["machine"] == self._me["machine"]:
      started = _started(holder.get("pid"))
      return started is not None and started == holder.get("started")
    _say(
      f"{self._workdir}: waiting up to {PATIENCE:.0f} s for a sign of life from "
      f"{_name(holder)}"
    )
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
      time.sleep(min(1.0, BEAT))
      found = self._read()
      if found.stamp.generation != generation:
        return found.state == "value"
    return False

  def _keep(self) -> None:
    """Gives signs of life until `release`; ends the process if the lock is gone."""
    while not self._ended.wait(BEAT):
      # A full disk or a lost network may pass; others wait for `PATIENCE`.
      with contextlib.suppress(OSError, ValueError):
        generation = self._write(self._generation)
        if not generation:  # also where it was written, but the answer was lost
          found = self._read()
          if _parse(found.value) != self._me:
            _say(
              f"error: {self._workdir / NAME} was removed or taken over, so this "
              "process ends and writes nothing more; the same command goes on"
            )
            os._exit(1)
          generation = found.stamp.generation
        self._generation = generation

  def _read(self):
    return self._ask(self._store.read(NAME))

  def _write(self, if_equal: bytes) -> bytes:
    """The generation written; empty if the file is no longer as it was."""
    data = json.dumps(self._me, indent=2) + "\n"
    written = self._store.write(NAME, data.encode(), if_equal=if_equal)
    return self._ask(written).generation

  def _ask(self, future):
    with files.errors(self._workdir / NAME):
      return future.result(files.SECONDS)


def _parse(data: bytes) -> dict[str, Any]:
  """What a lock says; of one that says nothing, nothing."""
  with contextlib.suppress(ValueError):
    found = json.loads(data)
    return found if isinstance(found, dict) else {}
  return {}


def _name(holder: dict[str, Any]) -> str:
  return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _started(pid: Any) -> str | None:
  """When a process of this machine started; None if there is none, or no telling.

  It tells the process from another one that has its number now.
  """
  with contextlib.suppress(OSError):
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]
  return None


def _machine() -> str:
  """This boot of this machine and, in a container, its processes; "" if unknown."""
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  return ""
