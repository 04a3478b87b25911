"""Temperatures and calibration error against slow restatements."""

import numpy as np
import oracles
import pytest

from l2w_jax.exits import temperature


def make_logits(num=400, seed=0):
  """Logits [N 2 4] whose honest temperatures are 0.5 and 3."""
  rng = np.random.default_rng(seed)
  honest = rng.normal(scale=2, size=(num, 4))
  p = oracles.softmax(honest)
  labels = np.array([rng.choice(4, p=row) for row in p])
  logits = honest[:, None] * np.array([0.5, 3.0])[:, None]
  return logits.astype(np.float32), labels


def likelihood_loss(logits, labels, t):
  p = oracles.softmax(logits.astype(np.float64) / t)
  return -np.log(p[np.arange(len(labels)), labels]).mean()


def test_temperatures_are_those_of_a_grid():
  logits, labels = make_logits()
  found = temperature.fit(logits, labels)
  grid = np.geomspace(0.1, 10, 2001)
  for k, t in enumerate(found):
    losses = [likelihood_loss(logits[:, k], labels, t) for t in grid]
    assert t == pytest.approx(grid[np.argmin(losses)], rel=2.4e-3)
  # One factor of six lies between the two exits.
  assert found[1] / found[0] == pytest.approx(6, rel=1e-4)


def test_calibration_error_is_the_oracles_and_falls():
  logits, labels = make_logits(seed=1)
  correct = logits.argmax(-1) == labels[:, None]
  errors = []
  for temperatures in (np.ones(2), temperature.fit(logits, labels)):
    confidence = np.asarray(temperature.scaled_confidence(logits, temperatures))
    found = temperature.calibration_error(confidence, correct)
    for k in range(2):
      assert found[k] == pytest.approx(
        oracles.calibration_error(confidence[:, k], correct[:, k], 15), rel=1e-5
      )
    errors.append(found)
  assert (errors[1] < errors[0]).all()


def test_bins_are_closed_above():
  # 0.5 belongs to the first of two bins: |1 - 0.5| and |0 - 0.75| by halves.
  error = temperature.calibration_error(
    np.array([[0.5], [0.75]]), np.array([[True], [False]]), num_bins=2
  )
  assert error == pytest.approx([0.5 * 0.5 + 0.5 * 0.75])


def test_a_split_all_right_has_the_lowest_temperature():
  logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]][:, None]
  found = temperature.fit(logits, np.array([0, 1, 2, 0]))
  assert found[0] == pytest.approx(temperature.LOWEST, rel=1e-3)


@pytest.mark.parametrize(
  "logits, says",
  [
    (np.zeros((0, 2, 4), np.float32), "split empty"),
    (np.full((3, 2, 4), np.nan, np.float32), "3 of 3 samples hold NaN"),
    (np.zeros((3, 4), np.float32), r"\[N K C\]"),
  ],
)
def test_bad_logits_are_refused(logits, says):
  with pytest.raises(ValueError, match=says):
    temperature.fit(logits, np.zeros(len(logits), int))
