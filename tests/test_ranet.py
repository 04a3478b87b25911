"""RANet's plan by hand, its resizing, and stages on images of odd sides.

What every backbone must do is in test_models, the released numbers in
test_golden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax.models import layers, ranet


def build(image_shape=(15, 12, 3), **deviating):
  model = config_lib.defaults("ranet").model
  model.update(
    blocks=1,
    block_step=1,
    step=1,
    channels=4,
    growth=4,
    scales=(1, 2, 2),
    growth_factors=(2, 1, 1),
    bottleneck_factors=(2, 1, 1),
    classifier_width=6,
  )
  model.update(deviating)
  return l2w.build_backbone(model, 5, image_shape)


def plan(blocks, block_step, step, step_mode, scales):
  model = config_lib.defaults("ranet").model
  model.update(
    blocks=blocks,
    block_step=block_step,
    step=step,
    step_mode=step_mode,
    scales=scales,
    growth_factors=(1,) * len(scales),
  )
  return ranet.plan(model)


def depths(flows, field):
  """Per flow, the depths (from 1) of the blocks where a field is set."""
  return [
    [depth for depth, block in enumerate(flow, 1) if getattr(block, field)]
    for flow in flows
  ]


@pytest.mark.parametrize(
  "scales, halvings, transitions",
  [
    ((1,), [[]], [[]]),
    ((1, 1), [[], []], [[], []]),
    ((1, 2), [[], [2]], [[], [2]]),
    ((1, 2, 3, 4), [[], [2], [2, 4], [2, 4, 6]], [[], [2], [2, 4], [2, 4, 6]]),
    # Twice the same scale: the halvings end with the flow before, the
    # transitions stay at parts of the depth (8 · 1/3 and 8 · 2/3; 6 · 1/2).
    ((1, 2, 3, 3), [[], [2], [2, 4], [4, 6]], [[], [2], [2, 4], [2, 5]]),
    ((1, 2, 2), [[], [2], [4]], [[], [2], [3]]),
  ],
)
def test_where_a_flow_halves_and_narrows(scales, halvings, transitions):
  flows = plan(2, 2, 1, "even", scales)
  assert depths(flows, "down") == halvings
  assert depths(flows, "transition") == transitions


def test_a_flow_shares_the_blocks_of_the_one_before():
  flows = plan(3, 2, 1, "even", (1, 2, 3))
  assert [len(flow) for flow in flows] == [3, 5, 7]
  assert depths(flows, "fused") == [[], [1, 2, 3], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
  "step_mode, num_layers", [("even", [[3], [3, 3, 3]]), ("lg", [[3], [3, 6, 9]])]
)
def test_layers_of_a_block(step_mode, num_layers):
  flows = plan(1, 2, 3, step_mode, (1, 2))
  assert [[block.layers for block in flow] for flow in flows] == num_layers


@pytest.mark.parametrize(
  "given, expected",
  [
    ([0, 6], [0, 2, 4, 6]),  # the ends keep their place
    ([0, 6, 2], [0, 3, 6, 4, 2]),
    ([0, 1, 2, 3, 4], [0, 2, 4]),
    ([0, 3, 6, 9], [0, 4.5, 9]),
    ([5], [5, 5, 5]),
    ([5, 7], [5]),  # one pixel: the first, as PyTorch
  ],
)
def test_resizing_rows_and_columns(given, expected):
  x = jnp.asarray(given, jnp.float32)
  column = layers.resize_bilinear(x[None, :, None, None], (len(expected), 1))
  np.testing.assert_allclose(column[0, :, 0, 0], expected, rtol=1e-6)
  row = layers.resize_bilinear(x[None, None, :, None], (1, len(expected)))
  np.testing.assert_allclose(row[0, 0, :, 0], expected, rtol=1e-6)


def test_resizing_both_sides():
  x = jnp.asarray([[0.0, 2.0], [4.0, 10.0]])[None, :, :, None]
  np.testing.assert_allclose(
    layers.resize_bilinear(x, (3, 3))[0, :, :, 0],
    [[0, 1, 2], [2, 4, 6], [4, 7, 10]],
  )


def test_resizing_to_the_same_size_costs_nothing():
  x = jnp.ones((1, 4, 6, 2))
  assert layers.resize_bilinear(x, (4, 6)) is x


def test_stages_alone_give_the_exits_of_the_whole():
  """Compiled one by one, as real exits run them, on 15×12 pixels."""
  backbone = build()
  variables = backbone.init(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (2, *backbone.image_shape))
  whole = jax.jit(backbone.apply)(variables, images)
  assert whole.shape == (2, 3, 5)
  run_stage = jax.jit(backbone.stage, static_argnums=1)
  carry = images
  for k in range(3):
    carry, logits = run_stage(variables, k, carry)
    # float32: XLA fuses the whole differently.
    np.testing.assert_allclose(logits, whole[:, k], rtol=1e-4, atol=1e-5)


def test_the_carry_holds_what_later_stages_read_and_no_more():
  backbone = build(
    blocks=2,
    block_step=2,
    scales=(1, 2),
    growth_factors=(2, 1),
    bottleneck_factors=(2, 1),
  )
  variables = jax.eval_shape(backbone.init, jax.random.key(0))
  carry = jax.ShapeDtypeStruct((1, *backbone.image_shape), np.float32)
  held = []
  for k in range(backbone.num_exits):
    carry, _ = jax.eval_shape(
      lambda variables, carry, k=k: backbone.stage(variables, k, carry),
      variables,
      carry,
    )
    held.append((carry.x is not None, len(carry.waiting), len(carry.low)))
  # Exits 0, 1 belong to flow 0, and 2, 3 to the last flow, which nobody reads.
  assert held == [(True, 1, 1), (False, 1, 2), (True, 0, 0), (False, 0, 0)]


@pytest.mark.parametrize(
  "deviating, message",
  [
    ({"scales": (1, 2, 1)}, r"scales \(1, 2, 1\).*next finer one"),
    ({"compress": 0.2}, "compress 0.2 leaves.*adds 4.*larger growth"),
    ({"compress": 1.0}, "compress 1.0 leaves.*another compress"),
    ({"reduction": 0.01}, "reduction 0.01 leaves a transition without channels"),
  ],
)
def test_flows_that_cannot_be_built(deviating, message):
  with pytest.raises(ValueError, match=message):
    build(**deviating)
