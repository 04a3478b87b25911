"""How good, how noisy and how dear a meta-gradient is, and what weights do.

Everything is asked of one state of a run and one `Probe`, a train half and M meta
halves that stay the same throughout, on one device. So what moves from one line
to the next is the network, and nothing a diagnosis does moves the run.

- Error: an estimate ĝ of ∇_Φ L_meta against the exact g (`meta.wpn_gradient`) on
  the same halves: their cosine, and the relative error |ĝ - g| / |g|. Unrolled
  steps are exact for a look-ahead of their own; there it says how far that leads.
- Noise: the exact gradients g_1 … g_M of the same train half and M meta halves
  have a mean ḡ and the variance Σ_m |g_m - ḡ|² / (M - 1), the trace of their
  covariance. Signal to noise is (|ḡ|² - variance / M) / variance, of one meta
  half; the subtraction takes out what noise alone adds to |ḡ|², so it can fall
  below 0. Exit k has those parameters that make the WPN's k-th output.
- Cost: XLA's operations and temporary memory of the compiled meta-gradient, its
  forward pass at Θ included, the real update not; milliseconds of a call.
- Weights: which of exits and samples they tell apart, see `learned`; their mean
  against loss and against confidence at each exit, and of the
  easiest and the hardest quarter of the samples by mean loss over exits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from l2w_jax.data import augment, sources
from l2w_jax.method import weighting
from l2w_jax.models.backbone import Backbone
from l2w_jax.run.parallel import ONE_DEVICE
from l2w_jax.training.state import TrainState
from l2w_jax.training.step import (
  Batch,
  forward_pass,
  make_half_step,
  train_losses_fn,
  weights_of,
)

EXACT = "grad"
BINS = 10  # of loss and of confidence
QUARTER = 4  # easy and hard samples are this part of a half, each
ALIKE = 0.02  # standard deviation below which weights are called all alike
ROUNDING = 1e-3  # standard deviation that rounding gives to a constant weight
MOSTLY = 0.8  # share of the weights' variance from which it is called by its cause


class Probe(NamedTuple):
  """Halves that a run is asked about: {"image": [B H W channels], "label": [B]}."""

  train_half: Batch
  meta_halves: tuple[Batch, ...]


class Estimator(NamedTuple):
  """A compiled meta-gradient: (state, train_half, meta_half) -> metrics.

  metrics: {"meta_loss": [], "wpn_gradient": like Φ}.
  flops, temporary_bytes: of the compiled program.
  """

  run: Callable[[TrainState, Batch, Batch], dict[str, PyTree]]
  flops: float
  temporary_bytes: int
  compile_seconds: float


def make_probe(
  dataset: sources.Dataset, half: int, num_meta_halves: int, seed: int = 0
) -> Probe:
  """A train half and M meta halves without augmentation, as those of a run are.

  Meta halves are of `dataset.meta` where `data.meta` holds images out, else of the
  train images that are not in the train half; each is drawn anew from all of them.

  Raises:
    ValueError: there are not enough images for a train and a meta half.
  """
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(dataset.train.labels))
  apart = len(dataset.meta.labels)
  if apart:
    meta, others, largest = dataset.meta, np.arange(apart), min(len(order), apart)
    where = f"the train split has {len(order)} images and config.data.meta {apart}"
  else:
    meta, others, largest = dataset.train, order[half:], len(order) // 2
    where = f"the train split has {len(order)} images for two halves"
  if half > largest:
    raise ValueError(
      f"config.diagnose.half is {half}, but {where}; use at most {largest}"
    )
  mean, std = (jnp.asarray(x, jnp.float32) for x in (dataset.mean, dataset.std))

  def take(split: sources.Split, chosen: np.ndarray) -> Batch:
    chosen = np.sort(chosen)
    images = jnp.asarray(split.images[chosen])
    return {
      "image": augment.normalize(images, mean, std),
      "label": jnp.asarray(split.labels[chosen]),
    }

  meta_halves = [
    take(meta, rng.permutation(others)[:half]) for _ in range(num_meta_halves)
  ]
  return Probe(take(dataset.train, order[:half]), tuple(meta_halves))


def compile_estimator(
  name: str,
  backbone: Backbone,
  config: ConfigDict,
  steps_per_epoch: int,
  state: TrainState,
  probe: Probe,
) -> Estimator:
  """The meta-gradient by one estimator, without the real update.

  Args:
    name: as `config.meta.estimator`, or "classifiers", see `meta.look_ahead`.
    backbone, config, steps_per_epoch: those of the run.
    state, probe: give the shapes; nothing is computed.
  """
  config = config.copy_and_resolve_references()
  look_ahead = "classifiers" if name == "classifiers" else "network"
  name = EXACT if name == "classifiers" else name
  config.meta.update(estimator=name, look_ahead=look_ahead, interval=1)
  config.microbatches = 1
  half_step = make_half_step(backbone, config, steps_per_epoch=steps_per_epoch)

  def run(state, train_half, meta_half):
    key = jnp.zeros(2, jnp.uint32)  # of methods that draw weights
    _, metrics = half_step(state, train_half, meta_half, key)
    return {name: metrics[name] for name in ("meta_loss", "wpn_gradient")}

  began = time.monotonic()
  compiled: Any = (
    jax.jit(run).lower(state, probe.train_half, probe.meta_halves[0]).compile()
  )
  seconds = time.monotonic() - began
  flops = compiled.cost_analysis()["flops"]
  return Estimator(
    compiled, flops, compiled.memory_analysis().temp_size_in_bytes, seconds
  )


def cosine(estimate: PyTree, exact: PyTree) -> float:
  """Cosine of the angle between two gradients; NaN if either is 0."""
  a, b = _flat(estimate), _flat(exact)
  norms = np.linalg.norm(a) * np.linalg.norm(b)
  return float(a @ b / norms) if norms else float("nan")


def relative_error(estimate: PyTree, exact: PyTree) -> float:
  """|estimate - exact| / |exact|; NaN where exact is 0."""
  a, b = _flat(estimate), _flat(exact)
  norm = np.linalg.norm(b)
  return float(np.linalg.norm(a - b) / norm) if norm else float("nan")


def variance(gradients: Sequence[PyTree]) -> float:
  """Trace of the covariance of M ≥ 2 gradients, unbiased."""
  rows = np.stack([_flat(g) for g in gradients])
  return float(rows.var(axis=0, ddof=1).sum())


def signal_to_noise(gradients: Sequence[PyTree]) -> float:
  """|E g|² over the variance of one g, from M ≥ 2 of them; NaN without noise."""
  rows = np.stack([_flat(g) for g in gradients])
  noise = variance(gradients)
  signal = np.square(rows.mean(axis=0)).sum() - noise / len(rows)
  return float(signal / noise) if noise else float("nan")


def of_exit(gradient: PyTree, k: int) -> PyTree:
  """The part of a gradient by Φ that makes the WPN's output for exit k."""
  return jax.tree.map(lambda x: x[..., k], gradient["output"])


def mean_by_bin(
  weights: np.ndarray, values: np.ndarray, edges: np.ndarray
) -> list[list[float | None]]:
  """[K M] mean weight of the samples whose value is in each of M bins.

  Args:
    weights, values: [B K].
    edges: [M+1], rising; the outer bins also take what lies beyond.

  Returns:
    one list per exit, None for a bin without a sample.
  """
  bins = np.clip(np.digitize(values, edges) - 1, 0, len(edges) - 2)
  return [
    [
      float(w[b == m].mean()) if (b == m).any() else None
      for m in range(len(edges) - 1)
    ]
    for w, b in zip(weights.T, bins.T, strict=True)
  ]


def easy_and_hard(
  weights: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """[K] mean weight of the easiest quarter of the samples, and of the hardest.

  Easy is a small mean loss over exits; weights and losses are [B K].
  """
  order = np.argsort(losses.mean(axis=1), kind="stable")
  size = max(1, len(order) // QUARTER)
  return weights[order[:size]].mean(axis=0), weights[order[-size:]].mean(axis=0)


def make_weights_fn(
  backbone: Backbone, config: ConfigDict
) -> Callable[[TrainState, Batch], tuple[Array, Array, Array]]:
  """Jitted (state, half) -> (weights, losses, confidence), [B K] each.

  As a step of the run would see them, with the WPN before its update.
  """

  @jax.jit
  def weights_fn(state: TrainState, half: Batch):
    forward = forward_pass(
      backbone, ONE_DEVICE, state.batch_stats, train_losses_fn(config)
    )
    losses, (_, confidence) = forward(state.params, half)
    features = weighting.features(losses, confidence, config.meta.inputs)
    weights = weights_of(config, ONE_DEVICE, state.wpn_params, features)
    return weights, losses, confidence

  return weights_fn


def describe_weights(
  weights: np.ndarray, losses: np.ndarray, confidence: np.ndarray, num_classes: int
) -> dict[str, Any]:
  """The weights of a half against loss and confidence, easy and hard ones apart.

  Arguments are [B K]. The loss bins end at 2·ln C, the confidence bins at 1.
  """
  loss_edges = np.linspace(0, 2 * np.log(num_classes), BINS + 1)
  confidence_edges = np.linspace(0, 1, BINS + 1)
  easy, hard = easy_and_hard(weights, losses)
  return {
    "loss_bins": loss_edges.tolist(),
    "weight_by_loss": mean_by_bin(weights, losses, loss_edges),
    "confidence_bins": confidence_edges.tolist(),
    "weight_by_confidence": mean_by_bin(weights, confidence, confidence_edges),
    "easy_weight": easy.tolist(),
    "hard_weight": hard.tolist(),
  }


def learned(line: dict[str, Any]) -> dict[str, Any]:
  """The "weights" entry of results.json: what kind of weights a run has learned.

  step: the last one that they are of. exit_share: of the variance of all weights,
  the share that the means of the exits explain. mean and std [K]: of the weights at
  an exit. rank_correlation [K]: of loss and mean weight over the loss bins, each as
  heavy as its samples are many; None where the weights of the exit are all alike.
  kind: what they tell apart, "exits", "samples", "both" or "none" of them.

  Args:
    line: of kind "weights" in metrics.jsonl.
  """
  counts = np.asarray(line["count"], float)
  mean, std = (
    np.nan_to_num(np.asarray(line[name], float))
    for name in ("mean_weight", "std_weight")
  )
  share = counts / counts.sum(axis=1, keepdims=True)
  of_exit = (share * mean).sum(axis=1)
  within = (share * (std**2 + (mean - of_exit[:, None]) ** 2)).sum(axis=1)
  total = within.mean() + of_exit.var()
  by_exits = float(of_exit.var() / total) if total else 0.0
  if total < ALIKE**2:
    kind = "none"
  elif by_exits > MOSTLY:
    kind = "exits"
  else:
    kind = "samples" if by_exits < 1 - MOSTLY else "both"
  return {
    "step": line["step"],
    "kind": kind,
    "exit_share": by_exits,
    "mean": of_exit.tolist(),
    "std": np.sqrt(within).tolist(),
    "rank_correlation": [
      _rank_correlation(m, n) if variance > ROUNDING**2 else None
      for m, n, variance in zip(mean, counts, within, strict=True)
    ],
  }


def _rank_correlation(values: np.ndarray, counts: np.ndarray) -> float | None:
  """Spearman's, of the bin and its value, for `counts` samples in each bin."""
  values, counts = values[counts > 0], counts[counts > 0]
  # A sample's rank is the middle of those that are as large as it.
  ranks = [np.cumsum(counts) - counts / 2]
  smaller = (values[None] < values[:, None]) @ counts
  equal = (values[None] == values[:, None]) @ counts
  ranks.append(smaller + equal / 2)
  x, y = (rank - np.average(rank, weights=counts) for rank in ranks)
  norm = np.sqrt((counts @ x**2) * (counts @ y**2))
  return float(counts @ (x * y) / norm) if norm else None


class Diagnosis:
  """All of the above for the states of one run: compiled once, asked often."""

  def __init__(
    self,
    backbone: Backbone,
    config: ConfigDict,
    steps_per_epoch: int,
    state: TrainState,
    probe: Probe,
  ):
    """Compiles the exact meta-gradient and `config.diagnose.estimators`."""
    self._probe, self._num_exits = probe, backbone.num_exits
    self._num_classes = backbone.num_classes
    self._weights_fn = make_weights_fn(backbone, config)
    names = dict.fromkeys((EXACT, *config.diagnose.estimators))
    self._estimators = {
      name: compile_estimator(name, backbone, config, steps_per_epoch, state, probe)
      for name in names
    }

  def __call__(self, state: TrainState) -> dict[str, Any]:
    """What a line of kind "diagnose" in metrics.jsonl holds.

    meta_loss: nats, mean over the meta halves. variance, signal_to_noise, and
    signal_to_noise_by_exit [K]: of the exact gradient. estimators: {name: error
    (mean over the meta halves, and cosine_std), cost}; ms is the median call.
    Beside them what `describe_weights` gives.
    """
    exact, rows = [], {}
    for name, estimator in self._estimators.items():
      found, ms = self._gradients(state, estimator)
      exact = exact or found
      gradients = [x["wpn_gradient"] for x in found]
      pairs = [
        (g, x["wpn_gradient"]) for g, x in zip(gradients, exact, strict=True)
      ]
      cosines = [cosine(*pair) for pair in pairs]
      rows[name] = {
        "cosine": _number(np.mean(cosines)),
        "cosine_std": _number(np.std(cosines, ddof=1)),
        "relative_error": _number(
          np.mean([relative_error(*pair) for pair in pairs])
        ),
        "ms": ms,
        "flops": estimator.flops,
        "temporary_bytes": estimator.temporary_bytes,
        "compile_seconds": estimator.compile_seconds,
      }
    gradients = [x["wpn_gradient"] for x in exact]
    weights = map(np.asarray, self._weights_fn(state, self._probe.train_half))
    return {
      "meta_loss": float(np.mean([x["meta_loss"] for x in exact])),
      "variance": variance(gradients),
      "signal_to_noise": _number(signal_to_noise(gradients)),
      "signal_to_noise_by_exit": [
        _number(signal_to_noise([of_exit(g, k) for g in gradients]))
        for k in range(self._num_exits)
      ],
      "estimators": rows,
      **describe_weights(*weights, self._num_classes),
    }

  def _gradients(self, state, estimator):
    """(metrics of each meta half, milliseconds of the median call)."""
    found, seconds = [], []
    for half in self._probe.meta_halves:
      began = time.perf_counter()
      result = jax.block_until_ready(
        estimator.run(state, self._probe.train_half, half)
      )
      seconds.append(time.perf_counter() - began)
      found.append(jax.device_get(result))
    return found, 1000 * float(np.median(seconds))


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The "diagnostics" entry of results.json, from a run's "diagnose" lines.

  estimators: {name: errors averaged over the lines, the median of their ms, and
  the cost}; first and last: noise, and weights of easy and hard samples, at the
  first and the last line.
  """

  def averaged(name):
    rows = [
      line["estimators"][name] for line in lines if name in line["estimators"]
    ]
    known = {
      key: [row[key] for row in rows if row[key] is not None]
      for key in ("cosine", "relative_error")
    }
    return {key: float(np.mean(x)) if x else None for key, x in known.items()} | {
      "ms": float(np.median([row["ms"] for row in rows])),
      "flops": rows[-1]["flops"],
      "temporary_bytes": rows[-1]["temporary_bytes"],
    }

  kept = (
    "step",
    "meta_loss",
    "variance",
    "signal_to_noise",
    "signal_to_noise_by_exit",
    "easy_weight",
    "hard_weight",
  )
  return {
    "lines": len(lines),
    "estimators": {name: averaged(name) for name in lines[-1]["estimators"]},
    "first": {key: lines[0][key] for key in kept},
    "last": {key: lines[-1][key] for key in kept},
  }


def _flat(tree: PyTree) -> np.ndarray:
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def _number(x) -> float | None:
  """JSON has no NaN: what is not known is null."""
  return float(x) if np.isfinite(x) else None
