"""One half step: where networks, method, optimizers and devices meet.

A loader batch of 2B images is two half steps: half 1 trains and half 2 is the
meta half, then the roles swap. Each half step is Eqs. 7, 8, 9 of `meta` for the
method "l2w", and one plain SGD step on the weighted sum of exit losses for
"uniform" and the other baselines, which change its weights, its losses or its
gradient. It is one compiled function, called twice for a batch; whether it updates
the WPN is static.

Over D devices every mean is global: BatchNorm statistics, centring over batch or
all, the ranking and allocation of meta samples, the pseudo update and all
gradients are those of the whole half, so D devices give what one gives. With
`sync="local"` each device does all of that by itself, as the released code does on
each GPU; the mean over devices is then taken of the gradients of Eqs. 8 and 9 and
of what is left of the forward pass at Θ, its running statistics and losses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax import named
from l2w_jax.method import allocation, baselines, estimators, meta, weighting
from l2w_jax.method import losses as losses_lib
from l2w_jax.models import equilibrium, wpn
from l2w_jax.models.backbone import Backbone
from l2w_jax.run.parallel import ONE_DEVICE, Collectives
from l2w_jax.training import microbatches
from l2w_jax.training.state import TrainState, adam, apply_updates, sgd, split_seed

Batch = dict[str, jax.Array]
Metrics = dict[str, PyTree]


def make_train_step(
  backbone: Backbone, config: ConfigDict, *, steps_per_epoch: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """A step on one device: (state, batch) -> (state, metrics), two half steps.

  Args:
    backbone: the network.
    config: of the run.
    steps_per_epoch: loader batches in an epoch; schedules and `meta.interval`
      count in them.

  Returns:
    step(state, batch). A batch has "image" [2B H W channels], ready for the
    network, and "label" [2B]; an odd one splits into ceil and rest, and its
    per-sample metrics are pairs instead of stacked arrays. Metrics, one entry per
    half, are train_loss [2] in nats, weights [2 B K], losses [2 B K], and where
    the WPN is updated meta_loss [2] in nats, allocated [2 B K] (bool) and
    wpn_gradient (∇_Φ L_meta, before weight decay).

  Raises:
    ValueError: a config that cannot be trained.
  """
  half_step = jax.jit(
    make_half_step(backbone, config, steps_per_epoch=steps_per_epoch),
    static_argnames="update_wpn",
  )
  keys = jax.random.key_data(split_seed(config.seed).halves)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    # A static choice; with an interval of 1 nothing has to be waited for.
    update_wpn = config.meta.interval == 1 or updates_wpn(
      config, steps_per_epoch, int(state.step)
    )
    middle = (batch["label"].shape[0] + 1) // 2
    first = jax.tree.map(lambda x: x[:middle], batch)
    second = jax.tree.map(lambda x: x[middle:], batch)
    state, of_first = half_step(
      state, first, second, keys[0], update_wpn=update_wpn
    )
    state, of_second = half_step(
      state, second, first, keys[1], update_wpn=update_wpn
    )
    metrics = jax.tree.map(
      lambda a, b: jnp.stack([a, b]) if a.shape == b.shape else (a, b),
      of_first,
      of_second,
    )
    return state.replace(step=state.step + 1), metrics

  return step


def updates_wpn(config: ConfigDict, steps_per_epoch: int, step: int) -> bool:
  """Whether a step updates the WPN; counted in an epoch, as released."""
  return (
    config.method == "l2w" and step % steps_per_epoch % config.meta.interval == 0
  )


def learning_rates(
  config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.Schedule]:
  """Step -> α of the backbone, and step -> β of the WPN: cosine to 0."""
  total = config.epochs * steps_per_epoch
  return (
    optax.cosine_decay_schedule(config.optimizer.learning_rate, total),
    optax.cosine_decay_schedule(config.meta.learning_rate, total),
  )


def make_half_step(
  backbone: Backbone,
  config: ConfigDict,
  *,
  steps_per_epoch: int,
  devices: Collectives = ONE_DEVICE,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """What one device does in a half step; to be jitted, or mapped with `devices`.

  Returns:
    half_step(state, train_half, meta_half, key, update_wpn) -> (state, metrics), as
    in `make_train_step`. key is the `key_data` of this half's entry of
    `Keys.halves`. Learning rates are those of `state.step`, which counts loader
    batches and so is left as it is.

  Raises:
    ValueError: a config that cannot be trained.
  """
  config_lib.check_method(config, backbone.num_exits)
  optimizer = sgd(config.optimizer)
  learning_rate, wpn_learning_rate = learning_rates(config, steps_per_epoch)
  meta_gradient = _meta_gradient(backbone, config, devices)
  factors = (
    equilibrium.factors(backbone) if config.method == "equilibrium" else None
  )

  def half_step(
    state: TrainState,
    train_half: Batch,
    meta_half: Batch,
    key: Array,
    update_wpn: bool = True,
  ) -> tuple[TrainState, Metrics]:
    rate = learning_rate(state.step)
    forward = forward_pass(
      backbone, devices, state.batch_stats, train_losses_fn(config)
    )
    losses_fn = microbatches.losses_fn(forward, train_half, config.microbatches)
    # The one forward pass at Θ; `pull` serves Eqs. 7 and 9.
    losses, pull, (batch_stats, confidence) = jax.vjp(
      losses_fn, state.params, has_aux=True
    )
    metrics = {}
    if config.method == "l2w":
      features = weighting.features(losses, confidence, config.meta.inputs)

      def weights_fn(wpn_params):
        return weights_of(config, devices, wpn_params, features)

      if update_wpn:
        gradient, metrics = meta_gradient(
          state, train_half, meta_half, forward, losses_fn, pull, weights_fn, rate
        )
        state = wpn_step(config, state, gradient, wpn_learning_rate(state.step))
      weights = weights_fn(state.wpn_params)
    else:
      labels = train_half["label"]
      weights = given_weights(config, devices, losses, labels, key, state.step)
    gradient = devices.mean_of_all(meta.backbone_gradient(pull, weights))
    if factors is not None:
      gradient = jax.tree.map(jnp.multiply, gradient, factors)
    batch_stats = devices.across(batch_stats)
    state = real_step(optimizer, state, gradient, batch_stats, rate)
    train_loss = devices.mean_of_all((weights * losses).mean(axis=0).sum())
    return state, metrics | {
      "train_loss": train_loss,
      "weights": weights,
      "losses": losses,
    }

  return half_step


def _meta_gradient(backbone, config, devices):
  """Eqs. 7 and 8 on a pair of halves: -> (∇_Φ L_meta, metrics)."""
  optimizer = sgd(config.optimizer)
  meta_objective = _meta_objective(backbone, config, devices)
  name, num_parts = config_lib.estimator(config.meta.estimator)
  # Two exact roads; the second forgets what the first would keep meanwhile.
  name = "jvp" if name == "grad" and config.model.remat else name

  # Of Θ, what Eq. 7 moves; the rest of Θ̂ is that of Θ.
  exits_alone = config.method == "l2w" and config.meta.look_ahead == "classifiers"
  exit_modules = backbone.exit_modules if exits_alone else ()

  def moves(params):
    return {name: params[name] for name in exit_modules} if exits_alone else params

  def meta_gradient(
    state, train_half, meta_half, forward, losses_fn, pull, weights_fn, rate
  ):
    def whole(moved):
      return {**state.params, **moved}

    def pull_moved(weights):
      return (moves(pull(weights)[0]),)

    def sgd_step(gradient):
      # One program for all of Θ; XLA leaves out what `moves` does not take.
      zeros = jax.tree.map(jnp.zeros_like, state.params)
      gradient = {**zeros, **devices.mean(gradient)}
      return moves(inner_sgd_step(optimizer, state, gradient, rate))

    def look_ahead(wpn_params):
      if name == "grad":
        return meta.pseudo_update(pull_moved, weights_fn(wpn_params), sgd_step)
      parts = microbatches.cut(train_half, num_parts)
      return meta.unrolled_update(
        inner_step(config, devices, optimizer, forward, wpn_params, rate),
        (state.params, state.opt_state),
        [jax.tree.map(lambda x, t=t: x[t], parts) for t in range(num_parts)],
      )

    def slopes_fn(direction):
      losses_of = (
        lambda moved: losses_fn(whole(moved))[0],
        moves(state.params),
        direction,
      )
      if name == "first_order":
        return estimators.first_order(*losses_of, devices.mean)
      return estimators.SLOPES[name](*losses_of)

    def meta_loss_fn(moved):
      return meta_objective(state.batch_stats, meta_half, whole(moved))

    if name in estimators.SLOPES:
      (meta_loss, allocated), gradient = estimators.wpn_gradient(
        state.wpn_params, pull_moved, weights_fn, sgd_step, meta_loss_fn, slopes_fn
      )
    else:
      (meta_loss, allocated), gradient = meta.wpn_gradient(
        state.wpn_params, look_ahead, meta_loss_fn
      )
    meta_loss, gradient = devices.mean_of_all((meta_loss, gradient))
    return gradient, {
      "meta_loss": meta_loss,
      "allocated": allocated,
      "wpn_gradient": gradient,
    }

  return meta_gradient


def _meta_objective(backbone, config, devices):
  """(running statistics, meta half, Θ̂) -> (L_meta, which exit scores which)."""
  proportions = allocation.proportions(config.meta.q, backbone.num_exits)
  allocate = allocation.OBJECTIVES[config.meta.objective]

  def meta_objective(batch_stats, meta_half, pseudo_params):
    forward = forward_pass(backbone, devices, batch_stats, losses_lib.cross_entropy)
    losses_fn = microbatches.losses_fn(forward, meta_half, config.microbatches)
    losses, (_, confidence) = losses_fn(pseudo_params)
    everyone = devices.gather(jax.lax.stop_gradient(confidence))
    allocated = allocate(everyone, proportions)
    own = devices.own(allocated)
    # So that the mean over devices is the global meta loss.
    share = allocation.meta_loss(losses, own, allocated.sum(axis=0))
    return devices.num_devices * share, own

  return meta_objective


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


def inner_step(config, devices, optimizer, forward, wpn_params, learning_rate):
  """((Θ, opt_state), part) -> the same after a step of an unrolled look-ahead."""

  def step(before, part):
    params, opt_state = before
    losses, pull, (_, confidence) = jax.vjp(
      functools.partial(forward, half=part), params, has_aux=True
    )
    # Attached: after the first step Θ, and so the losses, depend on Φ.
    features = weighting.attached_features(losses, confidence, config.meta.inputs)
    weights = weights_of(config, devices, wpn_params, features)
    gradient = devices.mean(meta.backbone_gradient(pull, weights))
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return apply_updates(params, updates, learning_rate), opt_state

  return step


def wpn_step(
  config: ConfigDict, state: TrainState, gradient: PyTree, learning_rate: ArrayLike
) -> TrainState:
  """Φ⁺ of Eq. 8, by Adam."""
  updates, opt_state = adam(config.meta).update(
    gradient, state.wpn_opt_state, state.wpn_params
  )
  return state.replace(
    wpn_params=apply_updates(state.wpn_params, updates, learning_rate),
    wpn_opt_state=opt_state,
  )


def real_step(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  gradient: PyTree,
  batch_stats: PyTree,
  learning_rate: ArrayLike,
) -> TrainState:
  """Θ⁺ of Eq. 9, by SGD, and the running statistics of the pass at Θ."""
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
      baselines.self_distillation,
      label_smoothing=config.label_smoothing,
      share=config.baseline.distill,
      temperature=config.baseline.temperature,
    )
  return functools.partial(
    losses_lib.cross_entropy, label_smoothing=config.label_smoothing
  )


def weights_of(
  config: ConfigDict, devices: Collectives, wpn_params: PyTree, features: jax.Array
) -> jax.Array:
  """Sample weights [B K] that the WPN Φ gives to features [B F]."""
  return _centred(config, devices, wpn.apply(wpn_params, features))


def _centred(config, devices, output):
  return weighting.sample_weights(
    output, config.meta.epsilon, config.meta.center_over, devices.mean
  )


def given_weights(
  config: ConfigDict,
  devices: Collectives,
  losses: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  step: jax.Array,
) -> jax.Array:
  """Weights [B K] of the methods that learn none.

  key is key data, and with the step draws the weights of method "random": for the
  samples of all devices at once, of which each takes its own.
  """
  if config.method == "fixed":
    return baselines.fixed(losses, config.baseline.exit_weights)
  if config.method == "random":
    key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    shape = (devices.in_run * losses.shape[0], losses.shape[1])
    output = baselines.random_output(key, shape, losses.dtype)
    return _centred(config, devices, devices.share(output))
  if config.method == "easy_early":
    output = baselines.easy_early_output(devices.gather(losses))
    return _centred(config, devices, devices.own(output))
  if named.is_own(config.method):
    rule = named.own(config.method)
    asked = "labels" in inspect.signature(rule).parameters
    weights = rule(losses, devices.mean, **({"labels": labels} if asked else {}))
    if jnp.shape(weights) != losses.shape:
      raise ValueError(
        f"config.method={config.method!r} must give weights of the shape of the "
        f"losses, {losses.shape}; got {jnp.shape(weights)}"
      )
    return weights
  return jnp.ones_like(losses)
