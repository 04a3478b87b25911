"""What a step is compiled to: the network once, however often a step runs it.

Counted in the lowered program, so nothing is compiled here. A convolution there is
one of a pass over the network, and compile time follows their number.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY

import l2w_jax
from l2w_jax.training.step import half_step_body, step_body

HALF = 4


@functools.cache
def convolutions(method="l2w", interval=1, half=False):
  """How many convolutions the lowered step, or one half of it, holds."""
  config = l2w_jax.load_config(
    str(ROOT / "configs/digits.py"),
    {**TINY, "method": method, "meta.interval": interval},
  )
  backbone = l2w_jax.build_backbone(config.model, 10, (8, 8, 1))
  state = jax.eval_shape(
    functools.partial(l2w_jax.init_state, backbone=backbone, config=config),
    jax.random.key(0),
  )
  size = HALF if half else 2 * HALF
  batch = {
    "image": jax.ShapeDtypeStruct((size, 8, 8, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32),
  }
  body = half_step_body if half else step_body
  lowered = jax.jit(body(backbone, config, steps_per_epoch=10)).lower(
    state, *([batch, batch] if half else [batch])
  )
  return lowered.as_text().count("stablehlo.convolution")


def test_a_step_holds_its_half_once():
  half = convolutions(half=True)
  assert half > 50
  assert convolutions() == half


@pytest.mark.parametrize("interval", [2, 100])
def test_steps_with_and_without_wpn_update_share_the_network(interval):
  assert convolutions(interval=interval) == convolutions()


def test_the_forward_pass_is_shared_by_both_updates():
  # In passes: forward, pseudo backward of two, meta forward and backward of
  # three, forward-mode pass of two (its own half being linear), real backward of
  # two, against three. Recomputing one would add a third of a plain step.
  ratio = convolutions() / convolutions("uniform")
  assert 3.2 < ratio < 3.45
