"""Thresholds for a stated target, against definitions and planted worlds."""

import numpy as np
import oracles
import pytest

from l2w_jax.exits import policy as exit_policy
from l2w_jax.exits import targets as exit_targets

MACS = np.array([1e6, 3e6, 7e6])


def make_split(num, seed, levels=50):
  """Confidence and correct [N 3]; the surer, and the later, the more right."""
  rng = np.random.default_rng(seed)
  confidence = rng.integers(1, levels + 1, (num, 3)) / levels
  right = rng.random((num, 1)) < confidence * [0.8, 0.9, 1.0] + [0, 0.05, 0.1]
  return confidence.astype(np.float32), right


def scored(split, thresholds):
  """(accuracy, mean MACs) by the oracle."""
  return oracles.budgeted(*split, MACS, thresholds)[:2]


@pytest.mark.parametrize(
  "text, says",
  [
    ("q:0", "above 0"),
    ("q", "not of the form q:Q"),
    ("macs:x", "of the form"),
    ("speed:3", "of the form"),
    ("accuracy:93", "did you mean accuracy:0.93"),
    ("risk:0.01", "of the form"),
    ("risk:0.01:1", "DELTA between 0 and 1"),
    ("q:1_0", "of the form"),
    ("q: 0.75", "of the form"),
    ("q:\u0661", "of the form"),
    ("macs:-1", "not below 0"),
    ("macs:nan", "finite"),
  ],
)
def test_targets_that_say_nothing_are_refused(text, says):
  with pytest.raises(ValueError, match=says):
    exit_targets.parse(text)


def test_q_is_the_search_for_that_q():
  split = make_split(97, 0)
  choice = exit_targets.choose(exit_targets.parse("q:0.75"), *split, MACS)
  np.testing.assert_array_equal(
    choice.thresholds,
    exit_policy.find_thresholds(
      split[0], exit_policy.proportions(0.75, 3), "held_out"
    ),
  )
  accuracy, cost, exits = oracles.budgeted(*split, MACS, choice.thresholds)
  assert choice.accuracy == accuracy
  assert choice.macs == pytest.approx(cost, rel=1e-12)
  np.testing.assert_array_equal(choice.exits, exits / 97)


@pytest.mark.parametrize("most", [1e6, 1.7e6, 3e6, 6.9e6, 7e6, 1e9])
def test_a_cost_is_kept_and_nothing_in_the_family_is_better(most):
  split = make_split(203, 1)
  choice = exit_targets.choose(exit_targets.Target("macs", (most,)), *split, MACS)
  accuracy, cost = scored(split, choice.thresholds)
  assert cost <= most and choice.accuracy == accuracy
  for q in (0.1, 0.5, 1.0, 2.0):
    family = exit_policy.find_thresholds(
      split[0],
      exit_policy.proportions(
        exit_targets.FAMILY_QS[np.abs(exit_targets.FAMILY_QS - q).argmin()], 3
      ),
      "held_out",
    )
    other, other_cost = scored(split, np.asarray(family))
    assert other_cost > most or other <= accuracy


def test_an_accuracy_is_kept_at_the_least_cost_of_the_family():
  split = make_split(203, 2)
  full = split[1][:, -1].mean()
  first = split[1][:, 0].mean()
  least = (full + first) / 2
  choice = exit_targets.choose(
    exit_targets.Target("accuracy", (least,)), *split, MACS
  )
  accuracy, cost = scored(split, choice.thresholds)
  assert accuracy >= least and cost < MACS[-1]
  # Exactly what the full network has can be asked for.
  exact = exit_targets.choose(
    exit_targets.Target("accuracy", (float(full),)), *split, MACS
  )
  assert exact.accuracy >= full
  assert exact.macs >= choice.macs


def test_a_target_out_of_reach_says_the_nearest():
  split = make_split(203, 3)
  with pytest.raises(ValueError, match="the nearest is 1e"):
    exit_targets.choose(exit_targets.Target("macs", (9e5,)), *split, MACS)
  with pytest.raises(ValueError, match=r"nearest is 0\.\d{4}, at .* MACs"):
    exit_targets.choose(exit_targets.Target("accuracy", (1.0,)), *split, MACS)


@pytest.mark.parametrize(
  "confidence, says",
  [
    (np.zeros((0, 3), np.float32), "split empty"),
    (np.full((4, 3), np.nan, np.float32), "NaN for 4 of 4"),
  ],
)
def test_bad_splits_are_refused(confidence, says):
  for text in ("q:0.5", "macs:1e9", "accuracy:0.1", "risk:0.1:0.1"):
    with pytest.raises(ValueError, match=says):
      exit_targets.choose(
        exit_targets.parse(text), confidence, np.ones(confidence.shape, bool), MACS
      )


def test_risk_is_tested_on_the_whole_split_by_the_exact_binomial():
  confidence, correct = split = make_split(2000, 4, levels=10**6)
  most, delta = 0.05, 0.1
  choice = exit_targets.choose(
    exit_targets.Target("risk", (most, delta)), *split, MACS
  )
  assert choice.macs < MACS[-1] and not choice.note

  def passes(t):
    taken = np.where(
      confidence[:, 0] >= t, 0, np.where(confidence[:, 1] >= t, 1, 2)
    )
    harmed = correct[:, -1] & ~correct[np.arange(2000), taken]
    return oracles.at_most(int(harmed.sum()), 2000, most) <= delta

  # From the strict end down, the last before the first that fails; of those
  # before it every tenth is counted, as the oracle is slow.
  sequence = np.float32(exit_targets.SHARED)
  last = sequence.tolist().index(choice.thresholds[0])
  assert 0 < last < len(sequence) - 2
  assert choice.thresholds[0] == choice.thresholds[1]
  assert not passes(sequence[last + 1])
  assert all(map(passes, [*sequence[:last:10], sequence[last]]))
  # More was allowed than a bound twice as strict allows, and less than most.
  stricter = exit_targets.choose(
    exit_targets.Target("risk", (most / 2, delta)), *split, MACS
  )
  assert stricter.macs > choice.macs


def risk_of(thresholds, world):
  confidence, correct = world
  taken = np.asarray(exit_policy.exits_taken(confidence, thresholds))
  early = correct[np.arange(len(correct)), taken]
  return correct[:, -1].mean() - early.mean()


def test_risk_is_controlled_over_many_draws():
  # A world where early answers cost 30 points; 200 calibration splits of it.
  world = make_split(20000, 5, levels=10**6)
  most, delta, draws = 0.05, 0.2, 200
  rng = np.random.default_rng(6)
  above = moved = 0
  for _ in range(draws):
    own = rng.choice(20000, 300)
    choice = exit_targets.choose(
      exit_targets.Target("risk", (most, delta)), world[0][own], world[1][own], MACS
    )
    above += risk_of(choice.thresholds, world) > most
    moved += choice.macs < MACS[-1]
  # P(more than 59 of 200) is below 0.001 at a rate of 0.2.
  assert above <= 59
  assert moved > draws / 2  # and not by never leaving early


def test_where_no_early_exit_passes_the_full_network_is_the_answer():
  confidence, correct = make_split(60, 7)
  correct[:, -1], correct[:, :-1] = True, False
  choice = exit_targets.choose(
    exit_targets.Target("risk", (0.0, 0.05)), confidence, correct, MACS
  )
  np.testing.assert_array_equal(
    choice.thresholds, np.float32([np.inf, np.inf, -np.inf])
  )
  assert choice.macs == MACS[-1] and choice.accuracy == 1
  assert choice.note == (
    "nothing but the full network passes risk:0:0.05: no number of calibration "
    "images is enough"
  )


def test_thresholds_that_nobody_reaches_are_the_full_network():
  # All of 400 samples leave at exit 3 but for thresholds of 0: three disagree.
  confidence = np.tile(np.float32([1, 1, 3]), (400, 1))
  correct = np.tile([False, False, True], (400, 1))
  choice = exit_targets.choose(
    exit_targets.parse("risk:0.05:0.1"),
    confidence,
    correct,
    MACS,
    measure="patience",
  )
  assert choice.note == (
    "nothing but the full network passes risk:0.05:0.1 on 400 calibration images"
  )
  assert choice.macs == MACS[-1]


def test_risk_says_how_many_images_it_needs():
  # Of 299 samples none harmed: 0.99^299 = 0.0495; of 298: 0.0500.
  assert exit_targets.samples_for_risk(0.01, 0.05) == 299
  target = exit_targets.parse("risk:0.01:0.05")
  for num, note in (
    (298, "it needs 299 calibration images at least, of 298"),
    (299, ""),
  ):
    confidence = np.full((num, 3), 0.5, np.float32)
    choice = exit_targets.choose(target, confidence, np.ones((num, 3), bool), MACS)
    assert note in choice.note and bool(choice.note) == bool(note)
    assert choice.macs == (MACS[0] if not note else MACS[-1])


def patience_split(num, seed):
  """Predictions of 4 exits that settle; confidence is how long they agree."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 5, num)
  prediction = np.stack(
    [
      np.where(rng.random(num) < p, label, rng.integers(0, 5, num))
      for p in (0.5, 0.6, 0.8, 0.9)
    ],
    1,
  )
  confidence = np.ones((num, 4), np.float32)
  for k in range(1, 4):
    same = prediction[:, k] == prediction[:, k - 1]
    confidence[:, k] += same * confidence[:, k - 1]
  return confidence, prediction == label[:, None]


def test_patience_offers_its_levels():
  confidence, correct = patience_split(400, 0)
  macs = np.array([1.0, 2.0, 3.0, 4.0])
  name, values, family = exit_targets.curve(confidence, measure="patience")
  assert (name, values) == ("patience", [2, 3, 4])
  np.testing.assert_array_equal(family, [[t] * 3 + [-np.inf] for t in (2, 3, 4)])
  rows = exit_targets.for_budgets(
    confidence, np.arange(1, 40) / 20, macs, measure="patience"
  )
  # A budget's level is the nearest in cost.
  costs = [
    oracles.budgeted(confidence, correct, macs, [t] * 3 + [-np.inf])[1]
    for t in (2, 3, 4)
  ]
  for q, row in zip(np.arange(1, 40) / 20, rows, strict=True):
    intended = float(np.asarray(exit_policy.proportions(q, 4)) @ macs)
    nearest = 2 + int(np.abs(np.array(costs) - intended).argmin())
    assert row[0] == nearest


@pytest.mark.parametrize(
  "text", ["q:0.75", "macs:3.2", "accuracy:0.8", "risk:0.1:0.1"]
)
def test_every_target_has_a_level_of_patience(text):
  confidence, correct = patience_split(400, 1)
  choice = exit_targets.choose(
    exit_targets.parse(text),
    confidence,
    correct,
    np.arange(1.0, 5),
    measure="patience",
  )
  assert choice.thresholds[0] in (-np.inf, 2, 3, 4, np.inf)
  assert len(set(choice.thresholds[:-1].tolist())) == 1
  if text.startswith("macs"):
    assert choice.macs <= 3.2
  if text.startswith("accuracy"):
    assert choice.accuracy >= 0.8
