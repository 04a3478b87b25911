"""metrics.jsonl, and TensorBoard events when tensorboardX is installed."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

from l2w_jax.run import files, parallel


class MetricsLog:
  """Appends one JSON object a line to metrics.jsonl; a context manager.

  Lines have a kind ("train", "evaluate", "weights", "diagnose"), a step and an
  epoch.
  Opening it for a run that resumes at `step` drops the lines after that step:
  they are about to be written again. With several processes the writer writes.
  """

  def __init__(self, workdir: pathlib.Path, step: int = 0):
    self._file = self._events = None
    if not parallel.is_writer():
      return
    path = workdir / "metrics.jsonl"
    if path.exists():
      lines = path.read_text(encoding="utf-8").splitlines()
      files.write(
        path, "".join(line + "\n" for line in lines if _step(line) <= step)
      )
    self._file = path.open("a", encoding="utf-8")
    self._events = _events(workdir, step)

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *unused_error) -> None:
    if self._file is not None:
      self._file.close()
    if self._events is not None:
      self._events.close()

  def write(
    self, kind: str, step: int, epoch: float, values: dict[str, Any]
  ) -> None:
    """Writes one line; numbers and lists of numbers also become events."""
    if self._file is None:
      return
    self._file.write(
      json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n"
    )
    if self._events is None or kind == "weights":
      return
    for name, value in values.items():
      if isinstance(value, float):
        self._events.add_scalar(f"{kind}/{name}", value, step)
      elif isinstance(value, list) and not name.endswith("_bins"):
        for k, x in enumerate(value):
          if isinstance(x, float):
            self._events.add_scalar(f"{kind}/{name}/exit_{k + 1}", x, step)

  def flush(self) -> None:
    """Makes everything written so far visible to readers."""
    if self._file is not None:
      self._file.flush()
    if self._events is not None:
      self._events.flush()


def _step(line: str) -> float:
  """Step of a line; infinity for one that was cut off when a run died."""
  with contextlib.suppress(ValueError, KeyError, TypeError):
    return json.loads(line)["step"]
  return float("inf")


def _events(workdir: pathlib.Path, step: int):
  try:
    import tensorboardX
  except ImportError:
    return None
  return tensorboardX.SummaryWriter(
    str(workdir / "tensorboard"), purge_step=step + 1
  )
