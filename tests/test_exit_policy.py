"""Thresholds and curves against tables, oracles and the released search."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import enable_x64

from l2w_jax.exits import policy as exit_policy

GOLDEN = pathlib.Path(__file__).parent / "golden"
THRESHOLD_FILES = sorted(GOLDEN.glob("threshold_*.npz"))


def split_of(golden, name):
  """Confidence and correctness, both [N K], of a stored split [K N C]."""
  softmax = golden[name] * np.float32(golden["scale"])
  correct = softmax.argmax(-1) == golden[f"{name}_targets"]
  return softmax.max(-1).T, correct.T


# Five samples, two exits of interest: 2 are due at exit 1, 1 at exit 2.
CONFIDENCE = np.array(
  [
    [0.9, 0.1, 0.0],
    [0.7, 0.2, 0.0],  # second at exit 1: its threshold is 0.7
    [0.7, 0.9, 0.0],  # tied with the one above, so it leaves as well
    [0.2, 0.5, 0.0],  # best at exit 2 of the two left: its threshold is 0.5
    [0.1, 0.4, 0.0],  # the rest
  ],
  np.float32,
)
PROPORTIONS = np.array([0.4, 0.2, 0.4], np.float32)


def test_thresholds_and_curves_by_hand():
  found = exit_policy.find_thresholds(CONFIDENCE, PROPORTIONS)
  np.testing.assert_array_equal(found, np.float32([0.7, 0.5, -np.inf]))
  np.testing.assert_array_equal(
    exit_policy.exits_taken(CONFIDENCE, found), [0, 0, 0, 1, 2]
  )
  # Right where they left: samples 1, 3 and 5 of five.
  correct = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1]], bool)
  result = exit_policy.budgeted(CONFIDENCE, correct, [1.0, 10.0, 100.0], found)
  np.testing.assert_array_equal(result.exits, np.float32([0.6, 0.2, 0.2]))
  assert result.accuracy == np.float32(0.6)
  # (3 · 1 + 1 · 10 + 1 · 100) / 5, of float32 fractions.
  np.testing.assert_allclose(result.macs, 22.6, rtol=5e-7)
  np.testing.assert_array_equal(
    exit_policy.anytime(correct, [1.0, 10.0, 100.0]), np.float32([0.6, 0.2, 0.6])
  )


def test_the_last_exit_takes_everyone_whatever_its_threshold():
  taken = exit_policy.exits_taken(CONFIDENCE, [2.0, 2.0, 2.0])
  np.testing.assert_array_equal(taken, [2] * 5)


def test_a_share_below_one_sample_closes_the_exit():
  found = exit_policy.find_thresholds(CONFIDENCE, [0.19, 0.2, 0.61])
  np.testing.assert_array_equal(found, np.float32([np.inf, 0.9, -np.inf]))


def test_an_exit_that_ties_leave_short():
  # All four saturated ones leave at exit 1, where 2 were due. One is left at
  # exit 2, where 2 are due.
  confidence = np.float32([[1, 0.3, 0]] * 4 + [[0.5, 0.8, 0]])
  shares = np.float32([0.4, 0.4, 0.2])
  released = exit_policy.find_thresholds(confidence, shares)
  np.testing.assert_array_equal(released, [1, np.inf, -np.inf])
  np.testing.assert_array_equal(
    released,
    exit_policy.find_thresholds(confidence, shares, calibration="released"),
  )
  held_out = exit_policy.find_thresholds(confidence, shares, calibration="held_out")
  np.testing.assert_array_equal(held_out, np.float32([1, 0.8, -np.inf]))


@pytest.mark.parametrize("path", THRESHOLD_FILES, ids=lambda path: path.stem)
def test_search_equals_the_released_one(path):
  with np.load(path) as file:
    golden = dict(file)
  confidence, _ = split_of(golden, "val")
  found = exit_policy.find_thresholds(confidence, golden["target_probs"])
  # The released code writes 1e8 for a closed exit and -1e8 for the last.
  released = np.where(golden["T"] == 1e8, np.inf, golden["T"])
  released = np.where(released == -1e8, -np.inf, released)
  np.testing.assert_array_equal(found, released)

  for name in ("val", "test"):
    confidence, correct = split_of(golden, name)
    num_samples = len(correct)
    result = exit_policy.budgeted(confidence, correct, golden["flops"], found)
    counts = golden[f"exit_counts_{name}"]
    np.testing.assert_array_equal(result.exits, np.float32(counts / num_samples))
    right = np.rint(golden[f"acc_{name}"] / 100 * num_samples)
    np.testing.assert_array_equal(result.accuracy, np.float32(right / num_samples))
    # K float32 products and sums: (K + 2) · 6e-8 at K = 7.
    np.testing.assert_allclose(
      result.macs, golden[f"exp_flops_{name}_exact"], rtol=5.4e-7
    )


def test_search_in_double_precision_equals_the_released_one():
  with np.load(GOLDEN / "threshold_k5_n600_c10_ties.npz") as file:
    golden = dict(file)
  confidence, correct = split_of(golden, "val")
  with enable_x64(True):
    found = exit_policy.find_thresholds(
      confidence.astype(np.float64), golden["target_probs"]
    )
    result = exit_policy.budgeted(confidence, correct, golden["flops"], found)
    # Five float64 products and sums.
    np.testing.assert_allclose(
      result.macs, golden["exp_flops_val_exact"], rtol=1e-15 * 2
    )
    np.testing.assert_allclose(result.accuracy, golden["acc_val"] / 100, rtol=1e-15)


def thresholds_ranking_everyone(confidence, counts):
  """Planted bug: each exit ranks all samples, gone or not."""
  found = np.full(confidence.shape[1], np.inf, confidence.dtype)
  for k, count in enumerate(counts[:-1]):
    if count:
      found[k] = np.sort(confidence[:, k])[::-1][count - 1]
  found[-1] = -np.inf
  return found


def test_ranking_samples_that_are_gone_would_be_seen():
  with np.load(GOLDEN / "threshold_k5_n1000_c10.npz") as golden:
    confidence, _ = split_of(golden, "val")
    for counts, released in zip(golden["n_out"], golden["T"], strict=True):
      wrong = thresholds_ranking_everyone(confidence, counts)
      assert not np.array_equal(wrong[:-1], released[:-1])


@pytest.mark.parametrize("shape", [(1, 4), (6, 1), (97, 5)])
@pytest.mark.parametrize("levels", [1, 3, 12, 10**6])
@pytest.mark.parametrize("calibration", ["released", "held_out"])
def test_search_and_curves_equal_the_oracle(shape, levels, calibration):
  rng = np.random.default_rng(shape[0] * shape[1] + levels)
  confidence = (rng.integers(levels, size=shape) / levels).astype(np.float32)
  correct = rng.random(shape) < 0.7
  macs = np.cumsum(rng.random(shape[1])) * 1e8
  shares = exit_policy.proportions(np.arange(1, 40, 6) / 20, shape[1])
  found = exit_policy.find_thresholds(confidence, shares, calibration=calibration)
  results = exit_policy.budgeted(confidence, correct, macs, found)
  for q, share in enumerate(np.asarray(shares)):
    expected = oracles.thresholds(
      confidence,
      np.floor(np.float32(shape[0]) * share),
      close_short_exits=calibration == "released",
    )
    np.testing.assert_array_equal(found[q], expected)
    accuracy, cost, per_exit = oracles.budgeted(confidence, correct, macs, expected)
    assert results.accuracy[q] == np.float32(accuracy)
    np.testing.assert_allclose(results.macs[q], cost, rtol=5e-7)  # float32
    np.testing.assert_array_equal(results.exits[q], np.float32(per_exit / shape[0]))
    one = exit_policy.budgeted(confidence, correct, macs, found[q])
    for together, alone in zip(results, one, strict=True):
      np.testing.assert_array_equal(together[q], alone)


def test_without_ties_each_exit_gets_its_share_and_calibrations_agree():
  rng = np.random.default_rng(0)
  confidence = rng.permuted(
    np.tile(np.linspace(0.1, 1, 200, dtype=np.float32)[:, None], 5), axis=0
  )
  shares = exit_policy.proportions([0.5, 1.0, 1.5], 5)
  found = exit_policy.find_thresholds(confidence, shares)
  np.testing.assert_array_equal(
    found, exit_policy.find_thresholds(confidence, shares, calibration="held_out")
  )
  result = exit_policy.budgeted(
    confidence, np.ones((200, 5), bool), np.arange(5), found
  )
  np.testing.assert_array_equal(
    np.rint(result.exits[:, :-1] * 200), np.floor(200 * shares[:, :-1])
  )
  np.testing.assert_array_equal(result.accuracy, 1)


def test_everything_runs_under_jit():
  @jax.jit
  def curve(confidence, correct, shares):
    found = exit_policy.find_thresholds(confidence, shares)
    return exit_policy.budgeted(confidence, correct, [1.0, 10.0, 100.0], found)

  correct = jnp.ones((5, 3), bool)
  result = curve(jnp.asarray(CONFIDENCE), correct, jnp.asarray(PROPORTIONS))
  np.testing.assert_array_equal(result.exits, np.float32([0.6, 0.2, 0.2]))


@pytest.mark.parametrize(
  ("confidence", "shares", "message"),
  [
    (np.zeros((0, 3)), PROPORTIONS, "split empty"),
    (np.zeros(3), PROPORTIONS, r"must be \[N K\]"),
    (np.zeros((4, 5)), PROPORTIONS, r"must be \[5\] or \[Q 5\]"),
    (np.zeros((4, 3)), np.zeros((1, 1, 3)), r"must be \[3\] or \[Q 3\]"),
    (np.full((4, 3), np.nan), PROPORTIONS, "NaN for 4 of 4 samples"),
  ],
)
def test_bad_calibration_splits_are_refused(confidence, shares, message):
  with pytest.raises(ValueError, match=message):
    exit_policy.find_thresholds(confidence, shares)


def test_bad_curves_are_refused():
  correct = np.ones((5, 3), bool)
  with pytest.raises(ValueError, match="correct must be"):
    exit_policy.budgeted(CONFIDENCE, correct[:4], [1.0, 2.0, 3.0], PROPORTIONS)
  with pytest.raises(ValueError, match=r"macs \[K\]"):
    exit_policy.budgeted(CONFIDENCE, correct, [1.0, 2.0], PROPORTIONS)
  with pytest.raises(ValueError, match="thresholds must be"):
    exit_policy.exits_taken(CONFIDENCE, [0.5, 0.5])
  with pytest.raises(ValueError, match="at least one sample"):
    exit_policy.anytime(correct[:0], [1.0, 2.0, 3.0])
  with pytest.raises(ValueError, match="'held_out'"):
    exit_policy.find_thresholds(CONFIDENCE, PROPORTIONS, calibration="train")


def test_search_ranks_any_sign_and_one_zero():
  values = np.float32([-2.5, -0.0, 0.0, 3.0, -1e-30, 1e30])
  confidence = np.stack([values, np.zeros(6, np.float32)], 1)
  # 3 due: 1e30, 3 and a zero, and the other zero is tied with it.
  found = exit_policy.find_thresholds(confidence, [0.5, 0.5])
  np.testing.assert_array_equal(found, np.float32([0, -np.inf]))
  np.testing.assert_array_equal(
    exit_policy.exits_taken(confidence, found), [1, 0, 0, 0, 1, 0]
  )


@pytest.mark.parametrize("measure", exit_policy.MEASURES)
def test_measures_equal_the_oracle(measure):
  rng = np.random.default_rng(1)
  logits = rng.normal(scale=3, size=(60, 4, 5)).astype(np.float32)
  logits[0, 0] = [200, -200, 0, 0, 0]  # saturates
  prediction, found = exit_policy.confidence(logits, measure)
  np.testing.assert_array_equal(prediction, logits.argmax(-1))
  # Float32 sums of five probabilities.
  np.testing.assert_allclose(found, oracles.confidence(logits, measure), atol=1e-6)
  assert found.dtype == np.float32


def test_patience_by_hand():
  # Predictions 0 0 1 1 1: in a row 1 2 1 2 3.
  logits = np.float32(np.eye(2)[[0, 0, 1, 1, 1]])[None]
  _, found = exit_policy.confidence(logits, "patience")
  np.testing.assert_array_equal(found, [[1, 2, 1, 2, 3]])
  # Two in a row suffice: it leaves at exit 2.
  assert exit_policy.exits_taken(found, [2.0] * 5)[0] == 1


@pytest.mark.parametrize("measure", exit_policy.MEASURES)
def test_nan_logits_have_no_exit(measure):
  logits = np.zeros((3, 2, 4), np.float32)
  logits[1, 0, 2] = np.nan
  _, found = exit_policy.confidence(logits, measure)
  with pytest.raises(ValueError, match="NaN for 1 of 3 samples"):
    exit_policy.find_thresholds(found, [0.5, 0.5])


def test_an_unknown_measure_is_refused():
  with pytest.raises(ValueError, match="probability, margin, entropy"):
    exit_policy.confidence(np.zeros((1, 1, 2)), "luck")


def test_breakdown_counts_every_sample_in_its_class_and_exit():
  rng = np.random.default_rng(2)
  confidence = rng.random((80, 3)).astype(np.float32)
  correct = rng.random((80, 3)) < 0.6
  labels = rng.integers(0, 4, 80)  # class 4 has no sample
  thresholds = np.float32([0.6, 0.7, -np.inf])
  table = exit_policy.breakdown(confidence, correct, labels, thresholds, 5)
  left, right = np.zeros((5, 3), int), np.zeros((5, 3), int)
  for i in range(80):
    k = next(k for k in range(3) if confidence[i, k] >= thresholds[k])
    left[labels[i], k] += 1
    right[labels[i], k] += correct[i, k]
  np.testing.assert_array_equal(table.left, left)
  np.testing.assert_array_equal(table.right, right)
  np.testing.assert_allclose(table.exit_accuracy, right.sum(0) / left.sum(0))
  assert np.isnan(table.class_accuracy[4])
  np.testing.assert_allclose(
    table.class_accuracy[:4], right.sum(1)[:4] / left.sum(1)[:4]
  )
  np.testing.assert_allclose(
    table.class_macs([1, 10, 100])[:4], (left @ [1, 10, 100])[:4] / left[:4].sum(1)
  )
  with pytest.raises(ValueError, match=r"labels \[80\]"):
    exit_policy.breakdown(confidence, correct, labels[1:], thresholds, 5)
