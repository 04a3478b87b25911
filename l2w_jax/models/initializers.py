"""Initial parameters: declared by the layers, drawn all at once.

A layer declares the law of each of its variables, and `draw` turns the
declarations of a whole network into arrays from one stream of random numbers.
With one generator per variable, XLA takes minutes to compile the initialisation
of a RANet.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, PyTree


class Declared(struct.PyTreeNode, nn.meta.AxisMetadata):
  """A variable to be drawn; Flax's `init` keeps it in place of the array.

  Attributes:
    value: zeros of the variable's shape.
    law: "uniform" in ±scale, "normal" with standard deviation scale, or
      "constant", scale itself.
    scale: see law.
  """

  value: Any
  law: str = struct.field(pytree_node=False)
  scale: float = struct.field(pytree_node=False)

  def unbox(self) -> Array:
    """The value."""
    return self.value

  def replace_boxed(self, val: Array) -> Declared:
    """The same law with another value."""
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
    """Unchanged; no law depends on an axis."""
    return self

  def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
    """Unchanged; no law depends on an axis."""
    return self


def constant(scale: float):
  """Declares a variable that starts at `scale`; arguments end in its shape."""
  return lambda *args: Declared(jnp.zeros(args[-1]), "constant", scale)


def fan_in_uniform(fan_in: int):
  """Declares PyTorch's default, uniform in ±1/√fan_in."""
  return lambda _, shape: Declared(jnp.zeros(shape), "uniform", fan_in**-0.5)


def kernel(initializer: str):
  """Declares a kernel [… C_in C_out].

  "pytorch": uniform in ±1/√fan_in, which is what the published MSDNet numbers
  were trained from. "he": normal with variance 2 / (k²·C_out).
  """

  def declare(key, shape):
    if initializer == "pytorch":
      return fan_in_uniform(math.prod(shape[:-1]))(key, shape)
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return Declared(jnp.zeros(shape), "normal", math.sqrt(2 / fan_out))

  return declare


def draw(key: Array, declared: PyTree) -> PyTree:
  """Arrays of JAX's default float for a tree of (abstract) declarations.

  Raises:
    ValueError: a variable of another kind, as Flax's own layers have.
  """
  named, tree = jax.tree.flatten_with_path(
    declared, is_leaf=lambda leaf: isinstance(leaf, Declared)
  )
  for path, leaf in named:
    if not isinstance(leaf, Declared):
      raise ValueError(
        f"variable {jax.tree_util.keystr(path, simple=True, separator='/')} does "
        "not say how it starts; use a layer of l2w_jax.models.layers, or declare "
        "it by l2w_jax.models.initializers"
      )
  leaves = [leaf for _, leaf in named]
  streams = {}
  for i, (law, sample) in enumerate(
    (
      ("uniform", functools.partial(jax.random.uniform, minval=-1.0)),
      ("normal", jax.random.normal),
    )
  ):
    total = sum(leaf.value.size for leaf in leaves if leaf.law == law)
    stream = sample(jax.random.fold_in(key, i), (total,))
    # On the host, because every slice would be a kernel to compile.
    streams[law] = (
      stream if isinstance(stream, jax.core.Tracer) else np.asarray(stream)
    )
  arrays, used = [], dict.fromkeys(streams, 0)
  for leaf in leaves:
    shape, dtype = leaf.value.shape, jnp.result_type(float)
    if leaf.law == "constant":
      arrays.append(np.full(shape, leaf.scale, dtype))
    else:
      start = used[leaf.law]
      used[leaf.law] += leaf.value.size
      unit = streams[leaf.law][start : used[leaf.law]].reshape(shape)
      arrays.append((leaf.scale * unit).astype(dtype))
  return jax.tree.unflatten(tree, map(jnp.asarray, arrays))
