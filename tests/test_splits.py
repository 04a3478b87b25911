"""What is held out, left out or mislabelled: seeded, balanced, exact."""

import numpy as np
import pytest

from l2w_jax.data import splits

LABELS = np.arange(50, dtype=np.int32) % 5


def test_hold_out_is_seeded_and_balanced_to_one():
  drawn = splits.hold_out(LABELS, 5, 13, 0)
  np.testing.assert_array_equal(drawn, splits.hold_out(LABELS, 5, 13, 0))
  other = splits.hold_out(LABELS, 5, 13, 1)
  assert not np.array_equal(drawn, other)
  for mask in (drawn, other):
    assert sorted(np.bincount(LABELS[mask])) == [2, 2, 3, 3, 3]


def test_nothing_is_held_out_when_asked():
  assert not splits.hold_out(LABELS, 5, 0, 0).any()


@pytest.mark.parametrize(
  "count, classes, says",
  [
    (4, 5, "no image out of some of the 5 classes; set it to 5 or more"),
    (50, 5, "hold 10 of the 10 train images .* below 50"),
    (12, 6, "hold 2 of the 0 train images of class 5"),
  ],
)
def test_a_class_missing_from_calibration_is_refused(count, classes, says):
  with pytest.raises(ValueError, match=says):
    splits.hold_out(LABELS, classes, count, 0)


def test_long_tail_by_hand():
  # 40 images of each of 3 classes, factor 4: 40, 40/2, 40/4; the last class is
  # the larger one to begin with, and the smallest decides.
  labels = np.repeat([2, 0, 1, 2], [20, 40, 40, 30]).astype(np.int32)
  kept = splits.long_tail(labels, 3, 4.0, 0)
  np.testing.assert_array_equal(np.bincount(labels[kept]), [40, 20, 10])
  np.testing.assert_array_equal(kept, splits.long_tail(labels, 3, 4.0, 0))
  assert not np.array_equal(kept, splits.long_tail(labels, 3, 4.0, 1))


def test_no_class_vanishes_in_the_tail():
  kept = splits.long_tail(LABELS, 5, 1e6, 0)
  assert np.bincount(LABELS[kept]).min() == 1


def test_noise_changes_the_asked_share_to_other_classes():
  labels = np.arange(4000, dtype=np.int32) % 4
  noisy = splits.noisy_labels(labels, 4, 0.3, 0)
  changed = noisy != labels
  assert changed.sum() == 1200 and noisy.dtype == np.int32
  # Each of 12 wrong pairs expects 100 ± 9.6 (binomial): within five of those.
  for label in range(4):
    counts = np.bincount(noisy[changed & (labels == label)], minlength=4)
    assert counts[label] == 0
    assert (np.abs(np.delete(counts, label) - 100) < 48).all()
  np.testing.assert_array_equal(noisy, splits.noisy_labels(labels, 4, 0.3, 0))
  assert not np.array_equal(noisy, splits.noisy_labels(labels, 4, 0.3, 1))
  np.testing.assert_array_equal(labels, np.arange(4000) % 4)
