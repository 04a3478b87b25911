"""model.dtype="bfloat16": convolutions in it, all that is kept in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import build
from test_parallel import make_config

import l2w_jax
from l2w_jax.models.backbone import Backbone


def pair(name) -> list[Backbone]:
  return [build(name, dtype=dtype) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("name", ["msdnet, imagenet", "ranet"])
def test_convolutions_are_bfloat16_and_sums_over_batch_and_image_float32(name):
  backbone = build(name, dtype="bfloat16")
  variables = jax.eval_shape(backbone.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

  def loss(params, images):
    logits, stats = backbone.apply(
      {**variables, "params": params}, images, train=True
    )
    assert {x.dtype for x in jax.tree.leaves((logits, stats))} == {
      jnp.dtype("float32")
    }
    return logits.sum()

  variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
  forward = str(jax.make_jaxpr(loss)(variables["params"], images))
  assert re.search(r":bf16\S* = conv_general_dilated\[", forward)
  assert not re.search(r":f32\S* = conv_general_dilated\[", forward)
  if "msdnet" in name:  # RANet's images are resized by products as well
    products = re.findall(r":(\S+?)\[\S* = dot_general\[", forward)
    # The 1×1 convolutions, and the classifiers.
    assert products.count("f32") == backbone.num_exits < len(products)
  derivative = str(jax.make_jaxpr(jax.grad(loss))(variables["params"], images))
  assert not re.search(r":bf16\S* = reduce_sum\[", forward)
  assert re.search(r":bf16\S* = conv_general_dilated\[", derivative)
  assert not re.search(r":f32\S* = conv_general_dilated\[", derivative)


def test_a_float32_network_has_no_bfloat16():
  backbone = build("msdnet")
  assert "bf16" not in str(
    jax.make_jaxpr(backbone.apply)(
      jax.eval_shape(backbone.init, jax.random.key(0)),
      jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32),
    )
  )


def test_logits_are_close_and_the_stages_agree():
  exact, rounded = pair("msdnet, no bottleneck, no transition")
  variables = exact.init(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
  ours, theirs = (jax.jit(b.apply)(variables, images) for b in (rounded, exact))
  # bfloat16 has 8 bits: a few roundings of 2^-8, relative to the largest logit.
  np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())
  assert np.abs(ours - theirs).max() > 1e-5 * np.abs(theirs).max()

  @jax.jit
  def staged(variables, carry):
    for k in range(rounded.num_exits):
      carry, logits = rounded.stage(variables, k, carry)
      assert {x.dtype for x in jax.tree.leaves(carry)} == {jnp.dtype("bfloat16")}
    return logits

  np.testing.assert_allclose(
    staged(variables, images), ours[:, -1], atol=0.03 * np.abs(theirs).max()
  )


@pytest.mark.parametrize("estimator, parts", [("grad", 1), ("jvp", 2)])
def test_the_whole_state_and_its_gradients_stay_float32(estimator, parts):
  config = make_config("all")
  config.model.dtype, config.meta.estimator = "bfloat16", estimator
  config.microbatches = parts
  backbone = l2w_jax.build_backbone(config.model, 10, (8, 8, 1))
  state = jax.eval_shape(
    lambda: l2w_jax.init_state(jax.random.key(0), backbone, config)
  )
  step = l2w_jax.make_train_step(backbone, config, steps_per_epoch=3)
  after, metrics = jax.eval_shape(
    step,
    state,
    {
      "image": jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32),
      "label": jax.ShapeDtypeStruct((16,), jnp.int32),
    },
  )
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
    lambda x: x.dtype, state
  )
  assert {str(x.dtype) for x in jax.tree.leaves(metrics)} == {"float32", "bool"}
