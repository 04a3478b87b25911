"""Kills small runs at random moments until they are finished all the same.

    python experiments/torture.py --kills 50

A run is started, killed by SIGKILL, SIGTERM or SIGINT in a phase drawn at random,
and started again, until a start gets through; then the next run begins, until all
kills are spent. What every run has in the end is compared bit for bit with a run
that was left alone: arrays of its checkpoints, results.json and metrics.jsonl less
times, samples and scores. Each start has to go on from the last step saved, and a
signal that is not SIGKILL has to lose none. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
# 192 steps of some ten seconds.
CONFIG = {
  "data.source": "digits",
  "batch": 128,
  "optimizer.learning_rate": 0.2,
  "epochs": 24,
  "model.num_exits": 2,
  "model.channels": 4,
  "model.growth": 4,
  "model.classifier_width": 8,
  "meta.hidden": 8,
  "checkpoint.every": 5,
  "checkpoint.unit": "steps",
  "checkpoint.keep": 5,
  "evaluate.every": 3,
  "log.weights_every": 3,
  "log.seconds": 0.01,
}
# What a phase begins with, the last one first.
BEGINS = {
  "report": "\nexit 1:",
  "evaluate": "\nevaluate: ",
  "train": "compiled the evaluation",
  "compile": "compiling the training step",
  "start-up": "",
}
PHASES = ["start-up", "compile", "train", "save", "evaluate", "report"]
# Phases that show that another one is over.
AFTER = {name: set(PHASES[i + 1 :]) for i, name in enumerate(PHASES)}
TIMED = ("seconds", "digest", "images_per_second")
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# A signal that comes while Python itself starts ends it by its number.
CODES = {number: (-number, 128 + number) for number in SIGNALS}


def phase(log: str, workdir: pathlib.Path) -> str:
  """What a run is at, by what it has said and the files it is writing."""
  found = next(name for name, begin in BEGINS.items() if begin in log)
  saves = found == "train" and any(workdir.glob("checkpoints/*-tmp*"))
  return "save" if saves else found


def last(pattern: str, log: str) -> int | None:
  """The number in the last match of a pattern."""
  return int(found[-1]) if (found := re.findall(pattern, log)) else None


def saved(workdir: pathlib.Path) -> int:
  """The last step whose checkpoint is committed; 0 for none."""
  steps = [int(x.name) for x in workdir.glob("checkpoints/*") if x.name.isdigit()]
  return max(steps, default=0)


class Start:
  """One start of the command, and what it says."""

  def __init__(self, workdir: pathlib.Path):
    self.workdir, self.log_path = workdir, workdir.with_suffix(".log")
    flags = [f"--config.{key}={value}" for key, value in CONFIG.items()]
    with self.log_path.open("w") as log:
      self.process = subprocess.Popen(
        [sys.executable, "-m", "l2w_jax.main", "--config=configs/digits.py"]
        + [f"--workdir={workdir}", *flags],
        cwd=ROOT,
        stdout=log,
        stderr=log,
      )

  def log(self) -> str:
    return "\n" + self.log_path.read_text("utf-8")

  def phase(self) -> str:
    """The phase it is in now; "" if it has ended."""
    ended = self.process.poll() is not None
    return "" if ended else phase(self.log(), self.workdir)

  def wait_for(self, wanted: set[str], seconds: float = 600) -> str:
    """Waits until it is in one of some phases, for so long; the phase it is in."""
    until = time.monotonic() + seconds
    while (now := self.phase()) and now not in wanted and time.monotonic() < until:
      time.sleep(0.002)
    return now


def moment(start: Start, target: str, stay: dict[str, float]) -> str:
  """Waits for a random moment of a phase; what it then is at, "" for the end."""
  phases = {"train", "save"} if target in ("train", "save") else {target}
  start.wait_for(phases | AFTER[target])
  start.wait_for(set(PHASES) - phases, random.uniform(0, stay[target]))
  if target == "save":
    start.wait_for({"save"} | AFTER[target])
    time.sleep(random.uniform(0, 0.03))
  return start.phase()


def measure(workdir: pathlib.Path) -> dict[str, float]:
  """Runs to the end; the seconds of every phase, those of saves in training's."""
  start, seconds = Start(workdir), dict.fromkeys(PHASES, 0.0)
  before = time.monotonic()
  while now := start.phase():
    time.sleep(0.01)
    seconds["train" if now == "save" else now] += time.monotonic() - before
    before = time.monotonic()
  if start.process.returncode:
    raise SystemExit(f"a run that was left alone failed:{start.log()}")
  return {**seconds, "save": seconds["train"]}


def as_bytes(arrays: dict[str, np.ndarray]) -> dict[str, tuple]:
  return {
    name: (str(x.dtype), x.shape, np.asarray(x).tobytes())
    for name, x in arrays.items()
  }


def contents(workdir: pathlib.Path) -> dict[str | int, object]:
  """All that a run leaves behind, less times; checkpoints by their steps."""
  found = {}
  for path in workdir.glob("checkpoints/*"):
    if not path.name.isdigit():
      found[path.name] = "was left"
      continue
    state = ocp.StandardCheckpointer().restore(path.absolute() / "state")
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    found[int(path.name)] = as_bytes(
      {jax.tree_util.keystr(k): x for k, x in leaves}
    )
  for name in ("samples.npz", "scores.npz"):
    with np.load(workdir / name) as arrays:
      found[name] = as_bytes(arrays)
  for name in ("results.json", "metrics.jsonl"):
    text = (workdir / name).read_text("utf-8")
    lines = [
      json.loads(x) for x in (text.splitlines() if "jsonl" in name else [text])
    ]
    found[name] = [
      {key: x for key, x in line.items() if key not in TIMED} for line in lines
    ]
  files = {str(path.relative_to(workdir)) for path in workdir.rglob("*")}
  skipped = ("checkpoints/", "tensorboard/")
  return found | {"files": {x for x in files if not x.startswith(skipped)}}


def differences(run: dict, reference: dict) -> list[str | int]:
  """What differs; of the checkpoints, the latest and others that both have kept."""
  latest = max(x for x in reference if isinstance(x, int))
  names = {x for x in {*run, *reference} if isinstance(x, str)}
  names |= (run.keys() & reference.keys()) | {latest}
  return [x for x in sorted(names, key=str) if run.get(x) != reference.get(x)]


class Torture:
  """Kills runs, and keeps count of it.

  Attributes:
    kills: how many, by (phase, signal).
    lost: steps reported and not saved, of every kill in training, by signal.
    resumes: starts that went on from a checkpoint.
    faults: what ought not to have been.
  """

  def __init__(self, folder: pathlib.Path, kills: int, stay, reference):
    self.folder, self.left = folder, kills
    self.stay, self.reference = stay, reference
    self.kills, self.lost = collections.Counter(), collections.defaultdict(list)
    self.runs, self.resumes, self.faults = 0, 0, []
    self.process = None  # of the latest start

  def run(self) -> None:
    """One run, started until a start gets through."""
    self.runs += 1
    workdir = self.folder / f"run_{self.runs}"
    while self._start(workdir):
      pass
    wrong = differences(contents(workdir), self.reference)
    self.faults += [f"{workdir}: {name} differs" for name in wrong]

  def _start(self, workdir) -> bool:
    """Whether a start was killed."""
    before, start = saved(workdir), Start(workdir)
    self.process = start.process
    number = now = None
    if self.left and random.random() < 0.9:
      number = random.choice(SIGNALS)
      trained = before == max(x for x in self.reference if isinstance(x, int))
      weights = [1, 0, 0, 0, 2, 2] if trained else [2, 2, 4, 4, 1, 1]
      (target,) = random.choices(PHASES, weights)
      now = moment(start, target, self.stay)
      start.process.send_signal(number)
    code, log = start.process.wait(), start.log()
    killed = bool(code)
    if killed:
      self.left -= 1
      self.kills[now, number] += 1
      print(f"{self.left} kills left, {len(self.faults)} faults", flush=True)
    where = f"{workdir.name}, {number and number.name} in {now or 'no phase'}"
    wanted = CODES[number] if killed and number else (0,)
    if code not in wanted or re.search("Traceback|error:|cannot be used", log):
      self.faults.append(f"{where}: exit code {code}:{log}")
    resumed = last(r"resuming after step (\d+)", log)
    if resumed is not None:
      self.resumes += 1
      if resumed != before:
        self.faults.append(f"{where}: resumed after {resumed}, saved was {before}")
    if killed and now in ("train", "save"):
      done = last(r"stopped at step (\d+)", log) or last(r": step (\d+)/", log)
      lost = max((done or before) - saved(workdir), 0)
      self.lost[number].append(lost)
      if lost and number != signal.SIGKILL:
        self.faults.append(f"{where}: {lost} steps lost:{log}")
    return killed

  def table(self) -> str:
    """Kills by phase and signal, and the steps that they lost."""
    rows = ["| killed in | " + " | ".join(x.name for x in SIGNALS) + " |"]
    rows += ["|---" * (1 + len(SIGNALS)) + "|"]
    for name in PHASES:
      counts = [str(self.kills[name, number]) for number in SIGNALS]
      rows.append(f"| {name} | {' | '.join(counts)} |")
    lost = [self.lost[number] or [0] for number in SIGNALS]
    cells = [f"{max(x)}, mean {np.mean(x):.1f}" for x in lost]
    return "\n".join(
      [*rows, f"| steps lost in training, most | {' | '.join(cells)} |"]
    )


def main(arguments=None) -> int:
  """The command line; 1 if anything was not as it ought to be."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--kills", default=50, type=int, help="default %(default)s")
  parser.add_argument("--seed", default=0, type=int, help="default %(default)s")
  options = parser.parse_args(arguments)
  random.seed(options.seed)
  # A shell that starts this in the background has SIGINT ignored in all below it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  began = time.monotonic()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="torture_"))
  measure(folder / "cold")  # compiles
  stay = measure(folder / "reference")
  reference = contents(folder / "reference")
  torture = Torture(folder, options.kills, stay, reference)
  wrong = differences(contents(folder / "cold"), reference)
  torture.faults += [
    f"two runs that were left alone: {name} differs" for name in wrong
  ]
  with contextlib.suppress(KeyboardInterrupt):  # the table of the kills so far
    while torture.left > 0:
      torture.run()
  if torture.process is not None:
    torture.process.kill()  # nothing, where it has ended
    torture.process.wait()
  print(torture.table())
  print(
    f"{sum(torture.kills.values())} kills, {torture.runs} runs, {torture.resumes} "
    f"resumes, {time.monotonic() - began:.0f} s; {len(torture.faults)} faults"
  )
  if torture.faults:
    print("\n".join(torture.faults), f"\nfiles are kept in {folder}")
    return 1
  shutil.rmtree(folder)
  return 0


if __name__ == "__main__":
  sys.exit(main())
