"""A backbone as pure functions: init, apply, and apply stage by stage.

A multi-exit network is a Flax module with an attribute `num_exits` and one
method

    stage(k, carry, mode) -> (carry, logits [B C] of exit k)

where the carry of stage 0 is the images. Its exit classifiers are submodules whose
names start with classifier. Training, cost per exit and real early exits all run
the same stages. Variables are {"params": …, "batch_stats": …}, the second empty
without BatchNorm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from l2w_jax.models import cost, initializers
from l2w_jax.models.layers import EVALUATE, Mode

Variables = dict[str, PyTree]


def _all_stages(
  module: Any, images: Array, mode: Mode, remat: bool = False
) -> Array:
  stage = type(module).stage
  if remat:
    stage = nn.remat(stage, static_argnums=(1, 3))
  carry, logits = images, []
  for k in range(module.num_exits):
    carry, logits_k = stage(module, k, carry, mode)
    logits.append(logits_k)
  return jnp.stack(logits, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
  """Pure functions of one multi-exit network.

  Attributes:
    module: the network, a Flax module with `num_exits` and `stage`.
    num_classes: C.
    image_shape: (H, W, channels) of the images it was checked and counted for.
    dtype: of images and convolution kernels, "bfloat16" or "float32", which leaves
      them as they are. Parameters, BatchNorm's arithmetic and statistics, the
      classifiers' means and logits are float32 in both.
    precision: of products and convolutions of float32: "default", "high" or
      "highest" of `jax.default_matmul_precision`. CPUs have one precision; on a TPU
      the default rounds operands to bfloat16, on a GPU to TF32.
    remat: whether a derivative keeps only what passes from stage to stage, and
      computes the inside of each anew. Less memory, more operations.
  """

  module: Any
  num_classes: int
  image_shape: tuple[int, int, int]
  remat: bool = False
  dtype: str = "float32"
  precision: str = "default"

  @property
  def num_exits(self) -> int:
    """K."""
    return self.module.num_exits

  @functools.cached_property
  def _cost(self) -> tuple[np.ndarray, np.ndarray]:
    return cost.count(self.module, self.image_shape)

  @property
  def macs(self) -> np.ndarray:
    """[K] multiply-accumulates per image up to each exit, with earlier ones."""
    return self._cost[0]

  @property
  def params_to_exit(self) -> np.ndarray:
    """[K] parameters that exit k and those before it use."""
    return self._cost[1]

  @functools.cached_property
  def _declared(self) -> PyTree:
    """Shapes and laws of the variables; tracing a large network takes seconds."""
    declare = functools.partial(
      self.module.init, jax.random.key(0), mode=EVALUATE, method=_all_stages
    )
    return jax.eval_shape(declare, jnp.zeros((1, *self.image_shape)))

  @property
  def exit_modules(self) -> tuple[str, ...]:
    """Names of the submodules that are exit classifiers.

    Raises:
      ValueError: the module has no submodule named classifier….
    """
    names = tuple(self._declared["params"])
    found = tuple(name for name in names if name.startswith("classifier"))
    if not found:
      raise ValueError(
        f"{type(self.module).__name__} has no submodule whose name starts with "
        f"classifier, only {', '.join(names)}; name its exit classifiers so, or "
        "set config.meta.look_ahead=network and leave 'classifiers' out of "
        "config.diagnose.estimators"
      )
    return found

  def init(self, key: Array) -> Variables:
    """Fresh variables: parameters from `key`, running mean 0 and variance 1."""
    return {"batch_stats": {}, **initializers.draw(key, self._declared)}

  def apply(
    self,
    variables: Variables,
    images: Float[Array, "B H W channels"],
    train: bool = False,
    axis_name: str | None = None,
  ) -> Float[Array, "B K C"] | tuple[Float[Array, "B K C"], PyTree]:
    """Logits at every exit.

    Args:
      variables: params and batch_stats.
      images: ready for the network (normalised).
      train: normalise with the statistics of this batch. False uses the
        running ones.
      axis_name: pmap axis whose devices share their batch statistics.

    Returns:
      logits, and in training also the running statistics after this batch.
    """
    run = functools.partial(
      self.module.apply,
      *self._cast(variables, images),
      Mode(train, axis_name),
      self.remat,
      method=_all_stages,
    )
    with self._precise():
      if not train:
        return run()
      logits, updated = run(mutable=["batch_stats"])
    return logits, updated.get("batch_stats", {})

  def stage(
    self, variables: Variables, k: int, carry: PyTree
  ) -> tuple[PyTree, Float[Array, "B C"]]:
    """(carry, logits of exit k) from the carry of stage k - 1.

    The carry of stage 0 is the images. Normalises with running statistics.
    """
    # Later carries are activations, and have the dtype they need.
    variables, carry = self._cast(variables, carry)
    with self._precise():
      return self.module.apply(variables, k, carry, method=self.module.stage)

  def _precise(self):
    """A context in which products are traced with the wanted precision."""
    if self.precision == "default":
      return contextlib.nullcontext()
    return jax.default_matmul_precision(self.precision)

  def _cast(self, variables: Variables, images: PyTree):
    """Variables and images in the dtypes that the layers compute with."""
    if self.dtype == "float32":
      return variables, images
    params = jax.tree.map(
      lambda x: x.astype(self.dtype) if x.ndim == 4 else x, variables["params"]
    )
    return variables | {"params": params}, jax.tree.map(
      lambda x: x.astype(self.dtype), images
    )
