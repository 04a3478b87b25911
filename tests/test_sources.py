"""Image sets from .npz files, and the calibration split held out of them."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from l2w_jax import config as config_lib
from l2w_jax.data import augment, names, sources
from l2w_jax.run import files


def data_config(source, calibration=12, **changes):
  config = config_lib.defaults()
  config.data.update({"source": str(source), "calibration": calibration} | changes)
  if not calibration:
    config.evaluate.calibration = "released"
  return config_lib.validate(config).data


def arrays(num_train=60, num_test=15, classes=3):
  rng = np.random.default_rng(0)
  return {
    "train_images": rng.integers(0, 256, (num_train, 4, 5, 3), np.uint8),
    "train_labels": np.arange(num_train) % classes,
    "test_images": rng.integers(0, 256, (num_test, 4, 5, 3), np.uint8),
    "test_labels": np.arange(num_test) % classes,
  }


def save(path, **changes):
  np.savez(
    path, **{name: x for name, x in (arrays() | changes).items() if x is not None}
  )
  return f"npz:{path}"


def test_npz_holds_calibration_out_of_train(tmp_path):
  dataset = sources.load(data_config(save(tmp_path / "x.npz")))
  whole = arrays()
  assert dataset.num_classes == 3 and dataset.image_shape == (4, 5, 3)
  assert [
    len(s.labels) for s in (dataset.train, dataset.calibration, dataset.test)
  ] == [48, 12, 15]
  np.testing.assert_array_equal(np.bincount(dataset.calibration.labels), [4, 4, 4])
  both = np.concatenate([dataset.train.images, dataset.calibration.images])
  assert {x.tobytes() for x in both} == {x.tobytes() for x in whole["train_images"]}
  np.testing.assert_allclose(
    dataset.mean, dataset.train.images.mean((0, 1, 2)), rtol=1e-12
  )
  np.testing.assert_allclose(
    dataset.std, dataset.train.images.std((0, 1, 2)), rtol=1e-12
  )


def test_npz_may_bring_its_calibration_split(tmp_path):
  images = np.full((7, 4, 5, 3), 9, np.uint8)
  own = {"calibration_images": images, "calibration_labels": np.arange(7) % 3}
  dataset = sources.load(data_config(save(tmp_path / "x.npz", **own)))
  assert len(dataset.train.labels) == 60
  np.testing.assert_array_equal(dataset.calibration.images[:], images)
  np.testing.assert_array_equal(
    np.sort(dataset.calibration.labels), np.sort(own["calibration_labels"])
  )
  with pytest.raises(ValueError, match="calibration_labels"):
    sources.load(data_config(save(tmp_path / "y.npz", calibration_images=images)))
  own["calibration_images"] = images[:, :3]
  with pytest.raises(ValueError, match=r"calibration images \(3, 5, 3\)"):
    sources.load(data_config(save(tmp_path / "z.npz", **own)))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"test_labels": None}, "no array test_labels"),
    ({"train_images": np.zeros((60, 4, 5, 3))}, "must be uint8"),
    ({"test_images": np.zeros((15, 4, 5), np.uint8)}, "must be uint8"),
    ({"train_labels": np.arange(59)}, "must be 60 whole numbers"),
    ({"train_labels": np.arange(60) % 3 - 1}, "label -1 .* count from 0 to 2"),
    ({"class_names": np.array(["a", "b"])}, "label 2 .* count from 0 to 1"),
    (
      {"class_names": np.array([*"abcd"])},
      "1 of the 4 classes .*class 3 .'d'.*name",
    ),
    ({"class_names": np.array([*"abb"])}, "classes 1 and 2 in .* same name, 'b'"),
    ({"class_names": np.array(["a", " ", "c"])}, "name of class 1 in .* is empty"),
    (
      {"class_names": np.array([["a", "b"], ["c", "d"]])},
      r"a row of names.*\[2, 2\]",
    ),
    ({"train_labels": np.arange(60) % 3 + 2**32}, "hold 4294967296 to 4294967298"),
    ({"test_labels": np.arange(15).astype(np.uint64) + 2**63}, "labels count the"),
    ({"train_labels": np.arange(60) % 3 + 1}, "have no .*count from 1, subtract 1"),
    (
      {"train_labels": np.arange(60) % 3 + 1, "class_names": np.array([*"abc"])},
      "label 3 .* count from 0 to 2 here: subtract 1",
    ),
    (
      {"train_labels": np.arange(60) % 3 * 7},
      "12 of the 15 classes .*without gaps",
    ),
    ({"train_labels": np.arange(60) % 3 * 10**9}, "up to 2000000000.*without gaps"),
    ({"test_labels": np.arange(15) % 4}, "1 of the 4 classes .* no train image"),
    (
      {
        "train_images": np.zeros((300, 4, 5, 3), np.uint8),
        "train_labels": np.where(np.arange(300) % 4 < 3, np.arange(300) % 4, 255),
      },
      "252 of the 256 .*if label 255 marks images to ignore, leave these out",
    ),
    ({"train_images": np.zeros((60, 3, 8, 9), np.uint8)}, "transpose.0, 2, 3, 1."),
    ({"train_images": np.zeros((60, 1, 8, 8), np.uint8)}, "channels come last"),
    ({"train_images": np.zeros((60, 13, 64, 64), np.uint8)}, "channels come last"),
  ],
)
def test_broken_npz_is_one_clear_error(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    sources.load(data_config(save(tmp_path / "x.npz", **changes)))


@pytest.mark.parametrize(
  "given",
  [
    np.array(["caf\u00e9", "$5", "\u732b"]),
    np.array(["cafe\u0301", "$5", "\u732b"]),
    np.array([["caf\u00e9"], ["$5"], ["\u732b"]]),
    np.array([name.encode() for name in ("caf\u00e9", "$5", "\u732b")]),
  ],
)
def test_class_names_are_text_however_they_are_kept(tmp_path, given):
  dataset = sources.load(data_config(save(tmp_path / "x.npz", class_names=given)))
  assert dataset.class_names == ("caf\u00e9", "$5", "\u732b")


def test_what_is_no_text_in_a_name_is_escaped():
  assert names.readable(b"caf\xe9") == "caf\\xe9"
  assert names.readable("caf\udce9\n") == "caf\\udce9\\n"


def test_images_of_one_colour_are_named(tmp_path, caplog):
  source = save(
    tmp_path / "x.npz", train_images=np.full((60, 4, 5, 3), 7, np.uint8)
  )
  dataset = sources.load(data_config(source))
  np.testing.assert_array_equal(dataset.std, 1)
  assert "channel 0 and 1 and 2 of the train images" in caplog.text


@pytest.mark.parametrize("feed", ["resident", "streaming"])
def test_a_constant_channel_is_named_and_never_divides_by_0(tmp_path, feed, caplog):
  images = arrays()["train_images"]
  images[..., 1] = 255
  source = save(tmp_path / "x.npz", train_images=images)
  dataset = sources.load(data_config(source, feed=feed))
  assert dataset.std[1] == 1 and dataset.mean[1] == 255
  assert dataset.std[0] == pytest.approx(dataset.train.images[:][..., 0].std())
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith("channel 1 of the train images") and ", 255; " in said
  normal = augment.normalize(
    *map(jnp.array, (dataset.train.images[:], dataset.mean, dataset.std))
  )
  assert not np.asarray(normal[..., 1]).any() and np.isfinite(normal).all()


def test_of_many_constant_channels_five_are_named(tmp_path, caplog):
  images = {
    f"{name}_images": np.full((count, 9, 9, 8), 7, np.uint8)
    for name, count in (("train", 60), ("test", 15))
  }
  sources.load(data_config(save(tmp_path / "x.npz", **images)))
  assert "channel 0 and 1 and 2 and 3 and 4 and 3 more of the" in caplog.text


def test_missing_file_unknown_source_and_too_large_calibration(tmp_path):
  with pytest.raises(ValueError, match="no file"):
    sources.load(data_config("npz:nowhere.npz"))
  with pytest.raises(ValueError, match="one of digits, digits:mixed, npz:PATH"):
    sources.load(data_config("mnist:x"))
  with pytest.raises(ValueError, match="set config.data.calibration below 60"):
    sources.load(data_config(save(tmp_path / "x.npz"), calibration=60))


def test_a_single_class_is_refused(tmp_path):
  labels = {name: np.zeros(n, int) for name, n in (("train", 60), ("test", 15))}
  source = save(tmp_path / "x.npz", **{f"{k}_labels": v for k, v in labels.items()})
  with pytest.raises(ValueError, match="x.npz has one class, '0'; it takes two"):
    sources.load(data_config(source))


def test_home_is_where_a_tilde_says(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  save(tmp_path / "x.npz")
  assert sources.load(data_config("npz:~/x.npz")).num_classes == 3
  assert files.path("~/run") == tmp_path / "run"
  for name in ("run~", "~nobody-of-this-name/run"):
    assert files.path(name) == pathlib.Path(name)


def test_an_npz_that_cannot_be_read(tmp_path):
  path = tmp_path / "x.npz"
  path.write_bytes(b"PK no zip")
  with pytest.raises(ValueError, match="x.npz is not an .npz file"):
    sources.load(data_config(f"npz:{path}"))
  np.save(tmp_path / "y.npy", np.zeros(3))
  with pytest.raises(ValueError, match="y.npy is not an .npz file"):
    sources.load(data_config(f"npz:{tmp_path}/y.npy"))
  source = save(path, train_labels=np.array([{}] * 60))
  with pytest.raises(ValueError, match="array train_labels .* cannot be read"):
    sources.load(data_config(source))
  source = save(path)
  contents = bytearray(path.read_bytes())
  contents[200:400] = bytes(200)
  path.write_bytes(contents)
  with pytest.raises(ValueError, match="array train_images .* cannot be read"):
    sources.load(data_config(source))


def test_samples_are_in_the_order_of_their_pixels(tmp_path):
  whole = arrays()
  shuffled = np.random.default_rng(1).permutation(60)
  ours, theirs = (
    sources.load(data_config(save(tmp_path / "x.npz", **changes)))
    for changes in (
      {},
      {name: whole[name][shuffled] for name in ("train_images", "train_labels")},
    )
  )
  for a, b in zip(
    ours.train + ours.calibration, theirs.train + theirs.calibration, strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_tail_and_noise_change_the_train_split_alone(tmp_path):
  source = save(tmp_path / "x.npz")
  plain = sources.load(data_config(source))
  changed, again, other = (
    sources.load(data_config(source, imbalance=4, label_noise=0.25, seed=seed))
    for seed in (0, 0, 1)
  )
  # 16 images of each class are left to train on; 16 + 8 + 4 with factor 4.
  assert len(changed.train.labels) == 28
  known = {
    image.tobytes(): label for image, label in zip(*plain.train, strict=True)
  }
  true = np.array([known[image.tobytes()] for image in changed.train.images])
  np.testing.assert_array_equal(np.bincount(true), [16, 8, 4])
  assert (true != changed.train.labels).sum() == 7
  for name in ("calibration", "test"):
    for a, b in zip(getattr(plain, name), getattr(changed, name), strict=True):
      np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(changed.train.labels, again.train.labels)
  noisy, other_noise = (
    sources.load(data_config("digits", label_noise=0.25, seed=seed)).train.labels
    for seed in (0, 1)
  )
  assert not np.array_equal(noisy, other_noise)
  assert {x.tobytes() for x in other.calibration.images} != {
    x.tobytes() for x in changed.calibration.images
  }


def test_everything_can_be_trained_on(tmp_path):
  dataset = sources.load(data_config(save(tmp_path / "x.npz"), calibration=0))
  assert len(dataset.train.labels) == 60
  assert dataset.calibration.images.shape == (0, 4, 5, 3)


def test_digits_keep_their_calibration_split():
  for count in (0, 100, 5000):
    digits = sources.load(data_config("digits", calibration=count))
    assert (len(digits.train.labels), len(digits.calibration.labels)) == (1077, 360)


def test_synthetic_images_are_of_the_shape_asked_for():
  dataset = sources.load(data_config("synthetic:6x5x3", calibration=100))
  assert dataset.image_shape == (6, 5, 3) and dataset.num_classes == 100
  assert len(dataset.train.labels) == 20_000 - 100
  assert len(dataset.test.labels) == 2000
  again = sources.load(data_config("synthetic:6x5x3", calibration=100))
  np.testing.assert_array_equal(dataset.test.images, again.test.images)
  for shape in ("6x5", "0x5x3", "axbxc"):
    with pytest.raises(ValueError, match="HEIGHTxWIDTHxCHANNELS"):
      sources.load(data_config(f"synthetic:{shape}"))


def test_pixel_statistics_can_be_given(tmp_path):
  source = save(tmp_path / "x.npz")
  dataset = sources.load(data_config(source, mean=(1, 2, 3), std=(4, 5, 6)))
  assert dataset.mean.tolist() == [1, 2, 3] and dataset.std.tolist() == [4, 5, 6]
  with pytest.raises(ValueError, match="need 3 number.*got \\(1,\\)"):
    sources.load(data_config(source, mean=(1,), std=(4,)))


def test_large_sets_give_statistics_of_every_s_th_image(tmp_path, monkeypatch):
  config = data_config(save(tmp_path / "x.npz"), feed="resident")
  monkeypatch.setattr(sources, "LIMIT", 48 * 60 // 3)
  dataset = sources.load(config)
  np.testing.assert_allclose(
    dataset.mean, dataset.train.images[::3].mean((0, 1, 2)), rtol=1e-12
  )


def test_train_and_test_images_of_two_sizes(tmp_path):
  source = save(tmp_path / "x.npz", test_images=np.zeros((15, 6, 6, 3), np.uint8))
  with pytest.raises(ValueError, match=r"\(4, 5, 3\).*\(6, 6, 3\).*image_size"):
    sources.load(data_config(source))
  assert sources.load(data_config(source, image_size=4)).image_shape == (4, 4, 3)
