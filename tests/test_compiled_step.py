"""What a half step is compiled to: each pass over the network once.

Convolutions are counted in the lowered program, so nothing is compiled for them. A
convolution there is one of a pass over the network, and compile time follows their
number.
"""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY

import l2w_jax
from l2w_jax.run.parallel import ONE_DEVICE
from l2w_jax.training import step as train_step
from l2w_jax.training.step import make_half_step

HALF = 4


def arguments(backbone, config, size):
  """Shapes of a half step's arguments."""
  state = jax.eval_shape(
    functools.partial(l2w_jax.init_state, backbone=backbone, config=config),
    jax.random.key(0),
  )
  half = {
    "image": jax.ShapeDtypeStruct((size, *backbone.image_shape), jnp.float32),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32),
  }
  return state, half, half, jax.ShapeDtypeStruct((2,), jnp.uint32)


def build(image_shape=(8, 8, 1), **overrides):
  """(config, backbone) of a network that is traced in seconds."""
  config = l2w_jax.load_config(
    str(ROOT / "configs/digits.py"), {**TINY, **overrides}
  )
  return config, l2w_jax.build_backbone(config.model, 10, image_shape)


@functools.cache
def convolutions(method="l2w", update_wpn=True):
  """How many convolutions the lowered half step holds."""
  config, backbone = build(method=method)
  half_step = jax.jit(
    make_half_step(backbone, config, steps_per_epoch=10),
    static_argnames="update_wpn",
  )
  lowered = half_step.lower(
    *arguments(backbone, config, HALF), update_wpn=update_wpn
  )
  return lowered.as_text().count("stablehlo.convolution")


def test_the_forward_pass_is_shared_by_both_updates():
  # In passes: forward, pseudo backward of two, meta forward and backward of
  # three, forward-mode pass of two (its own half being linear), real backward of
  # two, against three. Recomputing one would add a third of a plain step.
  ratio = convolutions() / convolutions("uniform")
  assert 3.2 < ratio < 3.45


def test_without_wpn_update_the_network_is_passed_as_by_a_plain_step():
  assert convolutions(update_wpn=False) == convolutions("uniform")


@pytest.mark.parametrize("interval, programs", [(1, 1), (2, 2), (100, 2)])
def test_a_step_compiles_its_half_once(interval, programs, monkeypatch):
  traced = []
  monkeypatch.setattr(
    train_step,
    "real_step",
    lambda optimizer, state, *_: traced.append(state) or state,
  )
  config, backbone = build(**{"meta.interval": interval})
  step = l2w_jax.make_train_step(backbone, config, steps_per_epoch=10)
  state = l2w_jax.init_state(jax.random.key(0), backbone, config)
  batch = {"image": jnp.zeros((2 * HALF, 8, 8, 1)), "label": jnp.zeros(8, int)}
  for _ in range(2):
    state, _ = step(state, batch)
  assert len(traced) == programs


def kept(remat: bool) -> int:
  """Bytes that the derivative of the losses by Θ keeps of the forward pass."""
  config, backbone = build(**{"model.remat": remat, "model.num_exits": 3})

  def pull(state, half):
    forward = train_step.forward_pass(
      backbone, ONE_DEVICE, state.batch_stats, train_step.train_losses_fn(config)
    )
    return jax.vjp(lambda params: forward(params, half)[0], state.params)[1]

  found = jax.eval_shape(pull, *arguments(backbone, config, 64)[:2])
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))


def test_a_rematerialised_derivative_keeps_what_passes_from_stage_to_stage():
  assert kept(True) < 0.2 * kept(False)


def peaks_on_a_tpu(method):
  """Peak bytes of the half step without and with remat; in a process of its own."""
  from jax.experimental import topologies

  described = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x4", chips_per_host_bounds=[2, 4, 1]
  )
  where = jax.sharding.SingleDeviceSharding(described.devices[0])
  found = []
  for remat in (False, True):
    config, backbone = build(
      (16, 16, 1),
      **{
        "method": method,
        "meta.estimator": "first_order",
        "model.remat": remat,
        "model.channels": 8,
        "model.growth": 8,
        "model.growth_factors": (1,),
        "model.bottleneck_factors": (1,),
        "model.step_mode": "even",
        "model.step": 3,
        "model.base": 2,
      },
    )
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      arguments(backbone, config, 256),
    )
    half_step = make_half_step(backbone, config, steps_per_epoch=10)
    compiled = jax.jit(half_step, donate_argnums=0).lower(*shapes).compile()
    found.append(compiled.memory_analysis().peak_memory_in_bytes)
  return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform", "l2w"])
def test_rematerialisation_needs_less_memory_on_a_tpu(method):
  """Compiled for a TPU that need not be there; XLA:CPU computes nothing anew.

  `first_order` stands for `grad` and `jvp`: they run the same passes.
  """
  pytest.importorskip("libtpu")
  done = subprocess.run(
    [sys.executable, __file__, method],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_ENABLE_COMPILATION_CACHE": "0",  # it cannot read such programs
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_ACCELERATOR_TYPE": "v5litepod-8",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  plain, remat = json.loads(done.stdout.splitlines()[-1])
  assert remat < 0.8 * plain


if __name__ == "__main__":
  print(json.dumps(peaks_on_a_tpu(sys.argv[1])))
