"""RANet (Yang et al., CVPR 2020): one flow per resolution, coarsest first.

The first layer makes a feature map for every flow. Flow 0 works on the coarsest
one and has an exit behind each of its `blocks` blocks. Flow i starts afresh on
the map of its own scale and is block_step blocks longer than the flow before.
Its first blocks, as many as that flow has, are fused: each layer also takes in
the other flow's features in front of the same layer, upsampled. Only the
block_step blocks beyond have exits. So exit k sits behind block k of one flow,
always at the coarsest resolution.

`plan` works out the flows as plain numbers; `RANet` builds them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from l2w_jax.models import layers
from l2w_jax.models.layers import Image, Mode


class BlockPlan(NamedTuple):
  """One block of a flow.

  layers: dense layers in it.
  fused: whether it reads the same block of the flow before.
  down: whether its last layer halves the resolution.
  transition: whether it ends in a 1×1 convolution that narrows it.
  channels: that it hands on in its flow.
  """

  layers: int
  fused: bool
  down: bool
  transition: bool
  channels: int


def plan(network) -> list[list[BlockPlan]]:
  """The blocks of every flow of a model config, or of the `RANet` of one.

  Flow i has n = blocks + i · block_step blocks, block b with `step` layers
  (even) or step · (b + 1) (lg). A flow of scale s halves its resolution s - 1
  times, at the depths where the s - 1 flows before it end. It also narrows
  s - 1 times, behind floor(j · n / s) blocks; the depths differ where two flows
  share a scale.
  """
  ends = [
    network.blocks + i * network.block_step for i in range(len(network.scales))
  ]
  flows = []
  for i, (end, scale) in enumerate(zip(ends, network.scales, strict=True)):
    down_at = ends[i - scale + 1 : i]
    transition_at = [j * end // scale for j in range(1, scale)]
    factor, flow = network.growth_factors[i], []
    channels = network.channels * factor
    for depth in range(1, end + 1):
      even = network.step_mode == "even"
      num_layers = network.step if even else network.step * depth
      fused = i > 0 and depth <= ends[i - 1]
      transition = depth in transition_at
      channels += num_layers * network.growth * factor
      if fused:
        channels += math.floor(network.compress * channels)
      if transition:
        channels = math.floor(network.reduction * channels)
      flow.append(
        BlockPlan(num_layers, fused, depth in down_at, transition, channels)
      )
    flows.append(flow)
  return flows


class DenseLayer(nn.Module):
  """Appends `growth` channels to its input, strided if stride is 2.

  Fused, with features `low` of another flow, floor(compress · growth) of them
  are computed from those and interpolated to the size of the others.
  """

  growth: int
  bottleneck_factor: int
  low_bottleneck_factor: int
  compress: float
  stride: int
  initializer: str

  @nn.compact
  def __call__(self, x: Image, low: Image | None, mode: Mode) -> Image:
    convs, images = [], []

    def add(x, features, *args, name):
      convs.append(
        layers.BottleneckConv(
          x.shape[-1], features, *args, initializer=self.initializer, name=name
        )
      )
      images.append(x)

    from_low = 0 if low is None else math.floor(self.compress * self.growth)
    add(
      x,
      self.growth - from_low,
      self.bottleneck_factor,
      self.stride,
      name="conv_normal",
    )
    if low is not None:
      add(low, from_low, self.low_bottleneck_factor, name="conv_up")
    new, *up = layers.bottleneck_convs(convs, images, mode)
    parts = [layers.resize_bilinear(x, new.shape[1:3]) for x in [x, *up]]
    return jnp.concatenate([*parts, new], axis=-1)


class Features(NamedTuple):
  """Dense features of a block, from which the next flow reads.

  before: in front of the last layer. Layers only append, so its first channels
    are what the earlier layers were given.
  after: behind the last layer, which may have halved the resolution.
  """

  before: Image
  after: Image

  def in_front_of(self, layer: int, num_layers: int, growth: int) -> Image:
    """What that layer of the block was given."""
    width = self.before.shape[-1] - (num_layers - 1 - layer) * growth
    return self.before[..., :width]


class Block(nn.Module):
  """Dense block: (what it hands on in its flow, what the next flow reads)."""

  spec: BlockPlan
  growth: int
  low_growth: int
  bottleneck_factor: int
  low_bottleneck_factor: int
  compress: float
  initializer: str

  @nn.compact
  def __call__(
    self, x: Image, low: Features | None, mode: Mode
  ) -> tuple[Image, Features]:
    num_layers = self.spec.layers
    for i in range(num_layers):
      before = x
      low_before = low and low.in_front_of(i, num_layers, self.low_growth)
      down = self.spec.down and i == num_layers - 1
      x = DenseLayer(
        self.growth,
        self.bottleneck_factor,
        self.low_bottleneck_factor,
        self.compress,
        2 if down else 1,
        self.initializer,
        name=f"layers_{i}",
      )(x, low_before, mode)
    features = Features(before, x)
    conv = functools.partial(
      layers.ConvBNReLU, kernel=1, initializer=self.initializer
    )
    if self.spec.fused:
      assert low is not None
      width = math.floor(self.compress * x.shape[-1])
      last = conv(width, name="conv_last")(low.after, mode)
      last = layers.resize_bilinear(last, x.shape[1:3])
      x = jnp.concatenate([x, last], axis=-1)
    if self.spec.transition:
      x = conv(self.spec.channels, name="transition")(x, mode)
    return x, features


class Carry(NamedTuple):
  """What a stage leaves to the later ones; empty where none of them needs it.

  x: feature map that the flow goes on with.
  waiting: the first layer's maps of the flows to come.
  low: features of this flow's blocks so far, for the next flow.
  """

  x: Image | None
  waiting: list[Image]
  low: list[Features]


class RANet(nn.Module):
  """Resolution adaptive network; stage k ends in block k and its classifier.

  Fields are the paper's; `config.py` says what each means. Scales and factors
  have one entry for each flow, coarsest first. The first layer starts from
  PyTorch's initialisation whatever `initializer` says, as the released one.
  """

  num_classes: int
  blocks: int
  block_step: int
  step: int
  step_mode: str
  channels: int
  growth: int
  growth_factors: tuple[int, ...]
  bottleneck_factors: tuple[int, ...]
  scales: tuple[int, ...]
  compress: float
  reduction: float
  stem: str
  classifier_width: int
  initializer: str

  @staticmethod
  def check(config, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError for flows that cannot be built or fed."""
    scales = tuple(config.scales)
    if scales[0] != 1 or any(
      b - a not in (0, 1) for a, b in itertools.pairwise(scales)
    ):
      raise ValueError(
        f"scales {scales} must start at 1, the coarsest, and go on with the "
        "same scale or the next finer one, such as (1, 2, 3) or (1, 2, 3, 3)"
      )
    for name in ("growth_factors", "bottleneck_factors"):
      if len(config[name]) != len(scales):
        raise ValueError(
          f"{name} {tuple(config[name])} must have one entry for each of "
          f"the {len(scales)} scales {scales}"
        )
    for factor in config.growth_factors[1:]:
      new = config.growth * factor
      if not 1 <= math.floor(config.compress * new) < new:
        raise ValueError(
          f"compress {config.compress} leaves one of two flows without new "
          f"channels: a layer adds {new} (growth {config.growth} times "
          f"factor {factor}), of which the coarser flow makes floor(compress "
          f"· {new}); use a larger growth or another compress"
        )
    if not 0 < config.reduction <= 1:
      raise ValueError(
        f"reduction {config.reduction} must be above 0 and at most 1: a "
        "RANet cannot leave its transitions out"
      )
    for block in itertools.chain(*plan(config)):
      layers.check_transition(block.channels, config.reduction)
    layers.check_image_size(
      image_shape,
      (4 if config.stem == "imagenet" else 1) * 2 ** (scales[-1] - 1),
      f"scales {scales} and the {config.stem} stem",
    )

  @property
  def num_exits(self) -> int:
    """K, the number of blocks in the last flow."""
    return self.blocks + self.block_step * (len(self.scales) - 1)

  def setup(self):
    widths = tuple(self.channels * f for f in self.growth_factors[::-1])
    strides = tuple(
      2 ** (finer - coarser)
      for finer, coarser in itertools.pairwise(self.scales[::-1])
    )
    self.first_layer = layers.Stem(self.stem, widths, strides)
    self.flows = [
      [
        Block(
          spec,
          self.growth * self.growth_factors[i],
          self.growth * self.growth_factors[i - 1],
          self.bottleneck_factors[i],
          self.bottleneck_factors[i - 1],
          self.compress,
          self.initializer,
        )
        for spec in flow
      ]
      for i, flow in enumerate(plan(self))
    ]
    self.classifier = [
      layers.Classifier(self.num_classes, self.classifier_width, self.initializer)
      for _ in range(self.num_exits)
    ]

  def stage(
    self, k: int, carry: Any, mode: Mode = layers.EVALUATE
  ) -> tuple[Carry, Float[Array, "B C"]]:
    """Carry of stage k - 1 (images for k = 0) -> (carry, logits of exit k)."""
    if k == 0:
      x, *waiting = reversed(self.first_layer(carry, mode))
      low = []
    else:
      x, waiting, low = carry
    flow = self.flows[self._flow(k)]
    if k > 0 and self._flow(k - 1) != self._flow(k):
      x, *waiting = waiting
      x, low = _run_fused(flow, x, low, mode)
    x, features = flow[k](x, None, mode)
    logits = self.classifier[k](x, mode)
    low = [*low, features] if waiting else []
    return Carry(x if k + 1 < len(flow) else None, waiting, low), logits

  def _flow(self, k: int) -> int:
    """Flow that exit k belongs to."""
    return max(0, 1 + (k - self.blocks) // self.block_step)


def _run_fused(
  flow: Sequence[Block], x: Image, low: Sequence[Features], mode: Mode
) -> tuple[Image, list[Features]]:
  """The blocks that flow has in common with the one before, of features low."""
  own = []
  for block, low_features in zip(flow[: len(low)], low, strict=True):
    x, features = block(x, low_features, mode)
    own.append(features)
  return x, own
