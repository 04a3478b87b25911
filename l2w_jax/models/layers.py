"""Layers of the multi-exit backbones, with PyTorch's conventions.

Images are [B H W C]. Convolutions pad symmetrically by kernel // 2 and have no
bias, but for the first one of an ImageNet network. BatchNorm normalises with
the biased batch variance and stores the unbiased one, n / (n - 1), with weight
0.1 (what released weights expect).

Each kind of layer that the papers' cost counts (convolution, ReLU, pooling,
linear) is one class here or is called by one, so that `cost` can watch them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from l2w_jax.models import initializers

BN_EPS = 1e-5
BN_MOMENTUM = 0.1  # weight of the new batch; Flax would call this 0.9

# Height, width and channels; unnamed, because layers change them.
Image = Float[Array, "B _ _ _"]


class Mode(NamedTuple):
  """How BatchNorm normalises.

  train: with the statistics of the batch, instead of the running ones.
  axis_name: pmap axis the batch is spread over; its statistics are then those
    of all devices together. None: those of this device.
  """

  train: bool = False
  axis_name: str | None = None


EVALUATE = Mode()


class Conv(nn.Module):
  """Convolution, padded by kernel // 2 so that stride 1 keeps the size."""

  features: int
  kernel: int = 3
  stride: int = 1
  initializer: str = "pytorch"
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Image) -> Image:
    shape = (self.kernel, self.kernel, x.shape[-1], self.features)
    kernel = self.param("kernel", initializers.kernel(self.initializer), shape)
    x, kernel = nn.dtypes.promote_dtype(x, kernel)
    if self.kernel == self.stride == 1:
      # The same numbers as a matrix product: XLA:CPU runs its backward pass
      # two to four times faster than the convolution's. Of rows, because it
      # copies images to transpose them, and keeps the copies.
      y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
      y = y.reshape(*x.shape[:-1], self.features)
    else:
      pad = (self.kernel // 2, self.kernel // 2)
      y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    if self.use_bias:
      init = initializers.fan_in_uniform(self.kernel**2 * x.shape[-1])
      y += self.param("bias", init, (self.features,)).astype(y.dtype)
    return y


class BatchNorm(nn.Module):
  """Batch normalisation over B, H and W as PyTorch computes it.

  In the dtype of its parameters; the result is in that of the image.
  """

  features: int

  def setup(self):
    shape = (self.features,)
    zeros, ones = initializers.constant(0.0), initializers.constant(1.0)
    self.scale = self.param("scale", ones, shape)
    self.bias = self.param("bias", zeros, shape)
    self.mean = self.variable("batch_stats", "mean", zeros, shape)
    self.var = self.variable("batch_stats", "var", ones, shape)

  def __call__(self, x: Image, mode: Mode) -> Image:
    if mode.train:
      return batch_norms([self], [x], mode)[0]
    factor = self.scale * jax.lax.rsqrt(self.var.value + BN_EPS)
    return ((x - self.mean.value) * factor + self.bias).astype(x.dtype)

  def keep(self, mean: Array, var: Array, count: int) -> None:
    """Moves the running statistics to those of a batch of `count` values."""
    if not self.is_initializing():
      unbiased = var * (count / (count - 1))
      self.mean.value += BN_MOMENTUM * (mean - self.mean.value)
      self.var.value += BN_MOMENTUM * (unbiased - self.var.value)


def batch_norms(
  norms: list[BatchNorm], images: list[Image], mode: Mode
) -> list[Image]:
  """Each of several images behind its own BatchNorm, in training.

  Devices exchange the statistics of all in one message, and in one each time a
  derivative is taken; waiting for it is what a message this small costs.
  """
  counts = [_num_values(x, mode.axis_name) for x in images]
  results, means, variances = _normalize(
    mode.axis_name,
    [x.astype(norm.scale.dtype) for norm, x in zip(norms, images, strict=True)],
    [norm.scale for norm in norms],
    [norm.bias for norm in norms],
    [norm.mean.value for norm in norms],
  )
  for norm, mean, var, count in zip(norms, means, variances, counts, strict=True):
    norm.keep(mean, var, count)
  return [y.astype(x.dtype) for y, x in zip(results, images, strict=True)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(
  axis_name: str | None,
  images: list[Image],
  scales: list[Array],
  biases: list[Array],
  centres: list[Array],
):
  """(results, means, biased variances) with the statistics of the batch.

  They do not depend on the centres, see `_moments`.
  """
  means, variances = _moments(images, centres, axis_name)
  return (
    [
      (x - mean) * (scale * jax.lax.rsqrt(var + BN_EPS)) + bias
      for x, scale, bias, mean, var in zip(
        images, scales, biases, means, variances, strict=True
      )
    ],
    means,
    variances,
  )


@_normalize.defjvp
def _normalize_jvp(axis_name, primals, tangents):
  """The derivative in two sums over the batch, forwards as in reverse.

  Automatic differentiation of the definition takes four: it sums again what
  adds up to zero.
  """
  results, means, variances = _normalize(axis_name, *primals)
  centred = [x - mean for x, mean in zip(primals[0], means, strict=True)]
  mean_dots, product_dots = _means(
    (
      tangents[0],
      [c * x_dot for c, x_dot in zip(centred, tangents[0], strict=True)],
    ),
    axis_name,
  )
  var_dots = [2 * product_dot for product_dot in product_dots]
  dots = []
  for c, scale, var, x_dot, scale_dot, bias_dot, mean_dot, var_dot in zip(
    centred, primals[1], variances, *tangents[:3], mean_dots, var_dots, strict=True
  ):
    # y = centred · factor + bias, by the product rule; what depends on the
    # channel alone is gathered first.
    inverse = jax.lax.rsqrt(var + BN_EPS)
    factor = scale * inverse
    factor_dot = scale_dot * inverse - 0.5 * factor * inverse**2 * var_dot
    dots.append(x_dot * factor + c * factor_dot + (bias_dot - factor * mean_dot))
  return (results, means, variances), (dots, mean_dots, var_dots)


def _num_values(x: Image, axis_name: str | None) -> int:
  """Over how many values each channel is normalised, on all devices."""
  count = x.size // x.shape[-1]
  if axis_name is not None:
    count *= jax.lax.axis_size(axis_name)
  if count < 2:
    raise ValueError(
      f"BatchNorm in training needs more than one value per channel, got an "
      f"activation of shape {x.shape}; use a larger batch or image"
    )
  return count


def _means(images: PyTree, axis_name: str | None) -> PyTree:
  """Means per channel.

  Of several devices the sums are divided together: for each by itself, a TPU takes
  1.7 thousand cycles, a quarter of a forward pass in all.
  """
  if axis_name is None:
    return jax.tree.map(lambda x: x.mean((0, 1, 2)), images)
  counts = jax.tree.map(
    lambda x: jnp.full(x.shape[-1], _num_values(x, axis_name), x.dtype), images
  )
  sums = jax.tree.map(lambda x: x.sum((0, 1, 2)), images)
  vector, separate = jax.flatten_util.ravel_pytree(sums)
  divisors, _ = jax.flatten_util.ravel_pytree(counts)
  return separate(jax.lax.psum(vector, axis_name) / divisors)


def _moments(
  images: list[Image], centres: list[Array], axis_name: str | None
) -> tuple[list[Array], list[Array]]:
  """Means and biased variances per channel, in one pass over the images.

  E x = c + E(x - c) and Var x = E(x - c)² - (E(x - c))². The centres c are known
  before the images are, so a TPU takes both sums while it writes the images, which
  makes a forward pass half as long. The difference of the two sums loses
  (E(x - c) / std)² · 2⁻²⁴ of a variance in float32: c has to be near the mean, as
  the running mean is, and not 0.
  """
  centred = [x - c for x, c in zip(images, centres, strict=True)]
  firsts, seconds = _means((centred, [jnp.square(x) for x in centred]), axis_name)
  return [c + first for c, first in zip(centres, firsts, strict=True)], [
    jnp.maximum(second - jnp.square(first), 0)
    for first, second in zip(firsts, seconds, strict=True)
  ]


class ConvBNReLU(nn.Module):
  """Convolution, BatchNorm, ReLU."""

  features: int
  kernel: int = 3
  stride: int = 1
  initializer: str = "pytorch"
  use_bias: bool = False

  def setup(self):
    self.conv = Conv(
      self.features, self.kernel, self.stride, self.initializer, self.use_bias
    )
    self.bn = BatchNorm(self.features)

  def __call__(self, x: Image, mode: Mode) -> Image:
    return jax.nn.relu(self.bn(self.conv(x), mode))


def conv_bn_relus(
  convs: list[ConvBNReLU], images: list[Image], mode: Mode
) -> list[Image]:
  """Several images, each behind its own layer; in training by `batch_norms`."""
  if not mode.train:
    return [conv(x, mode) for conv, x in zip(convs, images, strict=True)]
  images = [conv.conv(x) for conv, x in zip(convs, images, strict=True)]
  return [
    jax.nn.relu(x) for x in batch_norms([conv.bn for conv in convs], images, mode)
  ]


class BottleneckConv(nn.Module):
  """3×3 ConvBNReLU behind an optional 1×1 one that narrows the input.

  The bottleneck is min(C_in, bottleneck_factor · features) wide; 0 leaves it
  out.
  """

  features_in: int
  features: int
  bottleneck_factor: int
  stride: int = 1
  initializer: str = "pytorch"

  def setup(self):
    if self.bottleneck_factor:
      width = min(self.features_in, self.bottleneck_factor * self.features)
      self.reduce = ConvBNReLU(width, 1, initializer=self.initializer)
    self.spatial = ConvBNReLU(self.features, 3, self.stride, self.initializer)

  def __call__(self, x: Image, mode: Mode) -> Image:
    if self.bottleneck_factor:
      x = self.reduce(x, mode)
    return self.spatial(x, mode)


def bottleneck_convs(
  convs: list[BottleneckConv], images: list[Image], mode: Mode
) -> list[Image]:
  """Several images, each behind its own layer; in training by `batch_norms`."""
  if not mode.train:
    return [conv(x, mode) for conv, x in zip(convs, images, strict=True)]
  images = list(images)
  narrow = [i for i, conv in enumerate(convs) if conv.bottleneck_factor]
  reduced = conv_bn_relus(
    [convs[i].reduce for i in narrow], [images[i] for i in narrow], mode
  )
  for i, x in zip(narrow, reduced, strict=True):
    images[i] = x
  return conv_bn_relus([conv.spatial for conv in convs], images, mode)


class Linear(nn.Module):
  """Dense layer with bias and PyTorch's initialisation (uniform ±1/√fan_in).

  With init "he" the bias starts at zero.
  """

  features: int
  initializer: str = "pytorch"

  @nn.compact
  def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B G"]:
    init = initializers.fan_in_uniform(x.shape[-1])
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    bias = self.param(
      "bias",
      init if self.initializer == "pytorch" else initializers.constant(0.0),
      (self.features,),
    )
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    return x @ kernel + bias


def resize_bilinear(x: Image, size: Sequence[int]) -> Image:
  """Image at another (height, width), bilinear with aligned corners.

  The corner pixels keep their place; an output of one pixel takes the first.
  """
  for axis, length in enumerate(size, 1):
    if length != x.shape[axis]:
      weights = _interpolation(x.shape[axis], length).astype(x.dtype)
      # HIGHEST: a GPU or TPU would round the operands to fewer bits.
      x = jnp.einsum(
        "bhwc,uh->buwc" if axis == 1 else "bhwc,uw->bhuc",
        x,
        weights,
        precision=jax.lax.Precision.HIGHEST,
      )
  return x


def _interpolation(length_in: int, length_out: int) -> np.ndarray:
  """[out in] matrix of linear interpolation with aligned ends."""
  step = (length_in - 1) / (length_out - 1) if length_out > 1 else 0.0
  position = step * np.arange(length_out)
  return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(length_in)))


class MaxPool(nn.Module):
  """Max pooling over kernel × kernel windows, padded by kernel // 2."""

  kernel: int = 3
  stride: int = 2

  def __call__(self, x: Image) -> Image:
    pad = self.kernel // 2
    return nn.max_pool(
      x,
      (self.kernel, self.kernel),
      (self.stride, self.stride),
      ((pad, pad), (pad, pad)),
    )


class GlobalAveragePool(nn.Module):
  """Mean over the image, in float32 at least: [B H W C] -> [B C]."""

  def __call__(self, x: Image) -> Float[Array, "B C"]:
    return x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Stem(nn.Module):
  """First layer: image -> one feature map per scale, finest first.

  "cifar" starts with a 3×3 convolution at full size, "imagenet" with a strided
  7×7 one, with bias, and a max pool: a quarter of the size. From there on every
  scale is computed from the one before.

  Fields:
    kind: "cifar" or "imagenet".
    widths: channels of each feature map.
    strides: step from each feature map to the next, one fewer than widths.
  """

  kind: str
  widths: tuple[int, ...]
  strides: tuple[int, ...]
  initializer: str = "pytorch"

  @nn.compact
  def __call__(self, x: Image, mode: Mode) -> list[Image]:
    if self.kind == "imagenet":
      x = ConvBNReLU(
        self.widths[0], 7, 2, self.initializer, use_bias=True, name="layers_0"
      )(x, mode)
      x = MaxPool(3, 2, name="pool")(x)
    else:
      x = ConvBNReLU(self.widths[0], 3, 1, self.initializer, name="layers_0")(
        x, mode
      )
    features = [x]
    for i, (width, stride) in enumerate(
      zip(self.widths[1:], self.strides, strict=True), 1
    ):
      x = ConvBNReLU(width, 3, stride, self.initializer, name=f"layers_{i}")(
        x, mode
      )
      features.append(x)
    return features


class Classifier(nn.Module):
  """Exit classifier: two strided 3×3 ConvBNReLU, global mean, linear.

  width 0 keeps the width of its input, as the ImageNet networks do; the CIFAR
  ones use 128.
  """

  num_classes: int
  width: int
  initializer: str = "pytorch"

  @nn.compact
  def __call__(self, x: Image, mode: Mode) -> Float[Array, "B C"]:
    width = self.width or x.shape[-1]
    for i in range(2):
      x = ConvBNReLU(width, 3, 2, self.initializer, name=f"convs_{i}")(x, mode)
    x = GlobalAveragePool(name="pool")(x)
    return Linear(self.num_classes, self.initializer, name="linear")(x)


def check_image_size(
  image_shape: tuple[int, int, int], shrink: int, reason: str
) -> None:
  """Raises ValueError when height or width is below `shrink` pixels."""
  height, width, _ = image_shape
  if min(height, width) < shrink:
    raise ValueError(
      f"images of {height}×{width} pixels are too small for {reason}: the "
      f"coarsest scale is {shrink} times smaller; use larger images or fewer "
      "scales"
    )


def check_transition(width: int, reduction: float) -> None:
  """Raises ValueError when a transition would be left without channels."""
  if width == 0:
    raise ValueError(
      f"reduction {reduction} leaves a transition without channels; use a larger "
      "one, or more channels or growth"
    )
