"""The training loop: step after step, metrics, checkpoints, and resuming.

Python drives: it dispatches the two half steps of a batch, and reports the step
before while they run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax import models
from l2w_jax.data import feeds, order, sources
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import directory, parallel
from l2w_jax.run.progress import Progress
from l2w_jax.training import checkpoint, diagnostics, scores
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
) -> tuple[Float[Array, "K M"], Float[Array, "K M"]]:
  """(sum of the weights, number of the samples) of every exit and loss bin."""
  width = 2 * math.log(num_classes) / LOSS_BINS
  bins = jnp.clip(losses // width, 0, LOSS_BINS - 1).astype(jnp.int32)
  onehot = jax.nn.one_hot(bins, LOSS_BINS)
  return (onehot * weights[..., None]).sum(0), onehot.sum(0)


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
    self._half_steps = {
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
      update: half_step.lower(state, *halves, self._keys[0]).compile()
      for update, half_step in self._half_steps.items()
    }

  def __call__(self, state: TrainState, halves: tuple, step: int):
    """(state after the step, metrics of (half 1, half 2)); see the class."""
    first, second = halves
    half_step = self._half_steps[
      updates_wpn(self._config, self._steps_per_epoch, step)
    ]
    state, of_first = half_step(state, first, second, self._keys[0])
    state, of_second = half_step(state, second, first, self._keys[1])
    return state.replace(step=self._next(state.step)), (of_first, of_second)


def train(workdir: pathlib.Path, config: ConfigDict) -> bool:
  """Trains to the last epoch, from the latest checkpoint if there is one.

  Returns:
    False if the run had already finished.

  Raises:
    ValueError: the workdir belongs to another config, or the config does not
      fit the data or the devices. Nothing is compiled or written before.
  """
  num_devices = parallel.count_devices(config.num_devices)
  unrolled = (
    config_lib.estimator(config.meta.estimator)[1] if config.method == "l2w" else 1
  )
  parallel.check_batch(config.batch, num_devices, config.microbatches * unrolled)
  dataset = sources.load(config.data)
  backbone = models.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )
  config_lib.check_method(config, backbone.num_exits)
  loop = _Loop(workdir, config, dataset, backbone, num_devices)
  if parallel.is_writer():
    directory.check_same_run(workdir, config, num_devices)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "config.json").exists():
      directory.write_config(workdir, config, num_devices)
  with checkpoint.Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
    return loop.run(checkpoints)


class _Loop:
  """One run of the loop: what stays the same from step to step."""

  def __init__(self, workdir, config, dataset, backbone, num_devices):
    self._workdir, self._config = workdir, config
    self._dataset, self._backbone = dataset, backbone
    self._num_devices = num_devices
    if config.diagnose.every and parallel.is_writer():
      self._probe = diagnostics.make_probe(
        dataset, config.diagnose.half, config.diagnose.meta_halves
      )
    self._steps_per_epoch = order.steps_per_epoch(
      len(dataset.train.labels), config.batch
    )
    self._total = config.epochs * self._steps_per_epoch
    self._seconds = {"train": 0.0, "compile": 0.0}
    self._weights = []

  def run(self, checkpoints: checkpoint.Checkpoints) -> bool:
    config, keys = self._config, split_seed(self._config.seed)
    restored = checkpoints.restore(abstract_state(self._backbone, config))
    if restored is None:
      state, step = init_state(keys.init, self._backbone, config), 0
    else:
      state, info = restored
      step, self._seconds = int(state.step), info["seconds"]
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
      if step:
        self._progress.note(f"resuming after step {step} of {self._total}")
      state = parallel.replicate(state, self._num_devices)
      with contextlib.closing(
        feeds.make_feed(self._dataset, config, keys.data, self._num_devices)
      ) as feed:
        halves = self._compile(state, feed, step)
        self._steps(state, feed, halves, step, checkpoints)
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
      self._weights_by_loss = parallel.map_devices(
        lambda *half: devices.mean_of_all(
          weights_by_loss(self._backbone.num_classes, *half)
        ),
        self._num_devices,
      )
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
    pending = None
    while step < self._total:
      state, metrics = self._step(state, halves, step)
      self._keep_weights(step, metrics)
      step += 1
      if step < self._total:
        halves = feed.halves(step)
      if pending is not None:
        self._report(*pending)
      pending = step, metrics
      evaluates = self._due(step, config.evaluate.every)
      saves = self._due(step, config.checkpoint.every)
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
        self._log.flush()
        checkpoints.save(
          step,
          parallel.first(state, self._num_devices),
          {"seconds": self._seconds, "complete": step == self._total},
        )

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
    if step % self._config.log.every == 0:
      rate = learning_rates(self._config, self._steps_per_epoch)[0](step - 1)
      self._write(
        "train", step, {"lr": float(rate), **means, "images_per_second": speed}
      )
    epoch = math.ceil(step / self._steps_per_epoch)
    self._progress.update(step, {**means, "epoch": epoch})
    if self._weights and self._due(step, self._config.log.weights_every):
      self._write_weights(step)

  def _keep_weights(self, step: int, metrics: tuple) -> None:
    """Keeps sums for the picture, if the end of the epoch has one."""
    left = -step % self._steps_per_epoch or self._steps_per_epoch
    if (
      self._config.method != "uniform"
      and left <= PICTURED
      and self._due(step + left, self._config.log.weights_every)
    ):
      self._weights += [
        self._weights_by_loss(half["weights"], half["losses"]) for half in metrics
      ]

  def _write_weights(self, step: int) -> None:
    found = jax.device_get(parallel.first(self._weights, self._num_devices))
    self._weights = []
    total, counts = (self._num_devices * sum(x) for x in zip(*found, strict=True))
    mean = total / np.maximum(counts, 1)
    self._write(
      "weights",
      step,
      {
        "loss_bins": loss_edges(self._backbone.num_classes).tolist(),
        "mean_weight": [
          [
            float(m) if count else None
            for m, count in zip(means, counts, strict=True)
          ]
          for means, counts in zip(mean, counts, strict=True)
        ],
        "count": counts.astype(int).tolist(),
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
