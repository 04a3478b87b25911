"""The feed that a loop and an evaluation read from, whichever suits the images.

A feed has `halves(step)`, the two halves of the loader batch of a step, each
{"image", "label"} on the devices and ready for the network; and `close()`. With
`data.meta` images, the meta halves that go with half 1 and half 2 follow as a third
and a fourth.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from l2w_jax.data.resident import ResidentFeed
from l2w_jax.data.sources import Dataset, LazyImages
from l2w_jax.data.streaming import StreamingFeed
from l2w_jax.data.streaming import batches as lazy_batches
from l2w_jax.run import parallel

Feed = ResidentFeed | StreamingFeed


def make_feed(
  dataset: Dataset, config: ConfigDict, key: Array, num_devices: int
) -> Feed:
  """The feed of the train split; both kinds give the same batches.

  Args:
    dataset: lazy images are streamed, others kept on the devices.
    config: the whole config.
    key: decides order and augmentation.
    num_devices: of all processes.
  """
  if isinstance(dataset.train.images, LazyImages):
    return StreamingFeed(
      dataset,
      config,
      key,
      num_devices,
      parallel.own_rows_of_halves(config.batch, num_devices),
    )
  return ResidentFeed(dataset, config, key, num_devices)


def batches(images: np.ndarray | LazyImages, batch: int) -> Iterator[np.ndarray]:
  """uint8 [≤ batch H W channels], every image once and in order."""
  if isinstance(images, LazyImages):
    yield from lazy_batches(images, batch)
  else:
    for start in range(0, len(images), batch):
      yield images[start : start + batch]
