"""Proportions, allocation and meta loss against tables, oracles, fixtures."""

from __future__ import annotations

import json
import pathlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import enable_x64

from l2w_jax.method import allocation

GOLDEN = pathlib.Path(__file__).parent / "golden"
meta_loss = jax.jit(allocation.meta_loss)


def golden_cases(name):
  with np.load(GOLDEN / f"allocation_{name}.npz") as arrays:
    for index in range(len(json.loads(str(arrays["cases"])))):
      prefix = f"c{index}/"
      yield {
        key.removeprefix(prefix): arrays[key]
        for key in arrays.files
        if key.startswith(prefix)
      }


def confidence_of(logits):
  """[K B C] -> [B K]."""
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return (1 / powers.sum(-1)).T


def cross_entropy_of(logits, targets):
  """[K B C], [B] -> [B K]."""
  log_sum = np.log(np.exp(logits).sum(-1))
  return (log_sum - logits[:, np.arange(len(targets)), targets]).T


def allocate_reusing_samples(confidence, proportions):
  """Planted bug: each exit ranks all samples, taken or not."""
  counts = np.floor(len(confidence) * np.asarray(proportions)).astype(int)
  allocated = np.zeros(confidence.shape, bool)
  for k, count in enumerate(counts):
    order = np.argsort(-np.asarray(confidence)[:, k], kind="stable")
    allocated[order[:count], k] = True
  return allocated


# Weights q, q², q³ over their sum: 1/2 : 1/4 : 1/8 is 4 : 2 : 1 of 7.
@pytest.mark.parametrize(
  ("q", "expected"),
  [
    (1.0, [1 / 3, 1 / 3, 1 / 3]),
    (0.5, [4 / 7, 2 / 7, 1 / 7]),
    (2.0, [1 / 7, 2 / 7, 4 / 7]),
  ],
)
def test_proportions_by_hand(q, expected):
  # float32, each share rounded once: one unit in the last place is 6e-8.
  np.testing.assert_allclose(allocation.proportions(q, 3), expected, rtol=1.3e-7)


def test_proportions_of_one_exit_and_of_many_q():
  np.testing.assert_array_equal(allocation.proportions(0.3, 1), [1.0])
  both = allocation.proportions([0.5, 2.0], 4)
  assert both.shape == (2, 4)
  np.testing.assert_array_equal(both[0], allocation.proportions(0.5, 4))
  # Far from 1 the powers span more than float32; they must not overflow.
  extreme = np.asarray(allocation.proportions([1e-30, 1e30], 7))
  np.testing.assert_allclose(extreme.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("q", [0, -0.5, float("nan"), float("inf"), [0.5, 0.0]])
def test_proportions_reject_q(q):
  with pytest.raises(ValueError, match="q must be positive"):
    allocation.proportions(q, 5)


def test_proportions_reject_no_exits():
  with pytest.raises(ValueError, match="num_exits is 0"):
    allocation.proportions(0.5, 0)


def test_proportions_give_the_released_counts():
  with np.load(GOLDEN / "target_probs.npz") as golden:
    for num_exits in (3, 5, 7):
      q = golden["rows"] / 20
      ours = allocation.proportions(q, num_exits)
      # The released float32 exponentials err by up to 19 units in the last
      # place, 2.3e-6; ours by one.
      np.testing.assert_allclose(
        ours, golden[f"target_probs_K{num_exits}"], rtol=2.5e-6
      )
      for key in golden.files:
        if key.startswith(f"floor_K{num_exits}_N"):
          num_samples = int(key.split("_N")[1])
          np.testing.assert_array_equal(
            allocation.counts_per_exit(num_samples, ours), golden[key], key
          )


def test_counts_of_the_released_proportions_are_the_released_counts():
  with np.load(GOLDEN / "target_probs.npz") as golden:
    for key in golden.files:
      if key.startswith("floor_K"):
        num_exits, num_samples = key.removeprefix("floor_K").split("_N")
        counts = allocation.counts_per_exit(
          int(num_samples), jnp.asarray(golden[f"target_probs_K{num_exits}"])
        )
        np.testing.assert_array_equal(counts, golden[key], key)


@pytest.mark.parametrize("x64", [False, True])
def test_no_sample_is_lost_where_a_share_is_a_whole_number(x64):
  with enable_x64(x64):
    for num_exits in range(2, 9):
      for i in range(1, 40):
        exact = oracles.proportions(Fraction(i, 20), num_exits)
        ours = np.asarray(allocation.proportions(i / 20, num_exits))
        for share, p in zip(exact, ours, strict=True):
          for whole in (1, 3, 7, 10, 100, 999):
            num_samples = whole * share.denominator
            # float32 holds larger products only to halves.
            if num_samples < 2**22:
              floor = np.floor(p.dtype.type(num_samples) * p)
              assert floor == whole * share.numerator, (num_exits, i)


def test_allocation_by_hand():
  confidence = np.array(
    [
      [0.9, 0.5],  # exit 1 takes two: this one, its most confident,
      [0.8, 0.9],  # and this one, although exit 2 would like it more
      [0.8, 0.1],  # equal to the one above, but later
      [0.1, 0.7],  # the rest
    ]
  )
  np.testing.assert_array_equal(
    allocation.allocate(confidence, [0.5, 0.5]),
    [[True, False], [True, False], [False, True], [False, True]],
  )


def test_meta_loss_by_hand():
  # Exit 1: mean of 1 and 3; exit 2 is empty and adds 0; exit 3: 10 alone.
  # A mean over exits instead of a sum would give 4 or 6.
  losses = jnp.array([[1.0, 99, 99], [3, 99, 99], [99, 99, 10]])
  allocated = jnp.array([[1, 0, 0], [1, 0, 0], [0, 0, 1]], bool)
  value, gradient = jax.value_and_grad(allocation.meta_loss)(losses, allocated)
  assert value == 12
  np.testing.assert_array_equal(gradient, [[0.5, 0, 0], [0.5, 0, 0], [0, 0, 1]])


def test_meta_loss_ignores_values_it_does_not_select():
  losses = jnp.array([[1.0, jnp.nan], [2.0, jnp.inf]])
  allocated = jnp.array([[True, False], [True, False]])
  value, gradient = jax.value_and_grad(allocation.meta_loss)(losses, allocated)
  assert value == 1.5
  np.testing.assert_array_equal(gradient, [[0.5, 0], [0.5, 0]])


def test_meta_loss_over_devices_is_the_global_one():
  rng = np.random.default_rng(0)
  losses = jnp.asarray(rng.random((12, 3)), jnp.float32)
  allocated = allocation.allocate(
    rng.random((12, 3)), allocation.proportions(0.5, 3)
  )
  counts = allocated.sum(0)
  shares = [
    4 * allocation.meta_loss(losses[rows], allocated[rows], counts)
    for rows in np.split(np.arange(12), 4)
  ]
  # Sums of 12 float32 values in another order.
  np.testing.assert_allclose(
    np.mean(shares), allocation.meta_loss(losses, allocated), rtol=1e-6
  )


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (64, 7)])
@pytest.mark.parametrize("q", [0.05, 0.75, 1.0, 1.95])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_allocation_equals_the_oracle(shape, q, levels):
  rng = np.random.default_rng(shape[0] + levels)
  confidence = (rng.integers(levels, size=shape) / levels).astype(np.float32)
  p = allocation.proportions(q, shape[1])
  allocated = np.asarray(allocation.allocate(confidence, p))
  np.testing.assert_array_equal(allocated.sum(1), 1)
  counts = np.asarray(allocation.counts_per_exit(shape[0], p))
  np.testing.assert_array_equal(allocated.sum(0)[:-1], counts[:-1])
  expected = oracles.allocate(confidence, counts)
  np.testing.assert_array_equal(allocated.argmax(1), expected)

  losses = rng.random(shape).astype(np.float32)
  # At most 64 float32 additions: 64 · 6e-8.
  np.testing.assert_allclose(
    meta_loss(losses, allocated), oracles.meta_loss(losses, expected), rtol=4e-6
  )


@pytest.mark.parametrize("name", ["main", "floor0"])
def test_allocation_equals_the_released_one(name):
  for case in golden_cases(name):
    confidence = confidence_of(case["logits"])
    allocated = np.asarray(allocation.allocate(confidence, case["target_probs"]))
    np.testing.assert_array_equal(allocated.sum(1), 1)
    np.testing.assert_array_equal(allocated.argmax(1), case["exit_of_sample"])
    np.testing.assert_array_equal(allocated.sum(0), case["counts"])
    losses = cross_entropy_of(case["logits"], case["targets"])
    # float32 cross-entropies, at most 64 to a mean.
    np.testing.assert_allclose(
      meta_loss(losses, allocated), case["meta_loss_f64"], rtol=4e-6
    )


def test_allocation_equals_the_released_one_up_to_twins():
  # Each sample of this file has a twin with the same logits. The released sort
  # is not stable, and which twin it took first follows no rule.
  for case in golden_cases("ties_stable_order"):
    # Further ties are broken by rounding, where float32 softmaxes differ.
    confidence = jax.nn.softmax(case["logits"], axis=-1).max(-1).T
    twins = confidence.shape[0] // 2
    np.testing.assert_array_equal(confidence[:twins], confidence[twins:])
    allocated = np.asarray(allocation.allocate(confidence, case["target_probs"]))
    np.testing.assert_array_equal(allocated.sum(0), case["counts"])
    ours = np.asarray(allocated.argmax(1)).reshape(2, twins)
    released = case["exit_of_sample"].reshape(2, twins)
    np.testing.assert_array_equal(np.sort(ours, 0), np.sort(released, 0))
    # Ours takes the lower index first.
    np.testing.assert_array_equal(ours, np.sort(ours, 0))

    released = case["exit_of_sample"][:, None] == np.arange(len(case["counts"]))
    losses = cross_entropy_of(case["logits"], case["targets"])
    np.testing.assert_allclose(  # float32 cross-entropies, as above.
      meta_loss(losses, released), case["meta_loss_f64"], rtol=4e-6
    )


def test_reusing_samples_would_be_seen():
  different = 0
  for case in golden_cases("main"):
    confidence = confidence_of(case["logits"])
    wrong = allocate_reusing_samples(confidence, case["target_probs"])
    different += not np.array_equal(
      wrong, np.eye(wrong.shape[1], dtype=bool)[case["exit_of_sample"]]
    )
  assert different == 12  # every case of the file


def test_allocation_survives_nan():
  confidence = np.array([[np.nan, 0.5], [0.2, np.nan], [np.nan, np.nan]])
  allocated = allocation.allocate(confidence, [0.4, 0.6])
  np.testing.assert_array_equal(allocated.argmax(1), [1, 0, 1])
  np.testing.assert_array_equal(allocated.sum(1), 1)


def test_allocation_is_constant_under_grad_and_maps():
  rng = np.random.default_rng(0)
  confidence = jnp.asarray(rng.random((3, 8, 4)), jnp.float32)
  p = allocation.proportions(0.75, 4)

  def value(c):
    allocated = jax.jit(allocation.allocate)(c, p)
    return allocation.meta_loss(-jnp.log(c), allocated)

  # d(-log c)/dc over the counts, where allocated, and nothing from ranking.
  allocated = allocation.allocate(confidence[0], p)
  expected = -(allocated / confidence[0] / jnp.maximum(allocated.sum(0), 1))
  np.testing.assert_allclose(jax.grad(value)(confidence[0]), expected, 1e-6)

  mapped = jax.vmap(allocation.allocate, (0, None))(confidence, p)
  for one, c in zip(mapped, confidence, strict=True):
    np.testing.assert_array_equal(one, allocation.allocate(c, p))


def test_program_does_not_grow_with_exits():
  def operations(num_exits):
    jaxpr = jax.make_jaxpr(allocation.allocate)(
      jnp.zeros((8, num_exits)), jnp.zeros(num_exits)
    )
    return str(jaxpr).count(" = ")

  assert operations(3) == operations(11) > 10


@pytest.mark.parametrize(
  ("confidence", "proportions"), [((8, 5), (4,)), ((8,), (8,)), ((8, 5), (2, 5))]
)
def test_allocation_rejects_shapes(confidence, proportions):
  with pytest.raises(ValueError, match="one K"):
    allocation.allocate(np.zeros(confidence), np.zeros(proportions))
