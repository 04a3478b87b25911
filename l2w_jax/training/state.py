"""State of training and the two optimizers it belongs to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from l2w_jax.method import weighting
from l2w_jax.models import wpn
from l2w_jax.models.backbone import Backbone


class TrainState(struct.PyTreeNode):
  """Everything a step reads and writes; `state.replace(...)` sets a field.

  Attributes:
    step: loader batches done so far, an int32 scalar. No field has a shape in
      its type, because a mapped state has a device axis in front.
    params: backbone Θ.
    batch_stats: BatchNorm running statistics, never differentiated.
    opt_state: of the backbone's SGD (the momentum buffer).
    wpn_params: WPN Φ; empty for methods without one.
    wpn_opt_state: of the WPN's Adam.
  """

  step: PyTree
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  wpn_params: PyTree
  wpn_opt_state: PyTree

  @property
  def variables(self) -> dict[str, PyTree]:
    """What `Backbone.apply` takes: {"params", "batch_stats"}."""
    return {"params": self.params, "batch_stats": self.batch_stats}


class Keys(NamedTuple):
  """The random numbers of a run, one key for each use.

  init: initial parameters. data: order and augmentation. halves: [2], the weights
  of method "random", apart for half 1 and half 2; folded with the step.
  """

  init: Array
  data: Array
  halves: Array


def split_seed(seed: int) -> Keys:
  """All keys of a run; a step's own come from `jax.random.fold_in(key, step)`."""
  init, data, *halves = jax.random.split(jax.random.key(seed), 4)
  return Keys(init, data, jnp.stack(halves))


def sgd(config: ConfigDict) -> optax.GradientTransformation:
  """SGD with momentum and coupled weight decay, up to the factor -lr.

  buffer = momentum · buffer + (gradient + weight_decay · Θ), no dampening, every
  parameter decayed (biases and BatchNorm too), as PyTorch does. A zero buffer
  gives PyTorch's first step. The learning rate is the caller's, because one
  value serves both halves of a loader batch.
  """
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay),
    optax.trace(decay=config.momentum),
  )


def adam(config: ConfigDict) -> optax.GradientTransformation:
  """Adam with L2 weight decay in the gradient, up to the factor -lr."""
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay), optax.scale_by_adam()
  )


def apply_updates(params: PyTree, updates: PyTree, learning_rate) -> PyTree:
  """Params - learning_rate · updates."""
  return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)


def init_state(key: Array, backbone: Backbone, config: ConfigDict) -> TrainState:
  """State before the first step; the same backbone for every method."""
  backbone_key, _ = jax.random.split(key)
  variables = backbone.init(backbone_key)
  wpn_params, wpn_opt_state = {}, ()
  if config.method == "l2w":
    wpn_params = init_wpn(key, config, backbone.num_exits)
    wpn_opt_state = adam(config.meta).init(wpn_params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    opt_state=sgd(config.optimizer).init(variables["params"]),
    wpn_params=wpn_params,
    wpn_opt_state=wpn_opt_state,
  )


def init_wpn(key: Array, config: ConfigDict, num_exits: int) -> PyTree:
  """Φ before the first step; see `init_state`."""
  _, key = jax.random.split(key)
  return wpn.init(
    key,
    weighting.num_features(config.meta.inputs, num_exits),
    (config.meta.hidden,) * config.meta.layers,
    num_exits,
  )


def abstract_state(backbone: Backbone, config: ConfigDict) -> TrainState:
  """Shapes and dtypes of `init_state`, to restore a checkpoint into."""
  return jax.eval_shape(
    lambda key: init_state(key, backbone, config), jax.random.key(0)
  )
