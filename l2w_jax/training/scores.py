"""What a network says of every sample of a split, each scored exactly once.

Whatever the batch size and the number of devices: the last batch is padded and
its padding dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax.data import augment, feeds, sources
from l2w_jax.method import confidence as confidence_lib
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import parallel

TOP = 5
LOGITS_KEPT = 10_000  # of a split; all of ImageNet's would be gigabytes


class Scores(NamedTuple):
  """What thresholds, curves and temperatures need, for the N samples of a split.

  label: int32 [N]; prediction: int32 [N K]; confidence: float32 [N K], by the
  measure of the config; top5: bool [N K], whether the label is among the five
  likeliest classes; logits: float32 [≤ LOGITS_KEPT K C], of the first samples,
  which are in no order that matters.
  """

  label: np.ndarray
  prediction: np.ndarray
  confidence: np.ndarray
  top5: np.ndarray
  logits: np.ndarray

  @property
  def correct(self) -> np.ndarray:
    """Bool [N K], whether the answer of each exit is right."""
    return self.prediction == self.label[:, None]


def compile_scorer(
  variables: PyTree,
  backbone: Backbone,
  dataset: sources.Dataset,
  config: ConfigDict,
  num_devices: int,
) -> Callable[[PyTree, sources.Split], Scores]:
  """(variables, split) -> Scores, compiled for all splits of a data set.

  variables are replicated over the devices (`parallel.replicate`).
  """
  mean = jnp.asarray(dataset.mean, jnp.float32)
  std = jnp.asarray(dataset.std, jnp.float32)
  batch = config.evaluate.batch * num_devices
  devices = parallel.collectives(num_devices)

  def forward(variables, images):
    logits: Any = backbone.apply(variables, augment.normalize(images, mean, std))
    prediction, confidence = confidence_lib.confidence(
      logits, config.evaluate.confidence
    )
    _, likeliest = lax.top_k(logits, min(TOP, logits.shape[-1]))
    return tuple(map(devices.gather, (prediction, confidence, likeliest, logits)))

  own = parallel.own_rows(batch)
  empty = np.zeros((own.stop - own.start, *dataset.image_shape), np.uint8)
  compiled = (
    parallel.map_devices(forward, num_devices)
    .lower(variables, parallel.split_rows(empty, num_devices))
    .compile()
  )

  def score(variables: PyTree, split: sources.Split) -> Scores:
    parts, num_samples = [], len(split.labels)
    in_batch = np.arange(num_samples) % batch
    mine = split.keep((own.start <= in_batch) & (in_batch < own.stop))
    found = feeds.batches(mine.images, len(empty))
    for start in range(0, num_samples, batch):
      images = next(found, empty[:0])  # the last may have none for a process
      padding = [(0, len(empty) - len(images))] + [(0, 0)] * 3
      outputs = compiled(
        variables, parallel.split_rows(np.pad(images, padding), num_devices)
      )
      *found_here, logits = (
        np.asarray(x)[: num_samples - start]
        for x in parallel.first(outputs, num_devices)
      )
      parts.append([*found_here, logits[: max(0, LOGITS_KEPT - start)].copy()])
    prediction, confidence, likeliest, logits = map(
      np.concatenate, zip(*parts, strict=True)
    )
    label = np.asarray(split.labels, np.int32)
    top5 = (likeliest == label[:, None, None]).any(-1)
    return Scores(label, prediction, confidence, top5, logits)

  return score
