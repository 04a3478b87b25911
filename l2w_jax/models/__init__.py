"""Backbones, by an explicit table, or by MODULE.CLASS of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax import named
from l2w_jax.models.backbone import Backbone
from l2w_jax.models.msdnet import MSDNet
from l2w_jax.models.ranet import RANet

BACKBONES = {"msdnet": MSDNet, "ranet": RANet}


def build_backbone(
  config: Mapping[str, Any] | ConfigDict,
  num_classes: int,
  image_shape: tuple[int, int, int],
) -> Backbone:
  """Backbone of a model config (`config.model`).

  Args:
    config: `name` picks the network, the other keys are its fields. What is left
      out has its default.
    num_classes: C, at least 2.
    image_shape: (height, width, channels) in pixels.

  Raises:
    ValueError: an unknown name or key, a value out of range, or an image or grid
      the network cannot take.
  """
  config = config_lib.model_config(config)
  if num_classes < 2:
    raise ValueError(f"num_classes must be at least 2, got {num_classes}")
  if len(image_shape) != 3:
    raise ValueError(
      f"image_shape must be (height, width, channels), got {tuple(image_shape)}"
    )
  network = BACKBONES.get(config.name) or named.own(config.name)
  network.check(config, image_shape)
  fields = config.to_dict()
  del fields["name"]
  how = {name: fields.pop(name) for name in ("remat", "dtype", "precision")}
  # `init` is a method of every Flax module.
  fields["initializer"] = fields.pop("init")
  module = network(num_classes=num_classes, **fields)
  return Backbone(module, num_classes, tuple(image_shape), **how)
