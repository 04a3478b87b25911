"""The embedded digits, the batches of an epoch, and augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2w_jax import config as config_lib
from l2w_jax.data import augment, order, resident, sources
from l2w_jax.data import digits as digits_lib


@pytest.fixture(scope="module")
def digits():
  return sources.load(config_lib.defaults().data)


def test_digits_splits_are_disjoint_balanced_and_whole(digits):
  splits = [digits.train, digits.calibration, digits.test]
  assert [len(split.labels) for split in splits] == [1077, 360, 360]
  for split in splits:
    assert split.images.shape == (len(split.labels), 8, 8, 1)
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
    counts = np.bincount(split.labels, minlength=10)
    # The source has 174 to 183 images of a digit.
    assert counts.min() >= 0.95 * len(split.labels) / 10
    assert counts.max() <= 1.05 * len(split.labels) / 10
  images = [image.tobytes() for split in splits for image in split.images]
  assert len(set(images)) == len(images) == 1797
  assert digits.image_shape == (8, 8, 1) and digits.num_classes == 10
  assert digits.class_names == tuple("0123456789")


def test_mixed_digits_are_each_digit_as_it_is_and_made_hard(digits):
  config = config_lib.defaults().data
  config.source = "digits:mixed"
  mixed = sources.load(config)
  for name, copies in (("train", 4), ("calibration", 1), ("test", 1)):
    plain, found = getattr(digits, name), getattr(mixed, name)
    num = copies * len(plain.labels)
    np.testing.assert_array_equal(
      found.images[:num], np.tile(plain.images, (copies, 1, 1, 1))
    )
    np.testing.assert_array_equal(found.labels, np.tile(plain.labels, 2 * copies))
    hard = found.images[num:]
    assert hard.dtype == np.uint8 and hard.max() == 16
    # Fainter by 0.7 in the mean, a sixteenth hidden, a little lost at the border.
    ink = hard.mean() / plain.images.mean()
    assert 0.65 < ink < 0.8
    every = {image.tobytes() for image in found.images}
    assert len(every) == len(plain.labels) + len(hard)  # no draw came twice
  with pytest.raises(ValueError, match="choose one of digits, digits:mixed, npz"):
    config.source = "digits:hard"
    sources.load(config)


def test_hard_digits_are_moved_fainter_partly_hidden_and_noisy(monkeypatch):
  monkeypatch.setattr(digits_lib, "NOISE", 0)
  images = np.zeros((200, 8, 8, 1), np.uint8)
  images[:, 3, 4] = 16  # one pixel of ink
  hard = digits_lib.make_hard(images, np.random.RandomState(1))
  at = np.argwhere(hard)
  assert set(np.unique(at[:, 1])) == {2, 3, 4} and set(np.unique(at[:, 2])) == {
    3,
    4,
    5,
  }
  shown = hard.max((1, 2, 3))
  assert 0.85 < np.mean(shown > 0) < 1  # hidden in about 4 of 49 places
  assert shown[shown > 0].min() >= 6 and shown.max() <= 16
  monkeypatch.setattr(digits_lib, "NOISE", 0.1)
  noise = digits_lib.make_hard(np.full_like(images, 8), np.random.RandomState(1))
  assert 1 < noise.std() < 4


def test_statistics_are_those_of_the_train_pixels(digits):
  pixels = digits.train.images.astype(np.float64)
  np.testing.assert_allclose(digits.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(digits.std, pixels.std((0, 1, 2)), rtol=1e-12)


# Image i has the pixel value and the label i, so a batch says what is in it.
def counting_data(num_train):
  index = np.arange(num_train)
  return {
    "image": np.broadcast_to(index.astype(np.uint8)[:, None], (num_train, 16)),
    "label": index.astype(np.int32),
    "mean": np.zeros(1, np.float32),
    "std": np.ones(1, np.float32),
  }


def make_batch_fn(batch, seed=0, augment="none", shape=(4, 4, 1)):
  """(data, step) -> both halves of the loader batch, one after the other."""
  config = config_lib.defaults()
  config.batch = batch
  config.data.augment = augment
  config.data.pad = 1
  halves_fn = jax.jit(resident.make_halves_fn(config, shape))
  key = jax.random.key_data(jax.random.key(seed))

  def batch_fn(data, step):
    halves = halves_fn(data, key, step)
    assert [len(half["label"]) for half in halves] == [batch // 2] * 2
    return jax.tree.map(lambda *x: np.concatenate(x), *halves)

  return batch_fn


@pytest.mark.parametrize("num_train, batch", [(50, 12), (48, 12), (12, 12)])
def test_an_epoch_shows_no_image_twice(num_train, batch):
  data, batch_fn = counting_data(num_train), make_batch_fn(batch)
  steps = order.steps_per_epoch(num_train, batch)
  assert steps == num_train // batch
  epochs = []
  for epoch in range(2):
    batches = [batch_fn(data, epoch * steps + t) for t in range(steps)]
    for b in batches:
      assert b["image"].shape == (batch, 4, 4, 1)
      np.testing.assert_array_equal(b["image"][:, 0, 0, 0], b["label"])
    labels = np.concatenate([b["label"] for b in batches])
    assert len(set(labels.tolist())) == steps * batch
    epochs.append(labels)
  assert not np.array_equal(*epochs)


def test_a_batch_depends_on_the_key_and_the_step_alone():
  data = counting_data(50)
  first, again = (make_batch_fn(12, augment="shift_flip") for _ in range(2))
  other_key = make_batch_fn(12, seed=1, augment="shift_flip")
  forward = [first(data, t) for t in (0, 1, 5)]
  backward = [again(data, t) for t in (5, 1, 0)][::-1]
  jax.tree.map(np.testing.assert_array_equal, forward, backward)
  assert not np.array_equal(forward[0]["label"], forward[1]["label"])
  assert not np.array_equal(forward[0]["label"], other_key(data, 0)["label"])


def test_augmentation_differs_between_epochs_and_images(digits):
  # Four copies of one image: an epoch is a step, and only the shifts differ.
  data = resident.arrays(digits) | {
    "image": digits.train.images[[0] * 4].reshape(4, -1),
    "label": digits.train.labels[:4],
  }
  batch_fn = make_batch_fn(4, augment="shift", shape=(8, 8, 1))
  images = np.concatenate([batch_fn(data, t)["image"] for t in range(8)])
  distinct = {image.tobytes() for image in images}
  assert 5 <= len(distinct) <= 9  # nine shifts by up to one pixel
  batches = {np.sort(images[i : i + 4], axis=0).tobytes() for i in range(0, 32, 4)}
  assert len(batches) > 1


def test_a_train_split_smaller_than_a_batch_is_refused():
  with pytest.raises(ValueError, match="11 images.*batch of 12.*10 or less"):
    order.steps_per_epoch(11, 12)


def test_shift_crops_from_a_black_border():
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (9, 5, 6, 3), np.uint8)
  offsets = np.array([[y, x] for y in (0, 2, 4) for x in (0, 1, 4)])
  ours = augment.shift(jnp.asarray(images), jnp.asarray(offsets), 2)
  for image, (top, left), out in zip(images, offsets, ours, strict=True):
    for y in range(5):
      for x in range(6):
        row, column = y + top - 2, x + left - 2
        inside = 0 <= row < 5 and 0 <= column < 6
        np.testing.assert_array_equal(
          out[y, x], image[row, column] if inside else 0
        )


def test_flip_mirrors_left_and_right_where_asked():
  images = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3, 1)
  out = augment.flip(jnp.asarray(images), jnp.asarray([True, False]))
  np.testing.assert_array_equal(out[0, :, :, 0], [[2, 1, 0], [5, 4, 3]])
  np.testing.assert_array_equal(out[1], images[1])


def test_normalize_per_channel():
  images = np.array([[[[0, 100]], [[16, 200]]]], np.uint8)
  out = augment.normalize(
    jnp.asarray(images), jnp.asarray([4.0, 150.0]), jnp.asarray([2.0, 25.0])
  )
  np.testing.assert_array_equal(out[0, :, 0], [[-2, -2], [6, 2]])
  assert out.dtype == jnp.float32
