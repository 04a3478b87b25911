"""Augmentation and normalisation inside the compiled step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from l2w_jax.data.order import Batch

Images = UInt8[Array, "B H W channels"]


def normalize(
  images: Images, mean: Float[Array, " channels"], std: Float[Array, " channels"]
) -> Float[Array, "B H W channels"]:
  """(pixels - mean) / std per channel, in the dtype of the statistics."""
  return (images.astype(mean.dtype) - mean) / std


def shift(images: Images, offsets: Int[Array, "B 2"], pad: int) -> Images:
  """Crops of the original size from images padded with black by `pad`.

  Args:
    images: uint8 pixels.
    offsets: top and left corner of each crop, in [0, 2·pad].
    pad: pixels of padding on each side.
  """
  shifted = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  # Rows, then columns, as one choice among 2·pad + 1 slices: XLA makes a loop over
  # the images of a slice for each, which takes a TPU 30 times as long.
  for axis in (1, 2):
    offset = offsets[:, axis - 1][:, None, None, None]
    choices = [
      jax.lax.slice_in_dim(shifted, k, k + images.shape[axis], axis=axis)
      for k in range(2 * pad + 1)
    ]
    shifted = jax.lax.select_n(jnp.broadcast_to(offset, choices[0].shape), *choices)
  return shifted


def flip(images: Images, mirrored: Array) -> Images:
  """Mirrors left-right the images whose entry of `mirrored` [B] is True."""
  return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def draw(config: ConfigDict, key: Array, batch: int) -> dict[str, Array]:
  """Random numbers that `apply` needs for a batch: offsets [B 2], mirrored [B].

  Args:
    config: the data config.
    key: of this batch.
    batch: B.
  """
  offsets_key, flip_key = jax.random.split(key)
  draws = {}
  if config.augment in ("shift", "shift_flip"):
    draws["offsets"] = jax.random.randint(
      offsets_key, (batch, 2), 0, 2 * config.pad + 1
    )
  if config.augment in ("shift_flip", "crop_flip"):
    draws["mirrored"] = jax.random.bernoulli(flip_key, shape=(batch,))
  return draws


def apply(config: ConfigDict, images: Images, draws: dict[str, Array]) -> Images:
  """Shifted and mirrored images, as far as the data config asks for it."""
  if "offsets" in draws:
    images = shift(images, draws["offsets"], config.pad)
  if "mirrored" in draws:
    images = flip(images, draws["mirrored"])
  return images


def ready(
  config: ConfigDict,
  images: Images,
  labels: Int[Array, " B"],
  draws: dict[str, Array],
  statistics: Batch,
) -> Batch:
  """{"image", "label"}, augmented and normalised.

  Args:
    config: the data config.
    images, labels: of a half.
    draws: for them, from `draw`.
    statistics: "mean" and "std" of the channels.
  """
  images = apply(config, images, draws)
  return {
    "image": normalize(images, statistics["mean"], statistics["std"]),
    "label": labels,
  }
