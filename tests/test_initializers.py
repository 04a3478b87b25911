"""The laws of initial variables, and that one stream serves them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax.models import initializers


def build(kind, **deviating):
  model = config_lib.defaults(kind).model
  model.update(channels=16, classifier_width=32, stem="imagenet")
  model.update(deviating)
  return l2w.build_backbone(model, 5, (32, 32, 3))


SMALL = {
  "msdnet": dict(num_exits=2),
  "ranet": dict(blocks=1, block_step=1, step=1, growth=16),
}


@pytest.mark.parametrize("kind", ["msdnet", "ranet"])
@pytest.mark.parametrize("init", ["pytorch", "he"])
def test_laws(kind, init):
  variables = build(kind, init=init, **SMALL[kind]).init(jax.random.key(0))
  normal = uniform = 0
  leaves = traverse_util.flatten_dict(variables["params"])
  for path, leaf in leaves.items():
    *owner, layer, name = path
    kernel = leaves.get((*path[:-1], "kernel"))
    # The released RANet's initialisation does not reach its first layer, and
    # neither reaches the kernel of a classifier's linear layer.
    he = init == "he" and owner[0] != "first_layer"
    if layer == "bn":
      np.testing.assert_array_equal(leaf, name == "scale")
    elif he and (layer, name) == ("linear", "bias"):
      np.testing.assert_array_equal(leaf, 0)
    elif he and layer == "conv" and name == "kernel":
      fan_out = np.prod(leaf.shape[:2]) * leaf.shape[-1]
      unit = leaf / np.sqrt(2 / fan_out)
      # The standard error of a standard deviation is σ / √(2n).
      assert abs(unit.std() - 1) < 5 / np.sqrt(2 * leaf.size)
      assert leaf.size < 500 or np.abs(unit).max() > 2.5  # not uniform
      normal += 1
    else:
      unit = leaf * np.sqrt(np.prod(kernel.shape[:-1]))
      assert np.abs(unit).max() <= 1
      assert abs(unit.std() - 3**-0.5) < 5 / np.sqrt(2 * leaf.size)
      uniform += 1
  assert uniform > 0
  assert (normal > 0) == (init == "he")
  for path, leaf in traverse_util.flatten_dict(variables["batch_stats"]).items():
    np.testing.assert_array_equal(leaf, {"mean": 0, "var": 1}[path[-1]])


def declare(**laws):
  return {
    name: initializers.Declared(jax.ShapeDtypeStruct(shape, np.float32), law, scale)
    for name, (law, scale, shape) in laws.items()
  }


DECLARED = declare(
  a=("uniform", 0.5, (200, 3)),
  b=("constant", 7.0, (2,)),
  c=("uniform", 2.0, (600,)),
  d=("normal", 1.0, (100, 6)),
  e=("normal", 3.0, (600,)),
)


def test_every_variable_has_its_own_part_of_the_stream():
  drawn = initializers.draw(jax.random.key(0), DECLARED)
  assert {name: x.shape for name, x in drawn.items()} == {
    name: leaf.value.shape for name, leaf in DECLARED.items()
  }
  units = [np.ravel(drawn[name]) / DECLARED[name].scale for name in "acde"]
  # Two independent sets of 600 correlate by 1 / √600 or so.
  correlation = np.corrcoef(units) - np.eye(4)
  assert np.abs(correlation).max() < 5 / np.sqrt(600)
  np.testing.assert_array_equal(drawn["b"], [7, 7])


def test_a_key_repeats_and_another_differs():
  first, again, other = (
    initializers.draw(jax.random.key(seed), DECLARED) for seed in (3, 3, 4)
  )
  for name in "acde":
    np.testing.assert_array_equal(first[name], again[name])
    assert not np.any(first[name] == other[name])


def test_under_jit_the_numbers_are_the_same():
  plain = initializers.draw(jax.random.key(0), DECLARED)
  jitted = jax.jit(lambda key: initializers.draw(key, DECLARED))(jax.random.key(0))
  for name, x in plain.items():
    # The normal law's inverse error function may be fused differently.
    np.testing.assert_allclose(jitted[name], x, rtol=1e-5, atol=1e-6)
    assert x.dtype == jnp.float32
