"""One step on one loader batch: where network, meta, optimizers and devices meet.

A loader batch of 2B images is two half steps: half 1 trains and half 2 is the
meta half, then the roles swap. Each half step is Eqs. 7, 8, 9 of `meta` for the
method "l2w", and one plain SGD step on the sum of exit losses for "uniform" and
the other baselines, which change its weights, its losses or its gradient.

Over D devices every mean is global: BatchNorm statistics, centring over batch or
all, the ranking and allocation of meta samples, the pseudo update and all
gradients are those of the whole half, so D devices give what one gives. With
`sync="local"` each device does all of that by itself, as the released code does on
each GPU; the mean over devices is then taken of the gradients of Eqs. 8 and 9 and
of what is left of the forward pass at Θ, its running statistics and losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.method import allocation, meta, weighting
from l2w_jax.method import losses as losses_lib
from l2w_jax.models import equilibrium, wpn
from l2w_jax.models.backbone import Backbone
from l2w_jax.run.parallel import ONE_DEVICE, Collectives
from l2w_jax.training import microbatches
from l2w_jax.training.state import TrainState, adam, apply_updates, sgd

Batch = dict[str, jax.Array]
Metrics = dict[str, PyTree]


def make_train_step(
  backbone: Backbone, config: ConfigDict, *, steps_per_epoch: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Jitted step on one device: (state, batch) -> (state, metrics).

  Args:
    backbone: the network.
    config: a validated config.
    steps_per_epoch: loader batches in an epoch; schedules and `meta.interval`
      count in them.

  Returns:
    step(state, batch). batch is {"image": [2B H W channels], "label": [2B]},
    images ready for the network; an odd batch splits into ceil and rest, and
    its per-sample metrics are pairs instead of stacked arrays. Metrics, one
    entry per half: train_loss [2] and meta_loss [2] in nats, weights
    [2 B K], losses [2 B K], and for l2w allocated [2 B K] (bool) and
    wpn_gradient (∇_Φ L_meta, before weight decay), NaN or False where
    `meta.interval` left the WPN update out.
  """
  return jax.jit(step_body(backbone, config, steps_per_epoch=steps_per_epoch))


def step_body(
  backbone: Backbone,
  config: ConfigDict,
  *,
  steps_per_epoch: int,
  devices: Collectives = ONE_DEVICE,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """What one device does in a step; to be jitted, or mapped with `devices`."""
  half_step = half_step_body(
    backbone, config, steps_per_epoch=steps_per_epoch, devices=devices
  )

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    size = batch["label"].shape[0]
    if size % 2 == 0:
      halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)

      def one(state, h):
        return half_step(
          state,
          jax.tree.map(lambda x: x[h], halves),
          jax.tree.map(lambda x: x[1 - h], halves),
        )

      state, metrics = jax.lax.scan(one, state, jnp.arange(2))
    else:
      first = jax.tree.map(lambda x: x[: (size + 1) // 2], batch)
      second = jax.tree.map(lambda x: x[(size + 1) // 2 :], batch)
      state, metrics_1 = half_step(state, first, second)
      state, metrics_2 = half_step(state, second, first)
      metrics = jax.tree.map(_stack_or_pair, metrics_1, metrics_2)
    return state.replace(step=state.step + 1), metrics

  return step


def half_step_body(
  backbone: Backbone,
  config: ConfigDict,
  *,
  steps_per_epoch: int,
  devices: Collectives = ONE_DEVICE,
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]:
  """(state, train half, meta half) -> (state, metrics of the half).

  Learning rates are those of `state.step`, which counts loader batches and so
  is left as it is.
  """
  make = _l2w_half_step if config.method == "l2w" else _plain_half_step
  half_step = make(backbone, config, devices)
  learning_rate, wpn_learning_rate = learning_rates(config, steps_per_epoch)

  def run(state: TrainState, train_half: Batch, meta_half: Batch):
    update_wpn = state.step % steps_per_epoch % config.meta.interval == 0
    return half_step(
      state,
      train_half,
      meta_half,
      learning_rate(state.step),
      wpn_learning_rate(state.step),
      update_wpn,
    )

  return run


def learning_rates(
  config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.Schedule]:
  """Step -> α of the backbone, and step -> β of the WPN: cosine to 0."""
  total = config.epochs * steps_per_epoch
  return (
    optax.cosine_decay_schedule(config.optimizer.learning_rate, total),
    optax.cosine_decay_schedule(config.meta.learning_rate, total),
  )


def _stack_or_pair(a, b):
  return jnp.stack([a, b]) if a.shape == b.shape else (a, b)


@functools.partial(jax.jit, static_argnums=0)
def inner_sgd_step(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  gradient: PyTree,
  learning_rate: jax.Array,
) -> PyTree:
  """Θ̂ of Eq. 7: parameters after one step of the real optimizer.

  The momentum buffer it would leave behind is dropped.
  """
  updates, _ = optimizer.update(gradient, state.opt_state, state.params)
  return apply_updates(state.params, updates, learning_rate)


def after(tree: PyTree, known: PyTree) -> PyTree:
  """The same numbers, but none of them before all of `known` is computed.

  What `model.remat` computes anew from them is then computed late, and not merged
  with the first time and kept. XLA drops optimization barriers before it merges
  equal operations and puts them in order; an index that it cannot foresee it has to
  keep. It fuses a sum into every use, all terms with it.
  """
  nothing = 0.0 * jnp.argmin(
    jnp.stack([x.ravel()[0] for x in jax.tree.leaves(known)])
  )
  return jax.tree.map(
    lambda x: (
      x + nothing.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    ),
    tree,
  )


def _real_step(optimizer, state, gradient, batch_stats, learning_rate):
  """SGD on the backbone; keeps this forward pass's running statistics."""
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  return state.replace(
    params=apply_updates(state.params, updates, learning_rate),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )


def forward_pass(
  backbone: Backbone,
  devices: Collectives,
  batch_stats: PyTree,
  losses_of: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[PyTree, Batch], tuple[jax.Array, tuple[PyTree, jax.Array]]]:
  """(Θ, half) -> (losses [B K], (running statistics, confidence [B K]))."""

  def forward(params, half):
    logits, new_stats = backbone.apply(
      {"params": params, "batch_stats": batch_stats},
      half["image"],
      train=True,
      axis_name=devices.axis_name,
    )
    losses = losses_of(logits, half["label"])
    return losses, (new_stats, losses_lib.confidence(logits))

  return forward


def train_losses_fn(
  config: ConfigDict,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(logits [B K C], labels [B]) -> losses [B K] that training minimises."""
  if config.method == "distill":
    return functools.partial(
      losses_lib.self_distillation,
      label_smoothing=config.label_smoothing,
      share=config.baseline.distill,
      temperature=config.baseline.temperature,
    )
  return functools.partial(
    losses_lib.cross_entropy, label_smoothing=config.label_smoothing
  )


def wpn_weights_fn(
  config: ConfigDict, devices: Collectives
) -> Callable[[PyTree, jax.Array], jax.Array]:
  """(Φ, features [B F]) -> sample weights [B K]."""

  def weights_of(wpn_params, features):
    return weighting.sample_weights(
      wpn.apply(wpn_params, features),
      config.meta.epsilon,
      config.meta.center_over,
      devices.mean,
    )

  return weights_of


def _train_loss(weights, losses, devices):
  return devices.mean_of_all((weights * losses).mean(axis=0).sum())


def _given_weights(config, devices):
  """(losses [B K], step) -> weights [B K] of the methods that learn none."""

  def centred(output):
    return weighting.sample_weights(
      devices.own(output),
      config.meta.epsilon,
      config.meta.center_over,
      devices.mean,
    )

  def random(losses, step):
    # Both halves of a loader batch get the same draw, for other images.
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return centred(
      weighting.random_output(jax.random.fold_in(key, 0), devices.gather(losses))
    )

  return {
    "fixed": lambda losses, step: weighting.fixed(
      losses, config.baseline.exit_weights
    ),
    "random": random,
    "easy_early": lambda losses, step: centred(
      weighting.easy_early_output(devices.gather(losses))
    ),
  }.get(config.method, lambda losses, step: jnp.ones_like(losses))


def _plain_half_step(backbone, config, devices):
  """Plain SGD on Σ_k mean_i w[i,k] ℓ[i,k], at the cost of a forward and backward.

  The weights are 1, but for the methods that have weights of their own.
  """
  optimizer = sgd(config.optimizer)
  weights_fn = _given_weights(config, devices)
  factors = (
    equilibrium.factors(backbone.module, backbone.image_shape)
    if config.method == "equilibrium"
    else None
  )

  def half_step(
    state,
    train_half,
    unused_half,
    learning_rate,
    unused_wpn_rate,
    unused_update_wpn,
  ):
    forward = forward_pass(
      backbone, devices, state.batch_stats, train_losses_fn(config)
    )
    losses, pull, (batch_stats, _) = jax.vjp(
      microbatches.in_reverse(forward, train_half, config.microbatches),
      state.params,
      has_aux=True,
    )
    weights = weights_fn(losses, state.step)
    gradient = devices.mean_of_all(meta.backbone_gradient(pull, weights))
    if factors is not None:
      gradient = jax.tree.map(jnp.multiply, gradient, factors)
    state = _real_step(
      optimizer, state, gradient, devices.across(batch_stats), learning_rate
    )
    return state, {
      "train_loss": _train_loss(weights, losses, devices),
      "weights": weights,
      "losses": losses,
    }

  return half_step


def _l2w_half_step(backbone, config, devices):
  """Eqs. 7, 8 and 9 on one pair of halves."""
  optimizer, wpn_optimizer = sgd(config.optimizer), adam(config.meta)
  proportions = allocation.proportions(config.meta.q, backbone.num_exits)
  allocate = allocation.OBJECTIVES[config.meta.objective]
  name, num_parts = config_lib.estimator(config.meta.estimator)
  # Two exact roads; the second forgets what the first would keep meanwhile.
  name = "jvp" if name == "grad" and config.model.remat else name
  wpn_gradient = meta.ESTIMATORS[name]
  weights_of = wpn_weights_fn(config, devices)
  again = after if config.model.remat else lambda tree, unused_known: tree

  def half_step(
    state, train_half, meta_half, learning_rate, wpn_learning_rate, update_wpn
  ):
    forward = forward_pass(
      backbone, devices, state.batch_stats, train_losses_fn(config)
    )
    # The one forward pass at Θ; `pull` serves Eqs. 7 and 9.
    losses, pull, (batch_stats, confidence) = jax.vjp(
      microbatches.in_reverse(forward, train_half, config.microbatches),
      state.params,
      has_aux=True,
    )
    features = weighting.features(losses, confidence, config.meta.inputs)
    train_losses = microbatches.forwards(forward, train_half, config.microbatches)

    def sgd_step(gradient):
      return inner_sgd_step(optimizer, state, gradient, learning_rate)

    def inner_step(phi, before, part):
      params, opt_state = before
      losses, pull, (_, confidence) = jax.vjp(
        functools.partial(forward, half=part), params, has_aux=True
      )
      weights = weights_of(
        phi, weighting.attached_features(losses, confidence, config.meta.inputs)
      )
      gradient = devices.mean(meta.backbone_gradient(pull, weights))
      updates, opt_state = optimizer.update(gradient, opt_state, params)
      return apply_updates(params, updates, learning_rate), opt_state

    def meta_loss_fn(pseudo_params):
      meta_losses, (_, confidence) = microbatches.in_reverse(
        forward_pass(
          backbone, devices, state.batch_stats, losses_lib.cross_entropy
        ),
        meta_half,
        config.microbatches,
      )(pseudo_params)
      everyone = devices.gather(jax.lax.stop_gradient(confidence))
      allocated = allocate(everyone, proportions)
      meta_loss = devices.num_devices * allocation.meta_loss(
        meta_losses, devices.own(allocated), allocated.sum(axis=0)
      )
      return meta_loss, devices.own(allocated)

    def updated_wpn():
      (meta_loss, allocated), gradient = wpn_gradient(
        state.wpn_params,
        meta.LookAhead(
          state.params,
          lambda params: train_losses(params)[0],
          pull,
          lambda phi: weights_of(phi, features),
          sgd_step,
          meta_loss_fn,
          devices.mean,
          again,
          state.opt_state,
          microbatches.cut(train_half, num_parts),
          inner_step,
        ),
      )
      meta_loss, gradient = devices.across((meta_loss, gradient))
      updates, wpn_opt_state = wpn_optimizer.update(
        gradient, state.wpn_opt_state, state.wpn_params
      )
      wpn_params = apply_updates(state.wpn_params, updates, wpn_learning_rate)
      return (
        wpn_params,
        wpn_opt_state,
        {"meta_loss": meta_loss, "allocated": allocated, "wpn_gradient": gradient},
      )

    def kept_wpn():
      shape = (meta_half["label"].shape[0], backbone.num_exits)
      return (
        state.wpn_params,
        state.wpn_opt_state,
        {
          "meta_loss": jnp.full((), jnp.nan, losses.dtype),
          "allocated": jnp.zeros(shape, bool),
          "wpn_gradient": jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan), state.wpn_params
          ),
        },
      )

    wpn_params, wpn_opt_state, metrics = (
      updated_wpn()
      if config.meta.interval == 1
      else jax.lax.cond(update_wpn, updated_wpn, kept_wpn)
    )

    pull = again(pull, wpn_params)
    weights = weights_of(wpn_params, features)
    gradient = devices.mean_of_all(meta.backbone_gradient(pull, weights))
    state = _real_step(
      optimizer, state, gradient, devices.across(batch_stats), learning_rate
    )
    state = state.replace(wpn_params=wpn_params, wpn_opt_state=wpn_opt_state)
    return state, metrics | {
      "train_loss": _train_loss(weights, losses, devices),
      "weights": weights,
      "losses": losses,
    }

  return half_step
