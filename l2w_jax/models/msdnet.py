"""MSDNet (Huang et al., ICLR 2018), the backbone of the L2W paper.

A grid of layers: depth runs right, and at every depth the features live on up
to S scales, each half the size of the one before. A layer adds `growth` times
its scale's factor to every scale's channels, half of them from the scale itself
and half from the next finer one. Exit k classifies the coarsest scale after
block k. Deeper in, the finest scales are pruned, and where they are, a
transition narrows what remains.

`plan` works out the grid as plain numbers; `MSDNet` builds it.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from l2w_jax.models import layers
from l2w_jax.models.layers import Image, Mode


class LayerPlan(NamedTuple):
  """One layer of the grid, or the transition behind one.

  first_scale_in, first_scale: finest scale it reads and writes (0-based).
  channels: width at scale s is channels · growth_factors[s], when it leaves.
  transition: 1×1 convolutions that set that width, instead of growth.
  """

  first_scale_in: int
  first_scale: int
  channels: int
  transition: bool


def plan(network) -> list[list[LayerPlan]]:
  """The layers of every block of a model config, or of the `MSDNet` of one.

  Block 0 has `base` layers, block k `step` (even) or step·k + 1 (lin_grow). prune
  "max" drops a scale every ceil(depth / S) layers, with a transition behind the
  layer that drops it. "min" keeps all scales until the last S layers, with
  transitions at one and two thirds of the depth. reduction is the fraction of
  channels that a transition keeps; 0 leaves transitions out.
  """
  num_scales = len(network.growth_factors)
  depths = [network.base] + [
    network.step if network.step_mode == "even" else network.step * k + 1
    for k in range(1, network.num_exits)
  ]
  total = sum(depths)
  interval = math.ceil(total / num_scales)

  def first_scale(depth: int) -> int:
    if network.prune == "max":
      return max(depth - 1, 0) // interval
    return num_scales - min(num_scales, total - depth + 1)

  blocks, depth, channels = [], 0, network.channels
  for num_layers in depths:
    block = []
    for _ in range(num_layers):
      depth += 1
      before, after = first_scale(depth - 1), first_scale(depth)
      channels += network.growth
      block.append(LayerPlan(before, after, channels, transition=False))
      due = (
        after > before
        if network.prune == "max"
        else depth in (total // 3, 2 * total // 3)
      )
      if due and network.reduction > 0:
        channels = math.floor(network.reduction * channels)
        block.append(LayerPlan(after, after, channels, transition=True))
    blocks.append(block)
  return blocks


class GridLayer(nn.Module):
  """One MSDNet layer on the scales from `first_scale` on.

  Scale s receives its input, then half of its growth computed from scale s - 1
  (strided) and half from itself. The finest scale of the whole network has no
  finer one and computes all of its growth from itself.
  """

  first_scale_in: int
  first_scale: int
  growth: int
  growth_factors: tuple[int, ...]
  bottleneck_factors: tuple[int, ...]
  initializer: str

  @nn.compact
  def __call__(self, features: list[Image], mode: Mode) -> list[Image]:
    convs, images, outputs = [], [], []

    def add(x, new, factor, stride, name):
      convs.append(
        layers.BottleneckConv(
          x.shape[-1], new, factor, stride, self.initializer, name=name
        )
      )
      images.append(x)

    for s in range(self.first_scale, len(self.growth_factors)):
      i = s - self.first_scale
      here = s - self.first_scale_in
      x, new = features[here], self.growth * self.growth_factors[s]
      if here > 0:
        new //= 2
        add(
          features[here - 1],
          new,
          self.bottleneck_factors[s - 1],
          2,
          f"layers_{i}_conv_down",
        )
      add(x, new, self.bottleneck_factors[s], 1, f"layers_{i}_conv_normal")
      outputs.append([x])
    grown = iter(layers.bottleneck_convs(convs, images, mode))
    for s, parts in enumerate(outputs, self.first_scale):
      parts.extend(itertools.islice(grown, 2 if s > self.first_scale_in else 1))
    return [jnp.concatenate(parts, axis=-1) for parts in outputs]


class Transition(nn.Module):
  """1×1 ConvBNReLU on every scale that is left."""

  widths: tuple[int, ...]
  initializer: str

  @nn.compact
  def __call__(self, features: list[Image], mode: Mode) -> list[Image]:
    convs = [
      layers.ConvBNReLU(width, 1, initializer=self.initializer, name=f"convs_{i}")
      for i, width in enumerate(self.widths)
    ]
    return layers.conv_bn_relus(convs, features, mode)


class MSDNet(nn.Module):
  """Multi-scale dense network; stage k is block k and its classifier.

  Fields are the paper's; `config.py` says what each means. bottleneck False
  leaves out every 1×1 convolution in front of a 3×3 one.
  """

  num_classes: int
  num_exits: int
  step: int
  step_mode: str
  base: int
  channels: int
  growth: int
  growth_factors: tuple[int, ...]
  bottleneck_factors: tuple[int, ...]
  bottleneck: bool
  reduction: float
  prune: str
  stem: str
  classifier_width: int
  initializer: str

  @staticmethod
  def check(config, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError for a grid that cannot be built or fed."""
    scales = len(config.growth_factors)
    if len(config.bottleneck_factors) != scales:
      raise ValueError(
        f"growth_factors {tuple(config.growth_factors)} and "
        f"bottleneck_factors {tuple(config.bottleneck_factors)} must name "
        "the same number of scales"
      )
    odd = [f for f in config.growth_factors[1:] if config.growth * f % 2]
    if odd:
      raise ValueError(
        f"growth {config.growth} times growth factor {odd[0]} is odd, but "
        "every scale after the first splits its growth in two; use an even "
        "product"
      )
    grid = plan(config)
    if grid[0][0].first_scale_in > 0:
      raise ValueError(
        f"prune 'min' drops {scales - 1} of {scales} scales in the last layers, "
        "one in each, and there are fewer; use more layers (num_exits, base or "
        "step), fewer scales, or prune 'max'"
      )
    for spec in itertools.chain(*grid):
      layers.check_transition(spec.channels, config.reduction)
    layers.check_image_size(
      image_shape,
      (4 if config.stem == "imagenet" else 1) * 2 ** (scales - 1),
      f"{scales} scales and the {config.stem} stem",
    )

  def setup(self):
    bottlenecks = (
      self.bottleneck_factors
      if self.bottleneck
      else (0,) * len(self.growth_factors)
    )

    def layer(spec: LayerPlan) -> nn.Module:
      if spec.transition:
        widths = self.growth_factors[spec.first_scale :]
        return Transition(
          tuple(spec.channels * f for f in widths), self.initializer
        )
      return GridLayer(
        spec.first_scale_in,
        spec.first_scale,
        self.growth,
        self.growth_factors,
        bottlenecks,
        self.initializer,
      )

    widths = tuple(self.channels * f for f in self.growth_factors)
    stem = layers.Stem(
      self.stem, widths, (2,) * (len(widths) - 1), self.initializer
    )
    blocks = [[layer(spec) for spec in block] for block in plan(self)]
    blocks[0].insert(0, stem)
    self.blocks = blocks
    self.classifier = [
      layers.Classifier(self.num_classes, self.classifier_width, self.initializer)
      for _ in blocks
    ]

  def stage(
    self, k: int, carry, mode: Mode = layers.EVALUATE
  ) -> tuple[list[Image], Float[Array, "B C"]]:
    """Carry of stage k - 1 (images for k = 0) -> (carry, logits of exit k)."""
    for layer in self.blocks[k]:
      carry = layer(carry, mode)
    return carry, self.classifier[k](carry[-1], mode)
