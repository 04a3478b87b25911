"""metrics.jsonl, and TensorBoard events when tensorboardX is installed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Generator
from typing import Any

from absl import logging

from l2w_jax.run import directory, files, os_errors, parallel


class MetricsLog:
  """Appends one JSON object a line to metrics.jsonl; a context manager.

  Lines have a kind ("train", "evaluate", "weights", "diagnose"), a step and an
  epoch.
  Opening it for a run that resumes at `step` drops the lines after that step:
  they are about to be written again. A damaged line is dropped, with a warning.
  With several processes the writer writes.
  """

  def __init__(self, workdir: files.Path, step: int = 0):
    self._file = self._events = None
    if not parallel.is_writer():
      return
    self._path = path = workdir / "metrics.jsonl"
    if path.exists():
      lines = directory.metric_lines(path)
      files.write(
        path, "".join(text + "\n" for text, line in lines if line["step"] <= step)
      )
    if files.is_local(path):
      self._file = path.open("a", encoding="utf-8")
      with self._losing_events():
        self._events = _Events(workdir / "tensorboard", step)
    else:  # an object cannot be appended to, so each flush puts it whole
      self._file = io.StringIO()
      self._file.write(path.read_text(encoding="utf-8") if path.exists() else "")
      logging.warning("TensorBoard events are only written on a disk, not to gs://")

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *unused_error) -> None:
    if self._file is None:
      return
    try:
      self.flush()
    finally:  # of a full disk, too, or Python tries again in its last moments
      if self._events is not None:
        with self._losing_events():
          self._events.close()
      with os_errors.naming(self._path):
        self._file.close()

  def write(
    self, kind: str, step: int, epoch: float, values: dict[str, Any]
  ) -> None:
    """Writes one line; numbers and lists of numbers also become events."""
    if self._file is None:
      return
    line = json.dumps(
      {"kind": kind, "step": step, "epoch": epoch, **_finite(values)},
      allow_nan=False,
    )
    with os_errors.naming(self._path):
      self._file.write(line + "\n")
    if self._events is None or kind == "weights":
      return
    scalars = {}
    for name, value in values.items():
      if isinstance(value, float):
        scalars[f"{kind}/{name}"] = value
      elif isinstance(value, list) and not name.endswith("_bins"):
        for k, x in enumerate(value):
          if isinstance(x, float):
            scalars[f"{kind}/{name}/exit_{k + 1}"] = x
    with self._losing_events():
      self._events.scalars(step, scalars)

  def flush(self) -> None:
    """Makes everything written so far visible to readers."""
    if self._file is not None:
      with os_errors.naming(self._path):
        self._file.flush()
      if isinstance(self._file, io.StringIO):
        files.write(self._path, self._file.getvalue())
    if self._events is not None:
      with self._losing_events():
        self._events.flush()

  @contextlib.contextmanager
  def _losing_events(self) -> Generator[None, None, None]:
    """Events end, with a warning, where they fail: metrics.jsonl has it all."""
    try:
      yield
    except ModuleNotFoundError:
      self._events = None
    except Exception as error:  # also of versions that do not fit each other
      self._events = None
      logging.warning("no TensorBoard events from here on: %s", error)


def _finite(value: Any) -> Any:
  """The value with null for every number that JSON does not know."""
  if isinstance(value, dict):
    return {name: _finite(x) for name, x in value.items()}
  if isinstance(value, list):
    return [_finite(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


class _Events:
  """TensorBoard events of a run, written by whoever calls.

  The writer of tensorboardX has a thread, which a full disk ends; then the queue
  to it fills up, and the run waits for ever.
  """

  def __init__(self, folder: files.Path, step: int):
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    # Protocol buffers make their classes when they are imported.
    events: Any = event_pb2
    summaries: Any = summary_pb2
    self._event, self._summary = events.Event, summaries.Summary
    folder.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(folder / "events"))
    started = events.SessionLog(status=events.SessionLog.START)
    # Later steps of an earlier start are not shown.
    self._write(step=step + 1, session_log=started)
    self.flush, self.close = self._writer.flush, self._writer.close

  def scalars(self, step: int, values: dict[str, float]) -> None:
    found = [
      self._summary.Value(tag=name, simple_value=x) for name, x in values.items()
    ]
    self._write(step=step, summary=self._summary(value=found))

  def _write(self, **what: Any) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), **what))
