"""The training loop: blocks of steps, metrics, checkpoints, and resuming.

A block of steps is one dispatch: batches are made, and metrics collected, inside
the compiled loop, and the metrics of a block are fetched while the next one runs.
How many steps a block has follows from how long one takes, and changes nothing
else.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt32
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax import models
from l2w_jax.data import feeds, order, resident, sources
from l2w_jax.method import weighting
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import directory, parallel
from l2w_jax.run.progress import Progress
from l2w_jax.training import checkpoint, diagnostics, scores
from l2w_jax.training.metrics_log import MetricsLog
from l2w_jax.training.state import TrainState, abstract_state, init_state
from l2w_jax.training.step import learning_rates, step_body

BLOCK = 50  # most steps under one dispatch
BLOCK_SECONDS = 2.0  # about; fewer steps for slow ones, so that progress shows
LOSS_BINS = 20  # of the weights-against-loss picture, up to 2·ln C nats


class Block(NamedTuple):
  """What a block of steps reports.

  scalars: {name: [BLOCK 2]}, one row per step and one entry per half.
  weight_sum, weight_count: [BLOCK K M], by exit and loss bin.
  """

  scalars: dict[str, Array]
  weight_sum: Array
  weight_count: Array


def loss_edges(num_classes: int) -> np.ndarray:
  """[M+1] edges in nats of the loss bins; the last bin also takes the rest."""
  return np.linspace(0, 2 * math.log(num_classes), LOSS_BINS + 1)


def make_block_fn(
  backbone: Backbone,
  config: ConfigDict,
  steps_per_epoch: int,
  num_devices: int,
  make_batch_fn: Callable = resident.make_batch_fn,
):
  """(state, data, n, key) -> (state, Block) after n ≤ BLOCK steps, on all devices.

  The state is donated. Data is what a feed gives for the first of the steps; n and
  key, the `key_data` of the feed's key, are replicated over the devices. The key is
  no constant of the program, so that runs of other seeds compile the same one.
  """
  devices = parallel.collectives(num_devices, config.sync)
  step = step_body(
    backbone, config, steps_per_epoch=steps_per_epoch, devices=devices
  )
  names = ("train_loss", "meta_loss") if config.method == "l2w" else ("train_loss",)
  bin_width = 2 * math.log(backbone.num_classes) / LOSS_BINS

  def run(
    state: TrainState, data: PyTree, n: Int[Array, ""], key: UInt32[Array, "2"]
  ):
    batch_fn = make_batch_fn(config, jax.random.wrap_key_data(key), devices)

    def one(i, carry):
      state, block = carry
      state, metrics = step(state, batch_fn(data, state.step))
      bins = jnp.clip(metrics["losses"] // bin_width, 0, LOSS_BINS - 1)
      onehot = jax.nn.one_hot(bins.astype(jnp.int32), LOSS_BINS)  # [2 B K M]
      weights = metrics["weights"][..., None]
      return state, Block(
        {name: block.scalars[name].at[i].set(metrics[name]) for name in names},
        block.weight_sum.at[i].set((onehot * weights).sum((0, 1))),
        block.weight_count.at[i].set(onehot.sum((0, 1))),
      )

    empty = jnp.zeros((BLOCK, backbone.num_exits, LOSS_BINS))
    block = Block({name: jnp.zeros((BLOCK, 2)) for name in names}, empty, empty)
    state, block = jax.lax.fori_loop(0, n, one, (state, block))
    mean_sum, mean_count = devices.mean_of_all(
      (block.weight_sum, block.weight_count)
    )
    return state, block._replace(
      weight_sum=mean_sum * num_devices, weight_count=mean_count * num_devices
    )

  return parallel.map_devices(run, num_devices, donate_argnums=(0,))


def train(workdir: pathlib.Path, config: ConfigDict) -> bool:
  """Trains to the last epoch, from the latest checkpoint if there is one.

  Returns:
    False if the run had already finished.

  Raises:
    ValueError: the workdir belongs to another config, or the config does not
      fit the data or the devices. Nothing is compiled or written before.
  """
  num_devices = parallel.count_devices(config.num_devices)
  parallel.check_batch(
    config.batch,
    num_devices,
    config.microbatches * config_lib.estimator(config.meta.estimator)[1],
  )
  dataset = sources.load(config.data)
  backbone = models.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )
  if config.method == "fixed":
    weighting.check_exit_weights(config.baseline.exit_weights, backbone.num_exits)
  loop = _Loop(workdir, config, dataset, backbone, num_devices)
  if parallel.is_writer():
    directory.check_same_run(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "config.json").exists():
      directory.write_config(workdir, config)
  with checkpoint.Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
    return loop.run(checkpoints)


class _Loop:
  """One run of the loop: what stays the same from block to block."""

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

  def run(self, checkpoints: checkpoint.Checkpoints) -> bool:
    config = self._config
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    restored = checkpoints.restore(abstract_state(self._backbone, config))
    if restored is None:
      state, step = init_state(init_key, self._backbone, config), 0
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
        feeds.make_feed(self._dataset, config, data_key, self._num_devices)
      ) as feed:
        key = parallel.replicate(jax.random.key_data(data_key), self._num_devices)
        run_block = self._compile(key, state, feed, step)
        self._blocks(
          lambda *args: run_block(*args, key), state, feed, step, checkpoints
        )
    return True

  def _compile(self, key, state, feed, step):
    began = time.monotonic()
    with self._progress.compiling("the training step"):
      run_block = (
        make_block_fn(
          self._backbone,
          self._config,
          self._steps_per_epoch,
          self._num_devices,
          feed.make_batch_fn,
        )
        .lower(state, feed.data(step), self._count(1), key)
        .compile()
      )
    with self._progress.compiling("the evaluation"):
      self._score = scores.compile_scorer(
        state.variables,
        self._backbone,
        self._dataset,
        self._config,
        self._num_devices,
      )
    self._diagnosis = None
    if self._config.diagnose.every and parallel.is_writer():
      with self._progress.compiling("the diagnosis"):
        self._diagnosis = diagnostics.Diagnosis(
          self._backbone,
          self._config,
          self._steps_per_epoch,
          parallel.first(state, self._num_devices),
          self._probe,
        )
    self._seconds["compile"] += time.monotonic() - began
    return run_block

  def _count(self, n: int) -> Array:
    return parallel.replicate(jnp.asarray(n, jnp.int32), self._num_devices)

  def _blocks(self, run_block, state, feed, step, checkpoints):
    """Runs block after block; the report of one waits while the next runs."""
    self._reported_at = began = time.monotonic()
    pending, size = None, None
    every = self._config.diagnose.every
    if every and step == 0:
      began += self._diagnose(state, step)
    while step < self._total:
      n = min(size or 1, self._steps_per_epoch - step % self._steps_per_epoch)
      if every:
        n = min(n, every - step % every)
      state, block = run_block(state, feed.data(step), self._count(n))
      size = size or self._block_size(block, feed)
      if pending is not None:
        self._report(*pending)
      pending = step, n, parallel.first(block, self._num_devices)
      step += n
      evaluates = self._due(step, self._config.evaluate.every)
      saves = self._due(step, self._config.checkpoint.every)
      # After the last step the learning rate, and so every gradient, is 0.
      diagnoses = every and step % every == 0 and step < self._total
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

  def _block_size(self, block: Block, feed: feeds.Feed) -> int:
    """How many steps take about BLOCK_SECONDS, by one that is running."""
    if not feed.whole:
      return 1
    jax.block_until_ready(block)
    seconds = time.monotonic() - self._reported_at
    # The processes of a run take the same steps together.
    return parallel.from_writer(min(BLOCK, max(1, int(BLOCK_SECONDS / seconds))))

  def _due(self, step: int, every: int) -> bool:
    """Whether something done every `every` epochs, and at the end, is due."""
    epoch, rest = divmod(step, self._steps_per_epoch)
    return rest == 0 and (epoch % every == 0 or step == self._total)

  def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    self._log.write(kind, step, step / self._steps_per_epoch, values)

  def _report(self, step: int, n: int, block: Block) -> None:
    """Writes the lines of a block; waits until it is done."""
    block = jax.device_get(block)
    now = time.monotonic()
    speed = n * self._config.batch / (now - self._reported_at)
    self._reported_at = now
    rates = learning_rates(self._config, self._steps_per_epoch)[0](
      jnp.arange(step, step + n)
    )
    means = {name: _mean_of_known(rows[:n]) for name, rows in block.scalars.items()}
    for i in range(n):
      if (step + i + 1) % self._config.log.every == 0:
        self._write(
          "train",
          step + i + 1,
          {
            "lr": float(rates[i]),
            **{
              name: float(rows[i])
              for name, rows in means.items()
              if np.isfinite(rows[i])
            },
            "images_per_second": speed,
          },
        )
    done = step + n
    for i in range(n):
      if (step + i) % self._steps_per_epoch % BLOCK == 0:
        self._weights = (0, 0)
      self._weights = (
        self._weights[0] + block.weight_sum[i],
        self._weights[1] + block.weight_count[i],
      )
    self._progress.update(
      done,
      {
        **{name: rows[-1] for name, rows in means.items()},
        "epoch": math.ceil(done / self._steps_per_epoch),
      },
    )
    if self._config.method != "uniform" and self._due(
      done, self._config.log.weights_every
    ):
      self._write_weights(done, *self._weights)

  def _write_weights(
    self, step: int, total: np.ndarray, counts: np.ndarray
  ) -> None:
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


def _mean_of_known(rows: np.ndarray) -> np.ndarray:
  """Mean over the halves of each step; NaN where no half knows a value."""
  known = np.isfinite(rows)
  return np.where(
    known.any(axis=1),
    np.where(known, rows, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1),
    np.nan,
  )
