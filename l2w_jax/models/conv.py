"""2-D convolution whose derivatives are convolutions in the same layout.

XLA:CPU runs a convolution through its fast kernels only in the layout
[B H W I], [H W I O] -> [B H W O]. It rewrites others to it, but not inside loops
and conditionals, where the usual derivatives of a convolution (which permute the
layout instead of the arrays) fall to code 25 times slower. Here the derivatives
permute the arrays, so a step may be scanned, looped and made conditional on
every backend; on accelerators XLA folds the permutations back into the layout.

y = x ∗ k is bilinear, and with the cotangent g of y, so are

    the input's gradient  x̄ = `_input_gradient`(g, k)
    the kernel's gradient k̄ = `_kernel_gradient`(x, g).

The three are each other's transposes, which closes the set under any number of
forward and reverse derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


class _Geometry(NamedTuple):
  """height, width: of the input; kernel: its side; pad on every side."""

  height: int
  width: int
  kernel: int
  stride: int

  @property
  def pad(self) -> int:
    return self.kernel // 2

  def dilated(self, size: int) -> int:
    """Output size with stride - 1 zeros between its elements."""
    return (size + 2 * self.pad - self.kernel) // self.stride * self.stride + 1


def conv2d(
  x: Float[Array, "B H W I"], kernel: Float[Array, "k k I O"], stride: int
) -> Float[Array, "B H2 W2 O"]:
  """Convolution padded by k // 2 on every side, with a square kernel."""
  geometry = _Geometry(x.shape[1], x.shape[2], kernel.shape[0], stride)
  return _conv.bind(x, kernel, geometry=geometry)


def _convolve(x, kernel, padding, stride=1, lhs_dilation=1, rhs_dilation=1):
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    (lhs_dilation, lhs_dilation),
    (rhs_dilation, rhs_dilation),
    ("NHWC", "HWIO", "NHWC"),
  )


def _conv_value(x, kernel, geometry):
  pad = (geometry.pad, geometry.pad)
  return _convolve(x, kernel, (pad, pad), stride=geometry.stride)


def _input_gradient_value(g, kernel, geometry):
  dilation = geometry.stride
  if dilation > 1 and max(g.shape[1:3]) < geometry.kernel:
    # XLA exchanges the operands where the kernel is the larger image, and on a
    # CPU that form is 9 times slower. Written-out zeros make it the smaller.
    between = (0, 0, dilation - 1)
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), between, between, (0, 0, 0)])
    dilation = 1
  low = geometry.kernel - 1 - geometry.pad
  padding = [
    (low, size + geometry.kernel - 1 - geometry.dilated(size) - low)
    for size in (geometry.height, geometry.width)
  ]
  return _convolve(
    g, kernel[::-1, ::-1].swapaxes(2, 3), padding, lhs_dilation=dilation
  )


def _kernel_gradient_value(x, g, geometry):
  padding = [
    (
      geometry.pad,
      geometry.kernel - 1 + geometry.dilated(size) - size - geometry.pad,
    )
    for size in (geometry.height, geometry.width)
  ]
  gradient = _convolve(
    x.transpose(3, 1, 2, 0),
    g.transpose(1, 2, 0, 3),
    padding,
    rhs_dilation=geometry.stride,
  )
  return gradient.transpose(1, 2, 0, 3)


def _bilinear(name, value) -> Primitive:
  """A primitive of two arrays and a geometry; its transposes are set below."""
  primitive = Primitive(name)

  def abstract_value(a, b, *, geometry):
    y = jax.eval_shape(lambda a, b: value(a, b, geometry), a, b)
    return a.update(shape=y.shape, dtype=y.dtype, weak_type=False)

  def batched(operands, axes, *, geometry):
    vmapped = jax.vmap(lambda a, b: value(a, b, geometry), axes)
    return vmapped(*operands), 0

  primitive.def_abstract_eval(abstract_value)
  primitive.def_impl(
    lambda a, b, *, geometry: jax.jit(value, static_argnums=2)(a, b, geometry)
  )
  mlir.register_lowering(
    primitive,
    mlir.lower_fun(
      lambda a, b, *, geometry: value(a, b, geometry), multiple_results=False
    ),
  )
  batching.primitive_batchers[primitive] = batched
  return primitive


_conv = _bilinear("conv2d", _conv_value)
_input_gradient = _bilinear("conv2d_input_gradient", _input_gradient_value)
_kernel_gradient = _bilinear("conv2d_kernel_gradient", _kernel_gradient_value)

# (cotangent, the operand that is not differentiated) -> gradient.
ad.defbilinear(
  _conv,
  lambda g, x, kernel, *, geometry: _input_gradient.bind(
    g, kernel, geometry=geometry
  ),
  lambda g, x, kernel, *, geometry: _kernel_gradient.bind(x, g, geometry=geometry),
)
ad.defbilinear(
  _input_gradient,
  lambda x, g, kernel, *, geometry: _conv.bind(x, kernel, geometry=geometry),
  lambda x, g, kernel, *, geometry: _kernel_gradient.bind(x, g, geometry=geometry),
)
ad.defbilinear(
  _kernel_gradient,
  lambda kernel, x, g, *, geometry: _input_gradient.bind(
    g, kernel, geometry=geometry
  ),
  lambda kernel, x, g, *, geometry: _conv.bind(x, kernel, geometry=geometry),
)
