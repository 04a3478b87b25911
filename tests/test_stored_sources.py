"""TFDS files and class folders: the same images however they are kept."""

import importlib.util
import json
import shutil
import struct

import numpy as np
import pytest
from conftest import ROOT

from l2w_jax import config as config_lib
from l2w_jax.data import pixels, prepare, sources, stored, tfds_files

CLASSES = 100  # what the genuine cifar100 builder insists on


def script(name):
  spec = importlib.util.spec_from_file_location(
    name, ROOT / "experiments" / f"{name}.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  return {
    "train_images": rng.integers(0, 256, (300, 32, 32, 3), np.uint8),
    "train_labels": rng.permutation(np.arange(300) % CLASSES),
    "test_images": rng.integers(0, 256, (110, 32, 32, 3), np.uint8),
    "test_labels": np.arange(110) % CLASSES,
    "class_names": np.array([f"class {i:02d}" for i in range(CLASSES)]),
  }


@pytest.fixture(scope="module")
def kept(tmp_path_factory, arrays):
  """{kind: (source, data_dir)} of the same images, kept in four ways."""
  root = tmp_path_factory.mktemp("sources")
  write = script("write_sources")
  names = list(map(str, arrays["class_names"]))
  np.savez(root / "x.npz", **arrays)
  write.write_folder(arrays, root / "folder", names)
  features = ("image", "label", "coarse_label", "id")
  write.write_tfds(
    "cifar100",
    root / "array_record",
    "array_record",
    {split: write.examples(arrays, split, features) for split in ("train", "test")},
    names,
  )
  as_tfrecord(root / "array_record", root / "tfrecord")
  return {
    "npz": (f"npz:{root}/x.npz", ""),
    "folder": (f"folder:{root}/folder", ""),
    **{
      kind: ("tfds:cifar100", str(root / kind))
      for kind in ("array_record", "tfrecord")
    },
  }


def as_tfrecord(path, out):
  """A prepared cifar100 in the other format, which TFDS writes with TF only."""
  from array_record.python import array_record_data_source

  shutil.copytree(path, out)
  (folder,) = (out / "cifar100").iterdir()
  for file in folder.glob("*array_record*"):
    with file.with_name(file.name.replace("array_", "tf")).open("wb") as frames:
      source = array_record_data_source.ArrayRecordDataSource([str(file)])
      for i in range(len(source)):
        frames.write(struct.pack("<QI", len(source[i]), 0) + source[i] + bytes(4))
    file.unlink()
  info = folder / "dataset_info.json"
  values = json.loads(info.read_text())
  values["fileFormat"] = "tfrecord"
  info.write_text(json.dumps(values))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "l2w_jax"


def data_config(source, data_dir="", **changes):
  config = config_lib.defaults()
  config.data.update(
    {"source": source, "data_dir": data_dir, "calibration": 100} | changes
  )
  return config_lib.validate(config).data


def same(ours, theirs):
  assert ours.class_names == theirs.class_names
  for name in ("train", "calibration", "test"):
    a, b = getattr(ours, name), getattr(theirs, name)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.images[:], b.images[:])
  np.testing.assert_array_equal(ours.mean, theirs.mean)
  np.testing.assert_array_equal(ours.std, theirs.std)


@pytest.mark.parametrize("feed", ["resident", "streaming"])
@pytest.mark.parametrize("kind", ["npz", "folder", "array_record", "tfrecord"])
def test_every_source_and_feed_gives_the_same_set(kept, arrays, kind, feed):
  reference = sources.load(data_config(*kept["npz"]))
  assert {
    image.tobytes(): label
    for split in (reference.train, reference.calibration)
    for image, label in zip(*split, strict=True)
  } == {
    image.tobytes(): label
    for image, label in zip(
      arrays["train_images"], arrays["train_labels"], strict=True
    )
  }
  dataset = sources.load(data_config(*kept[kind], feed=feed))
  lazy = isinstance(dataset.train.images, sources.LazyImages)
  assert lazy == (feed == "streaming")
  assert dataset.image_shape == (32, 32, 3) and dataset.num_classes == CLASSES
  same(dataset, reference)


def test_the_feed_is_chosen_by_size_and_augmentation(kept, monkeypatch):
  def streams(**changes):
    config = data_config(*kept["folder"], **changes)
    return isinstance(sources.load(config).train.images, sources.LazyImages)

  assert not streams()
  assert streams(augment="crop_flip", image_size=16)
  monkeypatch.setattr(sources, "LIMIT", 300 * 32 * 32 * 3 - 1)
  assert streams() and not streams(feed="resident")
  assert not streams(image_size=16)
  with pytest.raises(ValueError, match="crop_flip cuts whole images"):
    streams(augment="crop_flip", image_size=16, feed="resident")
  with pytest.raises(ValueError, match="set config.data.image_size, such as 224"):
    streams(augment="crop_flip")


def test_streaming_without_grain_says_what_to_install(kept, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r'pip install "l2w_jax\[streaming\]"'):
    sources.load(data_config(*kept["npz"], feed="streaming"))


def test_a_set_that_streams_is_read_through_once(kept, cache, monkeypatch):
  config = data_config(
    *kept["tfrecord"], feed="streaming", mean=(1.0,) * 3, std=(1.0,) * 3
  )
  before = sources.load(config)
  assert len(list(cache.glob("index-*.npz"))) == 2
  assert len(list(cache.glob("frames-*.npz"))) == 2
  with monkeypatch.context() as patch:
    patch.setattr(stored, "in_threads", None)
    same(sources.load(config), before)
  for path in cache.iterdir():  # damaged files of the cache are made again
    path.write_bytes(path.read_bytes()[:100])
  same(sources.load(config), before)


@pytest.fixture
def broken(kept, tmp_path):
  """A folder with two unreadable train images and one of test."""
  root = shutil.copytree(kept["folder"][0].partition(":")[2], tmp_path / "set")
  paths = sorted((root / "train").rglob("*.png"))[3:8:4]
  paths[0].write_bytes(b"not an image")
  paths[1].write_bytes(paths[1].read_bytes()[:500])
  (test,) = (root / "test/class 00").glob("00000.png")
  test.write_bytes(b"")
  return root, [*map(str, paths), str(test)]


@pytest.mark.parametrize("feed", ["resident", "streaming"])
def test_corrupt_images_are_named_and_counted(broken, feed, caplog):
  root, paths = broken
  with pytest.raises(ValueError, match="2 of 300 images") as error:
    sources.load(data_config(f"folder:{root}", feed=feed))
  for path in paths[:2]:
    assert path in str(error.value)
  assert "corrupt=skip" in str(error.value) and "\n" not in str(error.value)
  dataset = sources.load(data_config(f"folder:{root}", feed=feed, corrupt="skip"))
  assert [
    len(split.labels)
    for split in (dataset.train, dataset.calibration, dataset.test)
  ] == [198, 100, 109]
  same(dataset, sources.load(data_config(f"folder:{root}", corrupt="skip")))
  said = [
    record.getMessage()
    for record in caplog.records
    if record.levelname == "WARNING"
  ]
  assert len(said) == 4  # the reference skips, too
  assert "1 of 110 images" in said[1] and paths[2] in said[1]
  # Repaired files are seen, whatever is remembered.
  for path in paths:
    shutil.copy(
      root / "train/class 01" / next((root / "train/class 01").iterdir()).name, path
    )
  repaired = sources.load(data_config(f"folder:{root}", feed=feed))
  assert len(repaired.train.labels) == 200


def test_a_corrupt_record_is_named_by_file_and_number(kept, tmp_path):
  root = shutil.copytree(kept["tfrecord"][1], tmp_path / "set")
  (path,) = root.glob("*/*/*-train*")
  offset, length = tfds_files.tfrecord_frames(path)[7]
  contents = bytearray(path.read_bytes())
  contents[offset : offset + length] = bytes(length)
  path.write_bytes(contents)
  with pytest.raises(ValueError, match=f"1 of 300 .*{path} record 7 "):
    sources.load(data_config("tfds:cifar100", str(root)))


def test_records_are_counted_within_their_files():
  records = object.__new__(tfds_files.TfdsRecords)
  records.files, records._ends = ["a", "b"], np.cumsum([3, 2])
  assert [records.where(i) for i in range(5)] == [
    "a record 0",
    "a record 1",
    "a record 2",
    "b record 0",
    "b record 1",
  ]


def test_images_of_several_sizes_need_a_size(kept, tmp_path):
  root = shutil.copytree(kept["folder"][0].partition(":")[2], tmp_path / "set")
  from PIL import Image

  path = root / "train/class 00/wide.JPEG"
  Image.new("L", (60, 40), 9).save(path)
  for feed in ("resident", "streaming"):
    with pytest.raises(
      ValueError, match="differ in size: .*60×40 pixels in .*image_size"
    ):
      sources.load(data_config(f"folder:{root}", feed=feed))
  ours, theirs = (
    sources.load(data_config(f"folder:{root}", feed=feed, image_size=16))
    for feed in ("resident", "streaming")
  )
  same(ours, theirs)
  assert ours.image_shape == (16, 16, 3) and len(ours.train.labels) == 201


def test_what_is_wrong_with_a_folder(tmp_path):
  def says(message):
    with pytest.raises(ValueError, match=message):
      sources.load(data_config(f"folder:{tmp_path}"))

  says("no directory .*train for .*CLASS")
  (tmp_path / "train").mkdir()
  says("no class directories")
  (tmp_path / "train/cat").mkdir()
  says("neither a test nor a val")
  (tmp_path / "val").mkdir()
  says("cat has no image")
  (tmp_path / "train/cat/a.png").write_bytes(b"")
  says("val has no images")
  (tmp_path / "val/dog").mkdir()
  says("a class 'dog' that .*train has not")


def test_what_is_wrong_with_a_tfds_set(kept, tmp_path):
  def says(message, name="cifar100", data_dir=tmp_path):
    with pytest.raises(ValueError, match=message) as error:
      sources.load(data_config(f"tfds:{name}", str(data_dir)))
    assert "\n" not in str(error.value)

  says("not prepared in .*l2w_jax.data.prepare cifar100 --data_dir=")
  says("no directory .*prepare cifar100", data_dir=tmp_path / "none")
  says("has no set 'cifar101'", name="cifar101")
  for kind, old, new, message in [
    (
      "array_record",
      '"fileFormat": "array_record"',
      '"fileFormat": "parquet"',
      "in the format parquet; only array_record and tfrecord",
    ),
    ("array_record", '"300"', '"301"', "hold 300 records, but .* says 301"),
    ("tfrecord", '"300"', '"299"', "hold 300 records, but .* says 299"),
  ]:
    root = shutil.copytree(kept[kind][1], tmp_path / f"{kind} {new}"[:20])
    (info,) = root.glob("*/*/dataset_info.json")
    assert old in info.read_text()
    info.write_text(info.read_text().replace(old, new))
    says(message, data_dir=root)
  root = shutil.copytree(kept["tfrecord"][1], tmp_path / "cut")
  (path,) = root.glob("*/*/*-train*")
  path.write_bytes(path.read_bytes()[:-9])
  says("is cut off or no tfrecord: record 299", data_dir=root)
  path.unlink()
  says("is missing from a prepared set", data_dir=root)


def test_preparing_is_left_to_the_builder_and_done_once(
  kept, monkeypatch, tmp_path, capsys
):
  assert prepare.prepare("cifar100", kept["array_record"][1], "", "tfrecord") == (
    str(next((tmp_path.__class__(kept["array_record"][1]) / "cifar100").iterdir()))
  )
  import tensorflow_datasets as tfds

  asked = []

  def offline(self, **kwargs):
    asked.append(kwargs["file_format"])
    raise ConnectionError("no network\nat all")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
  monkeypatch.setattr(
    "sys.argv", ["prepare", "cifar10", "--data_dir", str(tmp_path / "new")]
  )
  with pytest.raises(SystemExit) as leave:
    prepare.main()
  assert leave.value.code == 2 and asked == ["array_record"]
  (line,) = capsys.readouterr().err.splitlines()
  assert "ConnectionError: no network at all" in line
  # Reading never prepares.
  with pytest.raises(ValueError, match="not prepared"):
    sources.load(data_config("tfds:cifar10", str(tmp_path / "new")))
  assert asked == ["array_record"]


def test_reading_needs_no_tensorflow(kept):
  import sys

  sources.load(data_config(*kept["tfrecord"]))
  assert "tensorflow" not in sys.modules


def test_reading_through_shows_progress(kept, capsys):
  sources.load(data_config(*kept["array_record"]))
  assert "read cifar100 train: image 300/300 (100 %)" in capsys.readouterr().err


def test_grey_files_have_one_channel_where_the_set_says_so():
  class Grey:
    title, channels, files = "grey", 1, []

    def __len__(self):
      return 2

    def read(self, i):
      import io

      from PIL import Image

      file = io.BytesIO()
      Image.new("L", (4, 4), 50 * i).save(file, "PNG")
      return file.getvalue(), i

    def where(self, i):
      return str(i)

  index, images = stored.read_all(Grey(), 0, "fail")
  assert images.shape == (2, 4, 4, 1) and images[1].max() == 50
  assert pixels.to_array(images[0]).shape == (4, 4, 1)
  np.testing.assert_array_equal(index.labels, [0, 1])
