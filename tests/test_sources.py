"""Image sets from .npz files, and the calibration split held out of them."""
import numpy as np
import pytest

from l2w_jax import config as config_lib
from l2w_jax.data import sources


def data_config(source, calibration=12):
  config = config_lib.defaults()
  config.data.source = str(source)
  config.data.calibration = calibration
  return config_lib.validate(config).data


def arrays(num_train=60, num_test=15, classes=3):
  rng = np.random.default_rng(0)
  return {
      "train_images": rng.integers(0, 256, (num_train, 4, 5, 3), np.uint8),
      "train_labels": np.arange(num_train) % classes,
      "test_images": rng.integers(0, 256, (num_test, 4, 5, 3), np.uint8),
      "test_labels": np.arange(num_test) % classes}


def save(path, **changes):
  np.savez(path, **{name: x for name, x in (arrays() | changes).items()
                    if x is not None})
  return f"npz:{path}"


def test_npz_holds_calibration_out_of_train(tmp_path):
  dataset = sources.load(data_config(save(tmp_path / "x.npz")))
  whole = arrays()
  assert dataset.num_classes == 3 and dataset.image_shape == (4, 5, 3)
  assert [len(s.labels) for s in (
      dataset.train, dataset.calibration, dataset.test)] == [48, 12, 15]
  np.testing.assert_array_equal(
      np.bincount(dataset.calibration.labels), [4, 4, 4])
  both = np.concatenate([dataset.train.images, dataset.calibration.images])
  assert {x.tobytes() for x in both} == {
      x.tobytes() for x in whole["train_images"]}
  np.testing.assert_allclose(
      dataset.mean, dataset.train.images.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(
      dataset.std, dataset.train.images.std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("changes, message", [
    ({"test_labels": None}, "no array test_labels"),
    ({"train_images": np.zeros((60, 4, 5, 3))}, "must be uint8"),
    ({"test_images": np.zeros((15, 4, 5), np.uint8)}, "must be uint8"),
    ({"train_labels": np.arange(59)}, "must be 60 whole numbers"),
    ({"train_labels": np.arange(60) % 3 - 1}, "label -1 .* count from 0 to 2"),
    ({"class_names": np.array(["a", "b"])}, "label 2 .* count from 0 to 1"),
])
def test_broken_npz_is_one_clear_error(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    sources.load(data_config(save(tmp_path / "x.npz", **changes)))


def test_missing_file_unknown_source_and_too_large_calibration(tmp_path):
  with pytest.raises(ValueError, match="no file"):
    sources.load(data_config("npz:nowhere.npz"))
  with pytest.raises(ValueError, match="choose one of digits, npz:PATH, tfds"):
    sources.load(data_config("mnist:x"))
  with pytest.raises(ValueError, match="set config.data.calibration below 60"):
    sources.load(data_config(save(tmp_path / "x.npz"), calibration=60))
