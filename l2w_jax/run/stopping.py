"""Signals that ask a command to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP and others.

SIGUSR1, SIGUSR2 and SIGXCPU are what batch systems send before time is over.

While steps are trained, a signal only sets a flag, which the loop reads after every
step. Anywhere else the same command makes again whatever is lost, and so it leaves
at once. A thread answers instead of a handler: Python calls handlers between two
instructions of the main thread, which may be with XLA's compiler for minutes, and
what they raise comes out of any line there is, or is swallowed.

Only commands call `install`: a library leaves signals to whoever imports it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Generator

SIGNALS = tuple(
  getattr(signal, name)
  for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
  if hasattr(signal, name)
)
TOGETHER = 0.05  # seconds in which several count as one: systemd sends two at once

_lock = threading.Lock()
_installed = False
_held = False
_asked = 0  # the signal that came while they are held


def install() -> None:
  """Answers signals from now on, in the way this file says.

  It is the first that a command calls, and so also sees to its standard streams.
  Those that are ignored, as nohup and a shell's & have it, stay so. A second call
  does nothing.
  """
  global _installed
  if not _installed:
    _installed = True
    _open_streams()
    _hush_xla()
    if isinstance(sys.stdout, io.TextIOWrapper):
      sys.stdout.reconfigure(line_buffering=True)  # `_leave` flushes nothing
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    block()  # in the thread, which else would take one that `block` lets wait
    threading.Thread(target=_answer, args=(reader,), daemon=True).start()
    for number in SIGNALS:
      if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # writes to the pipe all the same
        signal.siginterrupt(number, False)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _open_streams() -> None:
  """Standard streams that are closed, as 2>&- has them, lead nowhere instead.

  Else the next file that is opened would take their place, and their messages.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:  # the lowest that is free is this one
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def _hush_xla() -> None:
  """Has XLA write no lines of its own; what it fails at, it raises.

  Of a kept program XLA:CPU says, in lines of 3,000 letters, that this machine may
  be another one, on the very same. JAX sets the level to 1, which children of a
  process with JAX inherit; any other is left alone.
  """
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def block() -> None:
  """Lets signals wait until `install`, in this process or the one it turns into."""
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextlib.contextmanager
def held() -> Generator[None, None, None]:
  """Within it a signal only sets `asked`; the second one still ends at once."""
  global _held
  with _lock:
    _held = True
  try:
    yield
  finally:
    with _lock:
      _held = False


def asked() -> int:
  """The signal that came while they were held; 0 for none."""
  return _asked


def exit_code(number: int) -> int:
  """Of a command that a signal stopped, as shells have it: 143 for SIGTERM."""
  return 128 + number


def _answer(reader: int) -> None:
  """Waits for signals, for as long as the process lives."""
  global _asked
  since = 0.0
  while True:
    for number in os.read(reader, 64):
      now = time.monotonic()
      if number not in SIGNALS or (_asked and now - since < TOGETHER):
        continue
      with _lock:
        if not _held or _asked:
          _leave(number)
        _asked, since = number, now


def _leave(number: int) -> None:
  if not _asked:
    with contextlib.suppress(OSError):
      # Below a progress bar, if there is one.
      os.write(2, b"\nstopped\n" if os.isatty(2) else b"stopped\n")
  os._exit(exit_code(number))
