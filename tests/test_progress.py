"""Progress with a clock turned by hand, in a log and on a terminal."""

from __future__ import annotations

import io

import pytest

from l2w_jax.run.progress import Progress, duration


class Clock:
  """Seconds that pass only when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self) -> bool:
    return True


class Lazy:
  """A device value: reading it takes a second and is counted."""

  def __init__(self, clock: Clock):
    self.clock, self.reads = clock, 0

  def __float__(self) -> float:
    self.reads += 1
    self.clock.now += 1.0
    return 2.0


@pytest.fixture
def clock() -> Clock:
  return Clock()


def test_log_lines_come_at_a_steady_interval(clock):
  log = io.StringIO()
  with Progress(100, interval=10.0, stream=log, clock=clock) as progress:
    for step in range(1, 101):
      clock.now += 0.5
      progress.update(step, {"epoch": step // 10, "train_loss": 1.0 / step})
  # Two steps a second, so a line each 20 steps after the first; the rate is
  # that of the steps after the first.
  assert log.getvalue().splitlines() == [
    "train: step 1/100 (1 %), epoch 0, train_loss 1.00",
    "train: step 21/100 (21 %), 2.0 steps/s, 0:40 left, epoch 2, train_loss 0.0476",
    "train: step 41/100 (41 %), 2.0 steps/s, 0:30 left, epoch 4, train_loss 0.0244",
    "train: step 61/100 (61 %), 2.0 steps/s, 0:20 left, epoch 6, train_loss 0.0164",
    "train: step 81/100 (81 %), 2.0 steps/s, 0:10 left, epoch 8, train_loss 0.0123",
    "train: step 100/100 (100 %), 2.0 steps/s, 0:00 left,"
    " epoch 10, train_loss 0.0100",
  ]
  assert "\r" not in log.getvalue()


def test_the_rate_counts_from_the_beginning_of_parallel_work(clock):
  log = io.StringIO()
  with Progress(100, unit="image", stream=log, clock=clock) as progress:
    progress.begin()
    clock.now += 5
    for done in (50, 100):  # both were ready
      clock.now += 1e-4
      progress.update(done, {})
  first, last = log.getvalue().splitlines()
  assert "10.0 images/s, 0:05 left" in first and "20.0 images/s" in last


def test_compilation_is_announced_timed_and_kept_out_of_the_rate(clock):
  log = io.StringIO()
  with Progress(5, interval=1.0, stream=log, clock=clock) as progress:
    with progress.compiling("the training step"):
      assert log.getvalue() == "train: compiling the training step ...\n"
      clock.now += 42.25
    progress.update(1, {})
    clock.now += 2.0
    progress.update(2, {})
    with progress.compiling("the evaluation"):
      clock.now += 1000.0
    clock.now += 7.0
    progress.update(3, {})
    clock.now += 4.0
    progress.update(4, {})
  assert log.getvalue().splitlines()[1:] == [
    "train: compiled the training step in 42.2 s",
    "train: step 1/5 (20 %)",
    "train: step 2/5 (40 %), 2.0 s/step, 0:06 left",
    "train: compiling the evaluation ...",
    "train: compiled the evaluation in 1000.0 s",
    "train: step 3/5 (60 %)",
    "train: step 4/5 (80 %), 4.0 s/step, 0:04 left",
  ]


def test_steps_of_an_earlier_run_are_not_in_the_rate(clock):
  log = io.StringIO()
  with Progress(
    2000,
    unit="image",
    label="evaluate",
    interval=1.0,
    start=1000,
    stream=log,
    clock=clock,
  ) as progress:
    clock.now += 30.0
    progress.update(1100, {})
    clock.now += 2.0
    progress.update(1200, {})
  assert log.getvalue().splitlines() == [
    "evaluate: image 1100/2000 (55 %)",
    "evaluate: image 1200/2000 (60 %), 50.0 images/s, 0:16 left",
  ]


def test_values_are_read_only_for_lines_that_are_due(clock):
  value = Lazy(clock)
  with Progress(50, interval=100.0, stream=io.StringIO(), clock=clock) as progress:
    for step in range(1, 41):
      progress.update(step, {"train_loss": value})
    assert value.reads == 1
  assert value.reads == 2  # the last step seen is shown on leaving


def test_an_error_passes_without_reading_the_last_values(clock):
  value, log = Lazy(clock), io.StringIO()
  with (
    pytest.raises(RuntimeError, match="diverged"),
    Progress(5, stream=log, clock=clock) as progress,
  ):
    progress.update(1, {"train_loss": value})
    progress.update(2, {"train_loss": value})
    raise RuntimeError("diverged")
  assert value.reads == 1
  assert log.getvalue() == "train: step 1/5 (20 %), train_loss 2.00\n"


def test_terminal_gets_a_live_bar_with_rate_time_left_and_losses(
  clock, monkeypatch
):
  monkeypatch.setenv("COLUMNS", "80")
  terminal = Terminal()
  with Progress(100, start=40, stream=terminal, clock=clock) as progress:
    progress.note("compiling the training step ...")
    progress.update(41, {"train_loss": 1.5})
    clock.now += 2.0
    progress.update(51, {"train_loss": 0.5, "meta_loss": 0.25, "epoch": 12345})
    drawn = terminal.getvalue()
    clock.now += 0.05
    progress.update(52, {"train_loss": 0.4})
    assert terminal.getvalue() == drawn  # too soon to redraw
  assert "train: compiling the training step ...\n" in terminal.getvalue()
  frames = terminal.getvalue().split("\r")
  assert any(frame.startswith("train |") for frame in frames)
  assert any(
    "51/100, 5.0 steps/s, 0:10 left, train_loss 0.500, meta_loss 0.250" in frame
    for frame in frames
  )
  assert all(len(frame.strip("\n")) <= 80 for frame in frames)
  assert "52/100" in frames[-1]


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.2, "0:00"),
    (42, "0:42"),
    (59.7, "1:00"),
    (725, "12:05"),
    (3 * 3600 + 245, "3:04:05"),
    (2 * 86400 + 11045, "2 d 3:04:05"),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
