"""A half in microbatches: one network that normalises each by itself, no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parallel
from conftest import enable_x64
from test_train_step import STEPS_PER_EPOCH, as_state, initial_values, make_batch
from test_train_step import make_config as linear_config
from toy import LinearExits, NormalizedExits

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.models.backbone import Backbone
from l2w_jax.training import microbatches
from l2w_jax.training.step import make_half_step


class InParts(Backbone):
  """A backbone that applies another to every M-th sample, written as it reads."""

  def __init__(self, backbone, num_parts):
    self.backbone, self.num_parts = backbone, num_parts

  @property
  def num_exits(self):
    return self.backbone.num_exits

  def apply(self, variables, images, train=False, axis_name=None):
    parts = [
      self.backbone.apply(variables, images[m :: self.num_parts], train, axis_name)
      for m in range(self.num_parts)
    ]
    logits = jnp.zeros((len(images), *parts[0][0].shape[1:]), parts[0][0].dtype)
    for m, (rows, _) in enumerate(parts):
      logits = logits.at[m :: self.num_parts].set(rows)
    return logits, jax.tree.map(
      lambda *stats: sum(stats) / self.num_parts, *(s for _, s in parts)
    )


def run(backbone, config, state, batches):
  with enable_x64(True):
    step = l2w_jax.make_train_step(
      backbone, config, steps_per_epoch=STEPS_PER_EPOCH
    )
    metrics = []
    for batch in batches:
      state, m = step(state, jax.tree.map(jnp.asarray, batch))
      metrics.append(jax.device_get(m))
    return jax.device_get(state), metrics


def assert_same(one, other):
  # Float64 sums in another order.
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def run_linear(backbone, config, num_parts):
  config.microbatches = num_parts
  with enable_x64(True):
    state = as_state(initial_values(config), config)
  return run(backbone, config, state, [make_batch(16, t) for t in range(3)])


def name_of(case):
  return "-".join(map(str, case.values())) if isinstance(case, dict) else None


CASES = [
  {"center_over": "all", "estimator": "grad", "interval": 2},
  {"center_over": "batch", "estimator": "jvp", "inputs": "both"},
  *(
    pytest.param(case, marks=pytest.mark.slow)
    for case in (
      {"center_over": "exits", "estimator": "grad"},
      {"estimator": "finite_difference", "label_smoothing": 0.1},
      {"method": "uniform"},
    )
  ),
]


@pytest.mark.parametrize("num_parts", [8, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES[1:], ids=name_of)
def test_without_batchnorm_it_is_the_step_of_the_whole_half(case, num_parts):
  whole = run_linear(LinearExits(), linear_config(**case), 1)
  assert_same(run_linear(LinearExits(), linear_config(**case), num_parts), whole)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_with_it_each_microbatch_is_normalised_by_itself(case):
  expected = run_linear(InParts(NormalizedExits(), 4), linear_config(**case), 1)
  assert_same(run_linear(NormalizedExits(), linear_config(**case), 4), expected)
  whole, _ = run_linear(NormalizedExits(), linear_config(**case), 1)
  assert np.abs(whole.params["weight"] - expected[0].params["weight"]).max() > 1e-6


@pytest.mark.slow
def test_msdnet_in_microbatches():
  config = test_parallel.make_config("all")
  backbone = test_parallel.make_msdnet()
  state = test_parallel.start(config, backbone)
  rng = np.random.default_rng(0)
  batches = [
    {"image": rng.normal(size=(16, 8, 8, 1)), "label": rng.integers(0, 10, 16)}
    for _ in range(2)
  ]
  expected = run(InParts(backbone, 2), config, state, batches)
  config.microbatches = 2
  assert_same(run(backbone, config, state, batches), expected)


@pytest.mark.slow
def test_memory_falls_with_the_microbatch():
  config = test_parallel.make_config("all")
  backbone = test_parallel.make_msdnet()
  state = jax.eval_shape(
    lambda: l2w_jax.init_state(jax.random.key(0), backbone, config)
  )
  half = {
    "image": jax.ShapeDtypeStruct((256, 8, 8, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((256,), jnp.int32),
  }
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  needed = {}
  for num_parts in (1, 8):
    config.microbatches = num_parts
    half_step = jax.jit(
      make_half_step(backbone, config, steps_per_epoch=3),
      static_argnames="update_wpn",
    )
    compiled = half_step.lower(state, half, half, key, update_wpn=True)
    needed[num_parts] = compiled.compile().memory_analysis().temp_size_in_bytes
  # Images, losses and gradients stay.
  assert needed[8] < 0.3 * needed[1]


def test_cut_is_refused_where_it_is_uneven():
  with pytest.raises(ValueError, match="6 samples per device.*4 equal parts"):
    microbatches.cut({"label": np.zeros(6)}, 4)


def test_unrolled_steps_cut_a_half_themselves():
  config = linear_config(estimator="unroll:2")
  config.microbatches = 2
  with pytest.raises(ValueError, match="config.microbatches to 1 .it is 2."):
    config_lib.validate(config)
