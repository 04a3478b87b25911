"""Multiply-accumulates and parameters up to each exit.

The papers' "FLOPs" are counted by this rule, per image: a convolution or linear
layer costs its multiply-accumulates (a linear bias 1 each), a ReLU 1 per
element, a pooling k² per output; BatchNorm, a convolution's bias, concatenation
and interpolation are free. What exit k costs includes every earlier classifier,
since early exiting runs them.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from l2w_jax.models import initializers, layers


def macs(layer: nn.Module, x: PyTree, y: PyTree) -> int:
  """Cost of one call y = layer(x) on one image; 0 for what is not counted."""
  match layer:
    case layers.Conv():
      return _outputs(y) * layer.kernel**2 * x.shape[-1]
    case layers.ConvBNReLU():
      return _outputs(y)  # its ReLU; the convolution counts itself
    case layers.MaxPool():
      return _outputs(y) * layer.kernel**2
    case layers.GlobalAveragePool():
      return _outputs(x)
    case layers.Linear():
      return (x.shape[-1] + 1) * layer.features
    case _:
      return 0


def _outputs(y) -> int:
  return math.prod(y.shape[1:])


def count(
  module: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """(macs [K], parameters [K]) to each exit, without computing anything."""
  key = jax.random.key(0)
  images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
  totals = []
  running = [0, 0]

  def watch(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if context.method_name == "__call__":
      running[0] += macs(context.module, args[0], y)
      own = context.module.variables.get("params", {})
      running[1] += sum(
        leaf.value.size
        for leaf in own.values()
        if isinstance(leaf, initializers.Declared)
      )
    return y

  def forward(module, carry):
    for k in range(module.num_exits):
      carry, _ = module.stage(k, carry)
      totals.append(tuple(running))

  with nn.intercept_methods(watch):
    jax.eval_shape(lambda images: module.init(key, images, method=forward), images)
  macs_to_exit, params_to_exit = np.array(totals).T
  return macs_to_exit, params_to_exit
