"""Weights and losses against tables worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2w_jax.method import losses, weighting

OUTPUT = np.array([[0.2, 0.6], [-0.4, 0.0]])


@pytest.mark.parametrize(
  "center_over, expected",
  [
    # Row means are 0.4 and -0.2.
    ("exits", [[0.9, 1.1], [0.9, 1.1]]),
    # Column means are -0.1 and 0.3.
    ("batch", [[1.15, 1.15], [0.85, 0.85]]),
    # The mean of all four is 0.1.
    ("all", [[1.05, 1.25], [0.75, 0.95]]),
  ],
)
def test_weights_by_hand(center_over, expected):
  weights = weighting.sample_weights(jnp.asarray(OUTPUT), 0.5, center_over)
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "center_over, axis", [("exits", 1), ("batch", 0), ("all", None)]
)
def test_mean_weight_is_one_over_what_is_centred(center_over, axis):
  output = np.random.default_rng(0).uniform(-1, 1, (9, 4))
  weights = weighting.sample_weights(jnp.asarray(output), 1.0, center_over)
  np.testing.assert_allclose(weights.mean(axis), 1, rtol=1e-6)
  assert (weights < 0).any()  # nothing is clipped


def test_epsilon_zero_is_exactly_one():
  weights = weighting.sample_weights(jnp.asarray(OUTPUT), 0.0, "exits")
  np.testing.assert_array_equal(weights, 1)


def test_centring_goes_through_the_average_over_devices():
  shifted = weighting.sample_weights(
    jnp.asarray(OUTPUT), 1.0, "all", lambda mean: mean + 10
  )
  np.testing.assert_allclose(shifted, OUTPUT - 9.1, rtol=1e-6)


@pytest.mark.parametrize(
  "inputs, width", [("loss", 2), ("confidence", 2), ("both", 4)]
)
def test_features_are_what_was_asked_for_and_detached(inputs, width):
  losses_, confidence = jnp.asarray(OUTPUT), jnp.asarray(OUTPUT) + 5
  features = weighting.features(losses_, confidence, inputs)
  assert features.shape == (2, width) == (2, weighting.num_features(inputs, 2))
  expected = {
    "loss": losses_,
    "confidence": confidence,
    "both": np.concatenate([losses_, confidence], axis=1),
  }[inputs]
  np.testing.assert_array_equal(features, expected)
  gradient = jax.grad(lambda x: weighting.features(x, x, inputs).sum())(losses_)
  np.testing.assert_array_equal(gradient, 0)


def test_cross_entropy_and_confidence_by_hand():
  # Softmax of (ln 1, ln 3) is (1/4, 3/4).
  logits = jnp.log(jnp.array([[[1.0, 3.0]], [[3.0, 1.0]]]))
  labels = jnp.array([1, 1])
  np.testing.assert_allclose(
    losses.cross_entropy(logits, labels),
    [[-np.log(0.75)], [-np.log(0.25)]],
    rtol=1e-6,
  )
  np.testing.assert_allclose(losses.confidence(logits), 0.75, rtol=1e-6)
  # Smoothing 0.2 over two classes gives targets 0.9 and 0.1.
  np.testing.assert_allclose(
    losses.cross_entropy(logits[:1], labels[:1], 0.2),
    [[-0.9 * np.log(0.75) - 0.1 * np.log(0.25)]],
    rtol=1e-6,
  )


def test_losses_of_low_precision_logits_are_float32():
  logits = jnp.zeros((1, 1, 2), jnp.bfloat16)
  assert losses.cross_entropy(logits, jnp.array([0])).dtype == jnp.float32
  assert losses.confidence(logits).dtype == jnp.float32
