"""What a network says of every sample of a split, each scored exactly once.

Whatever the batch size and the number of devices: the last batch is padded and
its padding dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax.data import augment, feeds, sources
from l2w_jax.method import confidence as confidence_lib
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import parallel

LOGITS_KEPT = 10_000  # of a split; all of ImageNet's would be gigabytes


class Scores(NamedTuple):
  """What thresholds and curves need, for the N samples of a split.

  confidence: float32 [N K], by the measure of the config; prediction: int32
  [N K]; correct: bool [N K]; logits: float32 [≤ LOGITS_KEPT K C], of the first
  samples, which are in no order that matters.
  """

  confidence: np.ndarray
  prediction: np.ndarray
  correct: np.ndarray
  logits: np.ndarray


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
    logits = backbone.apply(variables, augment.normalize(images, mean, std))
    prediction, confidence = confidence_lib.confidence(
      logits, config.evaluate.confidence
    )
    return (
      devices.gather(confidence),
      devices.gather(prediction),
      devices.gather(logits),
    )

  own = parallel.own_rows(batch)
  empty = np.zeros((own.stop - own.start, *dataset.image_shape), np.uint8)
  forward = (
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
      outputs = forward(
        variables, parallel.split_rows(np.pad(images, padding), num_devices)
      )
      *found_here, logits = (
        np.asarray(x)[: num_samples - start]
        for x in parallel.first(outputs, num_devices)
      )
      parts.append([*found_here, logits[: max(0, LOGITS_KEPT - start)].copy()])
    confidence, prediction, logits = map(np.concatenate, zip(*parts, strict=True))
    return Scores(
      confidence, prediction, prediction == split.labels[:, None], logits
    )

  return score
