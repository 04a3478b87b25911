"""The training loop: step after step, metrics, checkpoints, and resuming.

Python drives: it dispatches the two half steps of a batch, and reports the step
before while they run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax import models
from l2w_jax.data import feeds, order
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import backend, directory, files, parallel, stopping
from l2w_jax.run.progress import Progress
from l2w_jax.training import checkpoint, diagnostics, identity, scores
from l2w_jax.training.metrics_log import MetricsLog
from l2w_jax.training.state import (
  TrainState,
  abstract_state,
  init_state,
  split_seed,
)
from l2w_jax.training.step import learning_rates, make_half_step, updates_wpn

LOSS_BINS = 20  # of the weights-against-loss picture, up to 2·ln C nats
PICTURED = 50  # last steps of an epoch, whose weights are in the picture


def loss_edges(num_classes: int) -> np.ndarray:
  """[M+1] edges in nats of the loss bins; the last bin also takes the rest."""
  return np.linspace(0, 2 * math.log(num_classes), LOSS_BINS + 1)


def weights_by_loss(
  num_classes: int, weights: Float[Array, "B K"], losses: Float[Array, "B K"]
) -> tuple[Float[Array, "K M"], Float[Array, "K M"], Float[Array, "K M"]]:
  """Sums over the samples of every exit and loss bin: (w - 1, (w - 1)², 1)."""
  width = 2 * math.log(num_classes) / LOSS_BINS
  bins = jnp.clip(losses // width, 0, LOSS_BINS - 1).astype(jnp.int32)
  onehot = jax.nn.one_hot(bins, LOSS_BINS)
  from_one = (weights - 1)[..., None]
  return ((onehot * from_one).sum(0), (onehot * from_one**2).sum(0), onehot.sum(0))


def _or_null(table: np.ndarray) -> list[list[float | None]]:
  """As JSON has it, for a bin without samples."""
  return [[None if np.isnan(x) else float(x) for x in row] for row in table]


class Step:
  """One loader batch on all devices: (state, halves, step) -> (state, metrics).

  The state is donated. Metrics are those of both half steps, on the devices.

  Args:
    backbone, config, steps_per_epoch: of the run.
    num_devices: of all processes.
  """

  def __init__(
    self,
    backbone: Backbone,
    config: ConfigDict,
    steps_per_epoch: int,
    num_devices: int,
  ):
    self._config, self._steps_per_epoch = config, steps_per_epoch
    half_step = make_half_step(
      backbone,
      config,
      steps_per_epoch=steps_per_epoch,
      devices=parallel.collectives(num_devices, config.sync),
    )
    kinds = {updates_wpn(config, steps_per_epoch, step) for step in (0, 1)}
    self._half_steps: dict[bool, Any] = {
      update: parallel.map_devices(
        functools.partial(half_step, update_wpn=update), num_devices, (0,)
      )
      for update in kinds
    }
    self._next = parallel.map_devices(lambda step: step + 1, num_devices)
    # On the host: they are arguments, or runs of other seeds would compile anew.
    keys = np.asarray(jax.random.key_data(split_seed(config.seed).halves))
    self._keys = [parallel.replicate(key, num_devices) for key in keys]

  def compile(self, state: TrainState, halves: tuple) -> None:
    """Compiles what `__call__` runs, for arguments like these."""
    self._half_steps = {
      update: half_step.lower(state, *halves[:2], self._keys[0]).compile()
      for update, half_step in self._half_steps.items()
    }

  def __call__(self, state: TrainState, halves: tuple, step: int):
    """(state after the step, metrics of (half 1, half 2)); see the class."""
    first, second, *meta_halves = halves
    of_first, of_second = meta_halves or (second, first)
    half_step = self._half_steps[
      updates_wpn(self._config, self._steps_per_epoch, step)
    ]
    state, one = half_step(state, first, of_first, self._keys[0])
    state, two = half_step(state, second, of_second, self._keys[1])
    return state.replace(step=self._next(state.step)), (one, two)


def check(config: ConfigDict) -> int:
  """How many devices train a config, which fits all that shows without its data.

  Raises:
    ValueError: its batch, devices or rule do not, before anything is opened.
  """
  num_devices = parallel.count_devices(config.num_devices)
  unrolled = (
    config_lib.estimator(config.meta.estimator)[1] if config.method == "l2w" else 1
  )
  parallel.check_batch(config.batch, num_devices, config.microbatches * unrolled)
  config_lib.check_rule(config)
  return num_devices


def train(
  workdir: str | os.PathLike,
  config: ConfigDict,
  check_run: Callable[[Backbone, bool], None] = lambda *_: None,
) -> bool:
  """Trains to the last epoch, from the latest checkpoint if there is one.

  Args:
    workdir, config: of the run.
    check_run: of (backbone, whether calibration images are held out), raises
      ValueError if that is not what is wanted.

  Returns:
    False if the run had already finished.

  Raises:
    ValueError: the workdir belongs to another config, or the config does not
      fit the data or the devices, before anything is compiled or written; or
      training diverged.
    SystemExit: a signal asked to stop, and all is saved.
  """
  workdir = files.path(workdir)
  num_devices = check(config)
  if parallel.is_writer():
    identity.check_not_lost(workdir)
  dataset, made_of = identity.open_data(workdir, config, num_devices)
  backbone = models.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )
  config_lib.check_method(config, backbone.num_exits)
  check_run(backbone, len(dataset.calibration.labels) > 0)
  asked = config.diagnose.estimators if config.diagnose.every else ()
  if config.method == "l2w" and "classifiers" in (config.meta.look_ahead, *asked):
    _ = backbone.exit_modules  # or an error, before anything is written
  loop = _Loop(workdir, config, dataset, backbone, num_devices, made_of)
  if parallel.is_writer():
    files.make_folder(workdir)
    if not (workdir / "config.json").exists():
      directory.write_config(workdir, config, num_devices)
  with checkpoint.Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
    return loop.run(checkpoints)


class _Loop:
  """One run of the loop: what stays the same from step to step."""

  def __init__(self, workdir, config, dataset, backbone, num_devices, made_of):
    self._workdir, self._config = workdir, config
    self._dataset, self._backbone = dataset, backbone
    self._num_devices, self._identity = num_devices, made_of
    if config.diagnose.every and parallel.is_writer():
      self._probe = diagnostics.make_probe(
        dataset, config.diagnose.half, config.diagnose.meta_halves
      )
    self._steps_per_epoch = order.steps_per_epoch(
      len(dataset.train.labels), config.batch
    )
    order.check_meta(len(dataset.meta.labels), config.batch)
    self._total = config.epochs * self._steps_per_epoch
    self._schedule, _ = learning_rates(config, self._steps_per_epoch)
    self._seconds = {"train": 0.0, "compile": 0.0}
    self._saved = 0  # step of the latest checkpoint
    self._weights = None

  def run(self, checkpoints: checkpoint.Checkpoints) -> bool:
    config, keys = self._config, split_seed(self._config.seed)
    restored = checkpoints.restore(abstract_state(self._backbone, config))
    step = 0
    if restored is not None:
      state, info = restored
      step, self._seconds = int(state.step), info["seconds"]
      self._saved, self._weights = step, self._replicated(info.get("weight_sums"))
    if step >= self._total:
      return False
    with (
      MetricsLog(self._workdir, step) as self._log,
      Progress(
        self._total,
        label=f"train {config.method}",
        interval=config.log.seconds,
        start=step,
        silent=not parallel.is_writer(),
      ) as self._progress,
    ):
      self._progress.note(backend.describe(self._num_devices))
      parts = self._num_devices, config.microbatches
      fuller = parallel.fuller_batch(config.batch, *parts)
      if fuller and jax.default_backend() == "tpu":
        self._progress.note(
          f"{config.batch // (2 * math.prod(parts))} images a device at a time "
          f"fill a TPU's {parallel.LANES} lanes in part; "
          f"config.batch={fuller} fills them"
        )
      if restored is None:
        state = init_state(keys.init, self._backbone, config)
      else:
        self._progress.note(f"resuming after step {step} of {self._total}")
      state = parallel.replicate(state, self._num_devices)
      with contextlib.closing(
        feeds.make_feed(self._dataset, config, keys.data, self._num_devices)
      ) as feed:
        halves = self._compile(state, feed, step)
        with stopping.held():
          self._steps(state, feed, halves, step, checkpoints)
          checkpoints.wait()
      number = parallel.largest(stopping.asked())
      if number:
        self._progress.note(
          f"stopped at step {self._saved}; the same command goes on"
        )
        sys.exit(stopping.exit_code(number))
    return True

  def _compile(self, state, feed, step):
    """Compiles all that the loop runs; the halves of the first step."""
    config, began = self._config, time.monotonic()
    with self._progress.compiling("the training step"):
      self._step = Step(
        self._backbone, config, self._steps_per_epoch, self._num_devices
      )
      halves = feed.halves(step)
      self._step.compile(state, halves)
      devices = parallel.collectives(self._num_devices, config.sync)

      def add_weights(sums, *half):
        found = weights_by_loss(self._backbone.num_classes, *half)
        return jax.tree.map(
          lambda x, mean: x + (self._num_devices * mean).astype(x.dtype),
          sums,
          devices.mean_of_all(found),
        )

      self._add_weights = parallel.map_devices(add_weights, self._num_devices)
      self._agree = parallel.Agreement(self._num_devices)
    with self._progress.compiling("the evaluation"):
      self._score = scores.compile_scorer(
        state.variables, self._backbone, self._dataset, config, self._num_devices
      )
    self._diagnosis = None
    if config.diagnose.every and parallel.is_writer():
      with self._progress.compiling("the diagnosis"):
        self._diagnosis = diagnostics.Diagnosis(
          self._backbone,
          config,
          self._steps_per_epoch,
          parallel.first(state, self._num_devices),
          self._probe,
        )
    self._seconds["compile"] += time.monotonic() - began
    return halves

  def _steps(self, state, feed, halves, step, checkpoints):
    """Step after step; the report of one waits while the next runs."""
    config = self._config
    self._reported_at = began = time.monotonic()
    if config.diagnose.every and step == 0:
      began += self._diagnose(state, step)
    self._save_at = began + 60 * config.checkpoint.every
    pending = stop = None
    while step < self._total and not stop:
      state, metrics = self._step(state, halves, step)
      step += 1
      if step < self._total:
        halves = feed.halves(step)
      if pending is not None:
        self._report(*pending)
      self._keep_weights(step, metrics)
      pending = step, metrics
      stop, in_time = self._agree(stopping.asked(), self._minutes_are_over())
      evaluates = self._due(step, config.evaluate.every)
      saves = stop or in_time or self._saves(step)
      # After the last step the learning rate, and so every gradient, is 0.
      diagnoses = (
        config.diagnose.every
        and step % config.diagnose.every == 0
        and step < self._total
      )
      if evaluates or saves or diagnoses:
        self._report(*pending)
        pending = None
      if diagnoses:
        began += self._diagnose(state, step)
      if evaluates:
        self._evaluate(state, step)
      if saves:
        self._seconds["train"] += time.monotonic() - began
        began = time.monotonic()
        self._save(state, step, checkpoints)

  def _save(self, state, step, checkpoints):
    state = jax.device_get(parallel.first(state, self._num_devices))
    path = checkpoint.not_finite(state)
    if path:
      raise self._diverged(step, f"{path} is not finite")
    self._log.flush()
    weights = self._weights and parallel.first(self._weights, self._num_devices)
    checkpoints.save(
      step,
      state,
      {
        "seconds": self._seconds,
        "complete": step == self._total,
        "identity": self._identity,
        "weight_sums": jax.tree.map(lambda x: np.asarray(x).tolist(), weights),
      },
    )
    self._saved = step

  def _saves(self, step: int) -> bool:
    """Whether `checkpoint.every` epochs or steps end here, or the run does."""
    every, unit = self._config.checkpoint.every, self._config.checkpoint.unit
    if unit == "epochs":
      return self._due(step, every)
    return step == self._total or (unit == "steps" and step % every == 0)

  def _minutes_are_over(self) -> bool:
    """Whether `checkpoint.every` minutes are, since the start or the last True."""
    now = time.monotonic()
    if self._config.checkpoint.unit != "minutes" or now < self._save_at:
      return False
    self._save_at = now + 60 * self._config.checkpoint.every
    return True

  def _diverged(self, step: int, what: str) -> ValueError:
    last = (
      f"the last finite checkpoint is step {self._saved}"
      if self._saved
      else "there is no finite checkpoint yet"
    )
    keys = "config.optimizer.learning_rate or config.optimizer.weight_decay"
    if self._config.method == "l2w":
      keys += ", or config.meta.learning_rate or config.meta.weight_decay"
    return ValueError(
      f"training diverged: {what} at step {step}, where the learning rate is "
      f"{self._learning_rate(step):g}; {last}; train into another workdir with a "
      f"smaller {keys}"
    )

  def _learning_rate(self, step: int) -> float:
    """That of the step before `step`."""
    return float(np.asarray(self._schedule(step - 1)))

  def _due(self, step: int, every: int) -> bool:
    """Whether something done every `every` epochs, and at the end, is due."""
    epoch, rest = divmod(step, self._steps_per_epoch)
    return rest == 0 and (epoch % every == 0 or step == self._total)

  def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    self._log.write(kind, step, step / self._steps_per_epoch, values)

  def _report(self, step: int, metrics: tuple) -> None:
    """Writes the line of the step before `step`; waits until that is done."""
    names = [name for name in ("train_loss", "meta_loss") if name in metrics[0]]
    halves = jax.device_get(
      parallel.first(
        [{name: half[name] for name in names} for half in metrics],
        self._num_devices,
      )
    )
    now = time.monotonic()
    speed = self._config.batch / (now - self._reported_at)
    self._reported_at = now
    means = {
      name: float(np.mean([half[name] for half in halves])) for name in names
    }
    for name, value in means.items():
      if not math.isfinite(value):
        raise self._diverged(step, f"{name} is {value}")
    if step % self._config.log.every == 0:
      rate = self._learning_rate(step)
      self._write("train", step, {"lr": rate, **means, "images_per_second": speed})
    epoch = math.ceil(step / self._steps_per_epoch)
    self._progress.update(step, {**means, "epoch": epoch})
    pictured = self._due(step, self._config.log.weights_every)
    if pictured and self._weights is not None:
      self._write_weights(step)

  def _keep_weights(self, step: int, metrics: tuple) -> None:
    """Adds those of a step to the picture, if the end of its epoch has one."""
    left = -step % self._steps_per_epoch
    if (
      self._config.method == "uniform"
      or left >= PICTURED
      or not self._due(step + left, self._config.log.weights_every)
    ):
      return
    if self._weights is None or left + 1 == min(PICTURED, self._steps_per_epoch):
      empty = np.zeros((self._backbone.num_exits, LOSS_BINS))
      self._weights = self._replicated((empty,) * 3)
    for half in metrics:
      self._weights = self._add_weights(
        self._weights, half["weights"], half["losses"]
      )

  def _replicated(self, sums):
    """Sums of `weights_by_loss`, as they are kept on the devices; None stays so."""
    return sums and parallel.replicate(
      tuple(np.asarray(x, np.float32) for x in sums), self._num_devices
    )

  def _write_weights(self, step: int) -> None:
    total, squares, counts = map(
      np.asarray, jax.device_get(parallel.first(self._weights, self._num_devices))
    )
    self._weights = None
    total, squares = (
      np.where(counts, x / np.maximum(counts, 1), np.nan) for x in (total, squares)
    )
    std = np.sqrt(np.maximum(squares - total**2, 0))
    self._write(
      "weights",
      step,
      {
        "loss_bins": loss_edges(self._backbone.num_classes).tolist(),
        "mean_weight": _or_null(1 + total),
        "std_weight": _or_null(std),
        "count": np.rint(counts).astype(int).tolist(),
      },
    )

  def _diagnose(self, state: TrainState, step: int) -> float:
    """Writes what `diagnostics` says of a state; the seconds that took."""
    began = time.monotonic()
    if self._diagnosis is not None:
      self._write(
        "diagnose", step, self._diagnosis(parallel.first(state, self._num_devices))
      )
    seconds = time.monotonic() - began
    self._reported_at += seconds
    return seconds

  def _evaluate(self, state: TrainState, step: int) -> None:
    if not len(self._dataset.calibration.labels):
      return
    found = self._score(state.variables, self._dataset.calibration)
    self._write(
      "evaluate",
      step,
      {"split": "calibration", "accuracy": found.correct.mean(axis=0).tolist()},
    )
