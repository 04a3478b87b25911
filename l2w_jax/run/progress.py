"""Progress of a loop: a live bar on a terminal, plain lines in a log.

Both say how far the loop is, its rate, the time left and the current values.
The rate is measured from the first update after a start, a resume or a
compilation, so that neither steps done by an earlier run nor compile time enter
it.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

BAR_INTERVAL = 0.2  # seconds between redraws of the bar
# Without a percentage, so that rate, time left and two losses fit 80 columns.
BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"


def duration(seconds: float) -> str:
  """Seconds read as a clock: 0:42, 12:05, 3:04:05 or 2 d 3:04:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if not days and not hours:
    return f"{minutes}:{seconds:02d}"
  clock = f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{days} d {clock}" if days else clock


def format_values(values: Mapping[str, Any]) -> list[str]:
  """Each value becomes "name value": ints whole, the rest to three digits."""
  return [
    f"{name} {value}" if isinstance(value, int) else f"{name} {float(value):#.3g}"
    for name, value in values.items()
  ]


class Progress:
  """A context manager that reports `update(done, values)` calls.

  Args:
    total: the count at which the loop is finished.
    unit: what is counted, in the singular; the rate is in units per second.
    label: first word of each line.
    interval: seconds between two lines in a log; the bar is always live.
    start: the count at which this run begins (the step it resumed from).
    stream: where to write; standard error if None. It decides between bar and
      lines by `isatty()`.
    clock: returns seconds; replaced in tests.
    silent: writes nothing, for all but one process of a run.
  """

  def __init__(
    self,
    total: int,
    unit: str = "step",
    label: str = "train",
    interval: float = 10.0,
    start: int = 0,
    stream: io.TextIOBase | None = None,
    clock: Callable[[], float] = time.monotonic,
    silent: bool = False,
  ):
    self._silent = silent
    self._total, self._unit, self._label = total, unit, label
    self._clock = clock
    self._stream = sys.stderr if stream is None else stream
    self._live = self._stream.isatty() and not silent
    self._interval = BAR_INTERVAL if self._live else interval
    self._bar = None
    self._done, self._values = start, {}
    self._shown_done, self._shown_at = start, -math.inf
    self._mark = None  # (time, count) from which the rate is measured

  def __enter__(self) -> Progress:
    if self._live:
      from tqdm import tqdm

      # tqdm's own measure hides the bar where a terminal says it is 0 by 0.
      size = shutil.get_terminal_size()
      self._bar = tqdm(
        total=self._total,
        initial=self._done,
        desc=self._label,
        file=self._stream,
        bar_format=BAR_FORMAT,
        ncols=size.columns,
        nrows=size.lines,
      )
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    # Reading the values of a failed step would raise its error a second time.
    if error_type is None and self._done != self._shown_done:
      self._show()
    if self._bar is not None:
      self._bar.close()

  def begin(self) -> None:
    """Measures the rate from now on, not from the first update."""
    self._mark = self._clock(), self._done

  def note(self, message: str) -> None:
    """Writes one line at once, above the bar if there is one."""
    line = f"{self._label}: {message}"
    if self._bar is not None:
      self._bar.write(line, file=self._stream)
    elif not self._silent:
      print(line, file=self._stream, flush=True)

  @contextlib.contextmanager
  def compiling(self, what: str) -> Generator[None, None, None]:
    """Says that `what` is being compiled, then how long that took.

    The block should wait for its result (`jax.block_until_ready`), or the time
    noted is only that of the dispatch. The rate is measured anew from the first
    update after the block.
    """
    self.note(f"compiling {what} ...")
    began = self._clock()
    yield
    self.note(f"compiled {what} in {self._clock() - began:.1f} s")
    self._mark = None

  def update(self, done: int, values: Mapping[str, Any]) -> None:
    """Reports that `done` of `total` are finished, resumed ones included.

    Values are ints or anything `float` takes; device arrays are read, and so
    waited for, only when a line is due. A narrow terminal cuts the last ones.
    """
    self._done, self._values = done, values
    due = (
      self._mark is None
      or done >= self._total
      or self._clock() - self._shown_at >= self._interval
    )
    if due:
      self._show()

  def _show(self) -> None:
    values = format_values(self._values)
    # Read after the values, which may have waited for the device.
    now = self._clock()
    if self._mark is None:
      self._mark = (now, self._done)
    pieces = self._speed(now) + values
    self._shown_done, self._shown_at = self._done, now
    if self._bar is not None:
      self._bar.n = self._done
      self._bar.ncols = shutil.get_terminal_size().columns
      self._bar.set_postfix_str(", ".join(pieces), refresh=False)
      self._bar.refresh()
    else:
      percent = 100 * self._done // max(self._total, 1)
      head = f"{self._unit} {self._done}/{self._total} ({percent} %)"
      self.note(", ".join([head, *pieces]))

  def _speed(self, now: float) -> list[str]:
    """Returns rate and time left, or nothing before they can be known."""
    assert self._mark is not None
    began, first = self._mark
    if self._done <= first or now <= began:
      return []
    rate = (self._done - first) / (now - began)
    speed = (
      f"{rate:.1f} {self._unit}s/s"
      if rate >= 1
      else f"{1 / rate:.1f} s/{self._unit}"
    )
    left = max(self._total - self._done, 0) / rate
    return [speed, f"{duration(left)} left"]
