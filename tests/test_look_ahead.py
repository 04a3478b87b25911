"""`meta.look_ahead=classifiers`: an exact gradient of a shorter look-ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_compiled_step
import test_parallel
from conftest import ROOT, TINY
from flax import linen as nn
from jax import enable_x64

import l2w_jax
from l2w_jax.method import allocation, losses, weighting
from l2w_jax.models import wpn
from l2w_jax.models.backbone import Backbone
from l2w_jax.training import diagnostics, loop
from l2w_jax.training import step as step_lib
from l2w_jax.training.state import apply_updates, sgd

BATCH, PER_EPOCH = 16, 4


def of_classifiers(params, moved, rest):
  return {k: (moved if "classifier" in k else rest)[k] for k in params}


def textbook(config, backbone, state, train_half, meta_half):
  """∇_Φ L_meta by `jax.grad` of the definition, a gradient in a gradient."""

  def forward(params, half):
    logits, _ = backbone.apply(
      {"params": params, "batch_stats": state.batch_stats}, half["image"], True
    )
    return losses.cross_entropy(logits, half["label"]), losses.confidence(logits)

  def l_meta(wpn_params):
    def l_train(params):
      of_exits, confidence = forward(params, train_half)
      features = weighting.features(of_exits, confidence, config.meta.inputs)
      weights = weighting.sample_weights(
        wpn.apply(wpn_params, jax.lax.stop_gradient(features)),
        config.meta.epsilon,
        config.meta.center_over,
      )
      return (weights * of_exits).mean(0).sum()

    updates, _ = sgd(config.optimizer).update(
      jax.grad(l_train)(state.params), state.opt_state, state.params
    )
    moved = apply_updates(state.params, updates, config.optimizer.learning_rate)
    pseudo = of_classifiers(state.params, moved, state.params)
    of_exits, confidence = forward(pseudo, meta_half)
    shares = allocation.proportions(config.meta.q, backbone.num_exits)
    chosen = allocation.OBJECTIVES["allocated"](confidence, shares)
    return allocation.meta_loss(of_exits, chosen, chosen.sum(0))

  return jax.jit(jax.grad(l_meta))(state.wpn_params)


def ask(config, backbone, state, halves):
  half_step = jax.jit(
    step_lib.make_half_step(backbone, config, steps_per_epoch=PER_EPOCH)
  )
  return half_step(state, *halves, jnp.zeros(2, jnp.uint32))[1]["wpn_gradient"]


def halves_of(seed):
  rng = np.random.default_rng(seed)
  return [
    {
      "image": jnp.asarray(rng.normal(size=(BATCH // 2, 8, 8, 1))),
      "label": jnp.asarray(rng.integers(0, 10, BATCH // 2)),
    }
    for _ in range(2)
  ]


def moving(state):
  """The state with a momentum buffer that is not 0."""
  decay, trace = state.opt_state
  buffer = jax.tree.map(lambda x: 0.1 * jnp.cos(7 * x), state.params)
  return state.replace(opt_state=(decay, trace._replace(trace=buffer)))


@pytest.mark.parametrize(
  "network, center_over",
  [("msdnet", "exits"), pytest.param("ranet", "all", marks=pytest.mark.slow)],
)
def test_it_is_the_gradient_of_its_definition(network, center_over):
  config = test_parallel.make_config(center_over)
  backbone = test_parallel.NETWORKS[network]()
  with enable_x64(True):
    state = moving(jax.tree.map(jnp.asarray, test_parallel.start(config, backbone)))
    halves = halves_of(0)
    config.meta.look_ahead = "classifiers"
    expected = textbook(config, backbone, state, *halves)
    for estimator in ("grad", "jvp"):
      config.meta.estimator = estimator
      found = ask(config, backbone, state, halves)
      for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
      ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-14)
    config.meta.update(look_ahead="network", estimator="grad")
    whole = ask(config, backbone, state, halves)
    assert 0 < diagnostics.cosine(found, whole) < 0.999


def test_its_passes_end_at_the_exits():
  def flops(method, look_ahead="network"):
    config, backbone = test_compiled_step.build(
      method=method, **{"meta.look_ahead": look_ahead}
    )
    half_step = jax.jit(
      step_lib.make_half_step(backbone, config, steps_per_epoch=10)
    )
    compiled = half_step.lower(
      *test_compiled_step.arguments(backbone, config, 32)
    ).compile()
    return compiled.cost_analysis()["flops"]

  assert flops("l2w", "classifiers") < 1.8 * flops("uniform")


def test_unrolled_steps_are_refused():
  config = test_parallel.make_config("all")
  config.meta.update(look_ahead="classifiers", estimator="unroll:2")
  with pytest.raises(ValueError, match="whole network; set config.meta.look_ahead"):
    l2w_jax.make_train_step(
      test_parallel.NETWORKS["msdnet"](), config, steps_per_epoch=2
    )


class Unnamed(nn.Module):
  """Its one exit is called head."""

  num_exits = 1

  @nn.compact
  def stage(self, k, carry, mode):
    return carry, nn.Dense(10, name="head")(carry.reshape(len(carry), -1))


def test_a_backbone_without_named_classifiers_is_refused():
  config = test_parallel.make_config("all")
  config.meta.look_ahead = "classifiers"
  backbone = Backbone(Unnamed(), 10, (8, 8, 1))
  with pytest.raises(ValueError, match="Unnamed has no submodule .* only head; "):
    l2w_jax.make_train_step(backbone, config, steps_per_epoch=2)
  config.method = "uniform"  # which has no look-ahead
  l2w_jax.make_train_step(backbone, config, steps_per_epoch=2)


def test_a_backbone_that_cannot_be_diagnosed_is_refused_before_a_run(
  tmp_path, monkeypatch
):
  config = l2w_jax.load_config(
    str(ROOT / "configs/digits.py"), TINY | {"diagnose.every": 5}
  )
  monkeypatch.setattr(
    loop.models,
    "build_backbone",
    lambda *unused: Backbone(Unnamed(), 10, (8, 8, 1)),
  )
  with pytest.raises(ValueError, match="'classifiers' out of config.diagnose.est"):
    loop.train(tmp_path / "run", config)
  assert not list(tmp_path.iterdir())
