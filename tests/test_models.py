"""What every backbone must do: stages, causality, cost, errors, BatchNorm."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, enable_x64
from flax import linen as nn
from flax import traverse_util
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax.models import equilibrium, initializers, layers
from l2w_jax.models.backbone import Backbone

sys.path.insert(0, str(ROOT / "experiments"))
import scaling  # noqa: E402

SMALL = {
  "msdnet": ("msdnet", dict(num_exits=3)),
  "msdnet, pruned at the end": (
    "msdnet",
    dict(num_exits=3, prune="min", step_mode="even", step=1, base=2),
  ),
  "msdnet, no bottleneck, no transition": (
    "msdnet",
    dict(num_exits=2, bottleneck=False, reduction=0),
  ),
  "msdnet, imagenet": (
    "msdnet",
    dict(num_exits=2, stem="imagenet", classifier_width=0),
  ),
  "ranet": ("ranet", dict(blocks=1, block_step=1, step=1)),
  "ranet, even, imagenet": (
    "ranet",
    dict(
      blocks=1,
      block_step=1,
      step=2,
      step_mode="even",
      stem="imagenet",
      classifier_width=0,
      scales=(1, 2, 2),
    ),
  ),
}


def build(name, image=(32, 32, 3), **changes):
  kind, values = SMALL[name]
  config = config_lib.defaults(kind)
  small = {"channels": 4, "growth": 8, "classifier_width": 8}
  config.model.update(
    {key: value for key, value in small.items() if key in config.model}
  )
  config.model.update(values | changes)
  return l2w.build_backbone(config_lib.validate(config).model, 5, image)


@pytest.fixture(params=SMALL, scope="module")
def network(request):
  """(backbone, variables, images) of one small network."""
  backbone = build(request.param)
  variables = backbone.init(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
  return backbone, variables, images


def test_stages_give_what_apply_gives(network):
  backbone, variables, images = network

  @jax.jit
  def staged(variables, carry):
    logits = []
    for k in range(backbone.num_exits):
      carry, logits_k = backbone.stage(variables, k, carry)
      logits.append(logits_k)
    return jnp.stack(logits, axis=1)

  np.testing.assert_allclose(
    staged(variables, images),
    jax.jit(backbone.apply)(variables, images),
    rtol=1e-5,
    atol=1e-6,
  )  # float32, fused differently


def test_exits_depend_on_nothing_behind_them_and_params_are_counted(network):
  backbone, variables, images = network

  # One exit at a time: all at once takes XLA twice as long.
  @jax.jit
  @jax.grad
  def gradient(params, k):
    logits, _ = backbone.apply({**variables, "params": params}, images, train=True)
    return jnp.square(logits[:, k]).sum()

  rows_of = [
    traverse_util.flatten_dict(gradient(variables["params"], k))
    for k in range(backbone.num_exits)
  ]
  reached = np.zeros(backbone.num_exits, int)
  for path, parameter in rows_of[0].items():
    depends = np.array([np.any(rows[path] != 0) for rows in rows_of])
    assert depends.any(), path
    reached += parameter.size * (np.cumsum(depends) > 0)
    part, _, index = path[0].partition("_")
    if part == "classifier":
      np.testing.assert_array_equal(np.flatnonzero(depends), [int(index)])
    if part == "blocks":  # MSDNet's; block b is computed in stage b
      assert not depends[: int(index.partition("_")[0])].any()
  # Some of what a stage computes is for later exits only, but it costs.
  assert (reached <= backbone.params_to_exit).all()
  assert reached[-1] == backbone.params_to_exit[-1]
  total = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert backbone.params_to_exit[-1] == total
  assert (np.diff(backbone.macs) > 0).all()


def test_training_updates_statistics_and_evaluation_does_not_need_to(network):
  backbone, variables, images = network
  logits, stats = jax.jit(lambda v, x: backbone.apply(v, x, train=True))(
    variables, images
  )
  assert logits.shape == (8, backbone.num_exits, 5)
  jax.tree.map(
    lambda new, old: np.testing.assert_equal(np.array_equal(new, old), False),
    stats,
    variables["batch_stats"],
  )


@pytest.mark.slow
def test_rematerialisation_changes_no_derivative():
  images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  plain = build("msdnet", num_exits=2)
  variables = plain.init(jax.random.key(0))

  def gradient(backbone):
    @jax.jit
    @jax.grad
    def run(params):
      logits, _ = backbone.apply(
        {**variables, "params": params}, images, train=True
      )
      return jnp.square(logits).sum()

    return run(variables["params"])

  # Float32, of which other operations are fused.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()
    ),
    gradient(build("msdnet", num_exits=2, remat=True)),
    gradient(plain),
  )


def test_batch_norm_is_pytorchs():
  """Biased variance normalises, the unbiased one is stored with weight 0.1."""
  x = np.random.default_rng(0).normal(2.0, 3.0, (4, 2, 2, 3))
  norm = layers.BatchNorm(3)
  with enable_x64(True):
    variables = {
      "params": {"scale": jnp.full(3, 1.5), "bias": jnp.full(3, 0.5)},
      "batch_stats": {"mean": jnp.full(3, 0.2), "var": jnp.full(3, 2.0)},
    }
    y, updated = norm.apply(
      variables, jnp.asarray(x), layers.Mode(train=True), mutable=["batch_stats"]
    )
    running = norm.apply(variables, jnp.asarray(x), layers.Mode())
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(
    y, 1.5 * (x - mean) / np.sqrt(var + 1e-5) + 0.5, rtol=1e-12
  )
  np.testing.assert_allclose(
    updated["batch_stats"]["mean"], 0.9 * 0.2 + 0.1 * mean, rtol=1e-12
  )
  np.testing.assert_allclose(
    updated["batch_stats"]["var"], 0.9 * 2.0 + 0.1 * var * 16 / 15, rtol=1e-12
  )
  np.testing.assert_allclose(
    running, 1.5 * (x - 0.2) / np.sqrt(2.0 + 1e-5) + 0.5, rtol=1e-12
  )


def test_batch_norm_needs_two_values():
  norm = layers.BatchNorm(3)
  x = jnp.zeros((1, 1, 1, 3))
  variables = norm.init(jax.random.key(0), x, layers.Mode())
  variables = jax.tree.map(
    lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf,
    variables,
    is_leaf=lambda leaf: hasattr(leaf, "unbox"),
  )
  with pytest.raises(ValueError, match="more than one value per channel"):
    norm.apply(variables, x, layers.Mode(train=True), mutable=["batch_stats"])


class Bare(nn.Module):
  """Without BatchNorm; a classifier is two layers, and is not called so."""

  num_exits: int = 2
  last: type[nn.Module] = layers.Linear

  def setup(self):
    self.trunk = [layers.Conv(4) for _ in range(2)]
    self.narrow = [layers.Linear(3) for _ in range(2)]
    self.answer = [self.last(5) for _ in range(2)]

  def stage(self, k, carry, mode=layers.EVALUATE):
    carry = jax.nn.relu(self.trunk[k](carry))
    return carry, self.answer[k](self.narrow[k](carry.mean((1, 2))))


@pytest.mark.parametrize("method", ["l2w", "equilibrium"])
def test_a_network_without_batch_norm_is_trained(method):
  backbone = Backbone(Bare(), 5, (8, 8, 1))
  config = config_lib.load_config(str(ROOT / "configs/digits.py"))
  config.method, config.batch = method, 8
  state = l2w.init_state(jax.random.key(0), backbone, config)
  assert state.batch_stats == {}
  batch = {
    "image": jax.random.normal(jax.random.key(1), (8, 8, 8, 1)),
    "label": jnp.arange(8) % 5,
  }
  step = jax.jit(l2w.make_train_step(backbone, config, steps_per_epoch=1))
  after, metrics = step(state, batch)
  assert after.batch_stats == {} and np.isfinite(metrics["train_loss"]).all()
  assert not np.array_equal(
    backbone.apply(after.variables, batch["image"]),
    backbone.apply(state.variables, batch["image"]),
  )


def test_classifiers_are_found_by_what_depends_on_them():
  found = equilibrium.factors(Backbone(Bare(), 5, (8, 8, 1)))
  assert {name: set(layer.values()) for name, layer in found.items()} == {
    "trunk_0": {0.5},
    "trunk_1": {1.0},
    **{f"{layer}_{k}": {1.0} for layer in ("narrow", "answer") for k in range(2)},
  }


def test_a_layer_that_does_not_say_how_it_starts_is_refused():
  backbone = Backbone(Bare(last=nn.Dense), 5, (8, 8, 1))
  with pytest.raises(
    ValueError, match="variable params/answer_0/bias does not say"
  ):
    backbone.init(jax.random.key(0))


# Prints by how much the variances of two norms on four devices are wrong, for each
# ratio of mean to standard deviation; the running mean is off by 2 of the latter.
FAR_FROM_ZERO = """
import jax
import jax.numpy as jnp
import numpy as np
from l2w_jax.models import layers

def variances(x, running):
  images, ones = [x, x[..., :2]], [jnp.ones(6), jnp.ones(2)]
  centres = [running * x for x in ones]
  return layers._normalize("devices", images, ones, ones, centres)[2]

for ratio in (1, 100, 1000):
  x = np.random.default_rng(ratio).normal(ratio, 1, (4, 8, 4, 4, 6))
  x = x.astype(np.float32)
  true = x.var((0, 1, 2, 3), dtype=float)
  run = jax.pmap(variances, axis_name="devices", in_axes=(0, None))
  found = run(x, np.float32(ratio + 2))
  print(max(np.abs(var / true[: var.shape[-1]] - 1).max() for var in found))
"""


def test_the_variance_over_devices_is_right_far_from_zero():
  flag = "--xla_force_host_platform_device_count=4"
  done = subprocess.run(
    [sys.executable, "-c", FAR_FROM_ZERO],
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": flag, "PYTHONPATH": str(ROOT)},
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  errors = [float(line) for line in done.stdout.split()]
  # Float32; the variance is that of float32's own values.
  assert len(errors) == 3 and max(errors) < 1e-5


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_the_running_mean_is_only_where_sums_are_taken_around(offset):
  x = np.random.default_rng(0).normal(1, 2, (16, 4, 4, 3))
  with enable_x64(True):
    norm, zeros, ones = layers.BatchNorm(3), jnp.zeros(3), jnp.ones(3)
    variables = {
      "params": {"scale": ones, "bias": zeros},
      "batch_stats": {"mean": zeros + offset, "var": ones},
    }
    y, kept = norm.apply(
      variables, jnp.asarray(x), layers.Mode(True), mutable=["batch_stats"]
    )
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(
    y, (x - mean) / np.sqrt(var + layers.BN_EPS), atol=1e-9
  )
  stats = kept["batch_stats"]
  np.testing.assert_allclose(stats["mean"], 0.9 * offset + 0.1 * mean, rtol=1e-12)
  unbiased = var * 256 / 255
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * unbiased, rtol=1e-9)


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_products_are_as_precise_as_asked_for(precision):
  backbone = build("msdnet", precision=precision)
  variables = backbone.init(jax.random.key(0))
  images = jnp.ones((2, *backbone.image_shape))

  def products(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("dot_general", "conv_general_dilated"):
        yield equation.params["precision"]
      for inner in jaxprs_in_params(equation.params):
        yield from products(inner)

  wanted = getattr(jax.lax.Precision, precision.upper())
  for function in (
    lambda v: backbone.apply(v, images).sum(),
    lambda v: backbone.stage(v, 0, images)[1].sum(),
  ):
    found = list(products(jax.make_jaxpr(jax.grad(function))(variables).jaxpr))
    assert len(found) > 5
    if precision == "default":
      assert all(x is None for x in found)
    else:
      assert all(set(x) == {wanted} for x in found)


def test_no_variance_is_below_zero():
  x = jnp.full((8, 4, 4, 1), 12345.678, jnp.float32)
  variables = {
    "params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
    "batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1)},
  }
  y, kept = layers.BatchNorm(1).apply(
    variables, x, layers.Mode(True), mutable=["batch_stats"]
  )
  assert np.isfinite(y).all() and kept["batch_stats"]["var"] >= 0.9


def test_norms_of_one_depth_send_one_message():
  norm = functools.partial(layers._normalize, "devices")
  images = [jnp.ones((2, 2, 2, width)) for width in (3, 5)]
  scales = [jnp.ones(3), jnp.ones(5)]

  def messages(function, *arguments):
    traced = jax.make_jaxpr(function, axis_env=[("devices", 4)])(*arguments)
    return scaling.chain(traced.jaxpr)[0]

  assert messages(norm, images, scales, scales, scales) == 1
  arguments = (images, scales, scales, scales)
  # The statistics, and the means of the derivative.
  assert messages(lambda *a: jax.jvp(norm, a, a), *arguments) == 2


@pytest.mark.parametrize(
  "initializer, name", [("pytorch", "msdnet"), ("he", "msdnet")]
)
def test_initial_kernels_follow_their_law(initializer, name):
  backbone = build(name, channels=32, init=initializer)
  params = traverse_util.flatten_dict(backbone.init(jax.random.key(0))["params"])
  kernels = [
    x
    for path, x in params.items()
    if path[-1] == "kernel" and x.ndim == 4 and x.size > 4000
  ]
  assert kernels
  for kernel in kernels:
    fan_in = np.prod(kernel.shape[:3])
    if initializer == "pytorch":
      assert np.abs(kernel).max() <= fan_in**-0.5
      np.testing.assert_allclose(kernel.std(), (3 * fan_in) ** -0.5, rtol=0.05)
    else:
      fan_out = np.prod(kernel.shape[:2]) * kernel.shape[3]
      np.testing.assert_allclose(kernel.std(), (2 / fan_out) ** 0.5, rtol=0.05)
      np.testing.assert_allclose(
        kernel.mean(), 0, atol=4 * (2 / fan_out / kernel.size) ** 0.5
      )


@pytest.mark.parametrize(
  "name, image, changes, message",
  [
    ("msdnet", (3, 8, 3), {}, "images of 3×8 pixels are too small"),
    ("msdnet, imagenet", (15, 15, 3), {}, "too small"),
    ("ranet", (2, 2, 1), {}, "too small"),
    (
      "msdnet",
      (32, 32, 3),
      {"bottleneck_factors": (1, 2)},
      "must name the same number of scales",
    ),
    ("msdnet", (32, 32, 3), {"growth": 3, "growth_factors": (1, 1, 2)}, "odd"),
    (
      "msdnet",
      (32, 32, 3),
      {"num_exits": 1, "prune": "min"},
      "prune 'min' drops 2 of 3 scales.*more layers",
    ),
    (
      "msdnet",
      (32, 32, 3),
      {"reduction": 0.02},
      "reduction 0.02 leaves a transition",
    ),
    (
      "msdnet, pruned at the end",
      (32, 32, 3),
      {"reduction": 0.02},
      "reduction 0.02 leaves a transition",
    ),
    ("ranet", (32, 32, 3), {"scales": (2, 3, 4)}, "must start at 1"),
    ("ranet", (32, 32, 3), {"scales": (1, 3, 3)}, "must start at 1"),
    ("ranet", (32, 32, 3), {"scales": (1, 2)}, "one entry for each"),
    ("ranet", (32, 32, 3), {"growth": 1}, "without new channels"),
    ("ranet", (32, 32, 3), {"reduction": 0}, "reduction 0"),
  ],
)
def test_what_cannot_be_built_is_one_clear_error(name, image, changes, message):
  with pytest.raises(ValueError, match=message):
    build(name, image, **changes)


def test_too_few_classes():
  with pytest.raises(ValueError, match="num_classes must be at least 2"):
    l2w.build_backbone({}, 1, (32, 32, 3))


@pytest.mark.parametrize(
  "given",
  [
    {"name": "msdnet", "num_exits": 4},
    {"num_exits": 4, "growth_factors": [1, 2], "bottleneck_factors": [1, 2]},
    {"name": "ranet", "block_step": 1},
  ],
)
@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_what_a_model_config_leaves_out_is_default(given, kind):
  model = config_lib.defaults(given.get("name", "msdnet")).model
  model.update(config_lib.from_dict(given))
  found = l2w.build_backbone(kind(given), 5, (32, 32, 3))
  assert found.module == l2w.build_backbone(model, 5, (32, 32, 3)).module
  assert found.num_exits == 4


@pytest.mark.parametrize(
  "given, message",
  [
    ({"exits": 4}, "model.exits does not exist; did you mean config.model.num_ex"),
    ({"name": "ranet", "num_exits": 4}, "model.num_exits does not exist"),
    ({"num_exits": 0}, "model.num_exits must be a whole number at least 1, got 0"),
    ({"growth_factors": 3}, "model.growth_factors must be a tuple"),
    ({"stem": ["cifar"]}, "model.stem must be one of"),
    ({"name": "resnet"}, "unknown model 'resnet'.*one of 'msdnet', 'ranet'"),
    ({"name": ["msdnet"]}, r"unknown model \['msdnet'\]"),
  ],
)
def test_a_model_config_that_is_wrong_is_one_clear_error(given, message):
  with pytest.raises(ValueError, match=message) as error:
    l2w.build_backbone(given, 5, (32, 32, 3))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_has_the_bias_it_is_asked_for(kernel):
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  conv = layers.Conv(5, kernel, use_bias=True)
  params = initializers.draw(
    jax.random.key(1), jax.eval_shape(conv.init, jax.random.key(1), x)
  )["params"]
  plain = layers.Conv(5, kernel).apply({"params": {"kernel": params["kernel"]}}, x)
  np.testing.assert_allclose(
    conv.apply({"params": params}, x), plain + params["bias"], rtol=1e-6
  )
  assert np.abs(params["bias"]).min() > 0
