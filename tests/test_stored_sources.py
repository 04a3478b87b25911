"""TFDS files and class folders: the same images however they are kept."""

import importlib.util
import json
import os
import pathlib
import shutil
import struct
import subprocess
import types

import numpy as np
import pytest
from conftest import ROOT

from l2w_jax import config as config_lib
from l2w_jax.data import folder, pixels, prepare, sources, stored, tfds_files

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
  config.evaluate.calibration = "released"
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
def shades(tmp_path):
  """Writes small images of one grey into a folder; reads {class: greys}."""
  from PIL import Image

  class Shades:
    root = tmp_path / "shades"

    def put(self, folder, value, n=4):
      (self.root / folder).mkdir(parents=True)
      for i in range(n):
        image = Image.new("RGB", (16, 16), (value, i, 9))
        image.save(self.root / folder / f"{i}.bmp")

    def load(self, where=".", **changes):
      changes = {"calibration": 4, "feed": "streaming"} | changes
      return sources.load(data_config(f"folder:{self.root / where}", **changes))

    def read(self, where=".", split="test", **changes):
      dataset = self.load(where, **changes)
      images, labels = getattr(dataset, split)
      found = {}
      for image, label in zip(images[:], labels, strict=True):
        found.setdefault(dataset.class_names[label], set()).add(int(image[0, 0, 0]))
      return found

  return Shades()


def test_labels_are_those_of_the_folders_as_they_are_now(shades):
  for split in ("train", "test"):
    shades.put(f"{split}/cat", 100)
    shades.put(f"{split}/dog", 200)
  assert shades.read() == {"cat": {100}, "dog": {200}}
  shades.put("train/bird", 50)
  assert shades.read() == {"cat": {100}, "dog": {200}}
  for split in ("train", "test"):  # the names of two classes are exchanged
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
      (shades.root / split / old).rename(shades.root / split / new)
  assert shades.read() == {"cat": {200}, "dog": {100}}
  assert shades.read(split="train")["dog"] == {100}


def test_groupings_of_the_same_files_by_links(shades):
  for name, value in (("cat", 100), ("dog", 150), ("oak", 200)):
    shades.put(f"pool/{name}", value, 6)

  def view(name, groups):
    for split in ("train", "test"):
      for group, members in groups.items():
        folder = shades.root / name / split / group
        folder.mkdir(parents=True)
        for member in members:
          for file in (shades.root / "pool" / member).iterdir():
            (folder / f"{member}{file.name}").symlink_to(file)
    return shades.read(name)

  coarse = {"animal": ["cat", "dog"], "plant": ["oak"]}
  assert view("x", coarse) == {"animal": {100, 150}, "plant": {200}}
  shutil.rmtree(shades.root / "x")
  fine = {"cat": ["cat"], "dog": ["dog"], "oak": ["oak"]}
  assert view("x", fine) == {"cat": {100}, "dog": {150}, "oak": {200}}


def test_a_file_is_read_again_once_it_changed_or_could_not_be_read(
  shades, monkeypatch
):
  for split in ("train", "test"):
    shades.put(f"{split}/a", 10)
    shades.put(f"{split}/b", 20)
  refused, read = shades.root / "train/a/0.bmp", []
  genuine = folder.FolderRecords.read

  def reading(records, i):
    read.append(records.files[i])
    if records.files[i] == refused:
      raise PermissionError(13, "Permission denied", str(refused))
    return genuine(records, i)

  monkeypatch.setattr(folder.FolderRecords, "read", reading)
  with pytest.raises(ValueError, match=r"0\.bmp \(permission denied\); repair"):
    shades.load()
  assert (
    len(shades.load(corrupt="skip", mean=(1.0,) * 3, std=(1.0,) * 3).train[1]) == 3
  )
  refused = None
  read.clear()
  fixed = dict(mean=(1.0,) * 3, std=(1.0,) * 3)
  assert len(shades.load(**fixed).train.labels) == 4  # and 4 are held out
  assert [path.name for path in read] == ["0.bmp"]
  # Another file of the same size and time in its place is seen.
  one, other = (shades.root / "test" / name / "0.bmp" for name in "ab")
  os.utime(one, ns=(1, 1)), os.utime(other, ns=(1, 1))
  shades.load(**fixed)
  os.replace(other, shades.root / "kept")
  os.replace(one, other)
  os.replace(shades.root / "kept", one)
  read.clear()
  shades.load(**fixed)
  assert {str(path.relative_to(shades.root)) for path in read} == {
    "test/a/0.bmp",
    "test/b/0.bmp",
  }


@pytest.mark.parametrize("feed", ["resident", "streaming"])
def test_links_to_nowhere_are_named_or_left_out(shades, feed):
  for split in ("train", "test"):
    shades.put(f"{split}/a", 10)
    shades.put(f"{split}/b", 20)
  (shades.root / "train/a/gone.png").symlink_to("/nowhere/gone.png")
  loop = shades.root / "train/a/loop.png"
  loop.symlink_to(loop)
  with pytest.raises(
    ValueError, match=r"gone\.png \(is a link to /nowhere/gone\.png, which is not"
  ):
    shades.load(feed=feed)
  assert len(shades.load(feed=feed, corrupt="skip").train.labels) == 4


def test_a_file_that_goes_away_in_training_is_named(shades):
  for split in ("train", "test"):
    shades.put(f"{split}/a", 10)
    shades.put(f"{split}/b", 20)
  dataset = shades.load()
  for file in shades.root.rglob("*.bmp"):
    file.unlink()
  with pytest.raises(ValueError, match=r"\.bmp cannot be read any more \(no such"):
    dataset.train.images[:1]


def test_what_is_remembered_may_be_damaged_or_have_no_place(
  shades, cache, monkeypatch, caplog
):
  for split in ("train", "test"):
    shades.put(f"{split}/a", 10)
    shades.put(f"{split}/b", 20)
  want = shades.read()
  paths = list(cache.glob("index-*.npz"))
  assert len(paths) == 2

  def other(path):
    np.savez(path, keys=np.zeros(3, np.uint64))

  def short(path):
    with np.load(path) as arrays:
      arrays = dict(arrays)
    np.savez(path, **arrays | {"digests": arrays["digests"][1:]})

  def text(path):
    with np.load(path) as arrays:
      arrays = dict(arrays)
    np.savez(path, **arrays | {"labels": arrays["labels"].astype(str)})

  for damage in (
    lambda path: path.write_bytes(path.read_bytes()[:200]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\x93NUMPY"),
    other,
    short,
    text,
  ):
    for path in paths:
      damage(path)
    assert shades.read() == want
    with np.load(paths[0]) as arrays:
      assert len(arrays["keys"]) == 8
  shutil.rmtree(cache)
  cache.write_bytes(b"")  # a file where a folder should be
  assert shades.read() == want
  said = [record.getMessage() for record in caplog.records]
  assert sum("is not remembered" in line for line in said) == 2
  assert not any("index-" in line for line in said)


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


@pytest.fixture
def put(tmp_path):
  """Writes small PNGs under a new folder, and returns its source."""
  from PIL import Image

  def put(*names):
    for i, name in enumerate(names):
      path = tmp_path / "set" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      color = (i, 0, 255) if i % 2 else (255, i, 0)
      Image.new("RGB", (8, 8), color).resize((9, 8)).save(path)
    return f"folder:{tmp_path}/set"

  return put


SMALL = ("train/a/0.png", "train/b/0.png")


def open_folder(source):
  return folder.open_folder(source.partition(":")[2])


def test_images_of_every_suffix_and_depth_are_read_and_others_named(put, caplog):
  nested = [f"{split}/a/deep/er/{x}" for split in ("train", "test") for x in "01"]
  source = put(
    *SMALL,
    *(f"train/b/x{suffix}" for suffix in folder.SUFFIXES if suffix != ".pfm"),
    *(f"{name}.JPEG" for name in nested),
  )
  root = pathlib.Path(source.partition(":")[2])
  (root / "train/a/.hidden.png").write_bytes(b"")
  (root / "train/a/notes.txt").write_bytes(b"")
  (root / "train/lost.png").write_bytes(b"")
  train, test, names = open_folder(source)
  assert names == ("a", "b")
  assert len(train) == len(SMALL) + len(folder.SUFFIXES) - 1 + 2 and len(test) == 2
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith("2 files beside the images are left out, such as ")
  assert ".txt 1" in said and ".png 1" in said


@pytest.mark.parametrize(
  "flat", ["test/0.png", "test/unknown/0.png", "test/images/0.png"]
)
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_labelled_val_beside_an_unlabelled_test_is_used(put, caplog, flat, val):
  source = put(*SMALL, flat, f"{val}/a/0.png", f"{val}/b/0.png")
  assert open_folder(source)[1].title.endswith(f"/{val}")
  (said,) = [record.getMessage() for record in caplog.records]
  assert f"/{val} is the test split; " in said and "/test is not looked at" in said
  put("test/a/0.png")
  if flat == "test/0.png":
    assert open_folder(source)[1].title.endswith("/test")
  else:
    with pytest.raises(ValueError, match="has a class '(unknown|images)' that"):
      open_folder(source)


def test_tiny_imagenet_as_downloaded_says_how_to_sort_val(put, tmp_path):
  source = put("train/n1/images/0.png", "train/n2/images/0.png")
  put("val/images/v0.png", "val/images/v1.png", "test/images/0.png")
  labels = "v0.png\tn1\t0\t0\nv1.png\tn2\t0\t0\n"
  (tmp_path / "set/val/val_annotations.txt").write_text(labels)
  with pytest.raises(ValueError, match="labels in val_annotations.txt") as error:
    open_folder(source)
  subprocess.run(
    str(error.value).partition("such as by: ")[2], shell=True, check=True
  )
  train, test, names = open_folder(source)
  assert len(train) == len(test) == len(names) == 2 and test.title.endswith("val")


def test_12_bits_in_16_are_noticed_and_use_the_range_they_are_given(
  put, tmp_path, caplog
):
  from PIL import Image

  source = put(*SMALL, "test/a/0.png")
  for i, path in enumerate(sorted((tmp_path / "set").rglob("*.png"))):
    Image.fromarray(np.array([[0, 4095 - i]], np.uint16)).save(path)

  def brightest(**changes):
    dataset = sources.load(data_config(source, calibration=0, **changes))
    return dataset.train.images[:].max()

  assert brightest() == 16
  (said,) = [record.getMessage() for record in caplog.records]
  assert "is brighter than 16 of 255" in said and "config.data.grey_range" in said
  for feed in ("resident", "streaming"):
    assert brightest(feed=feed, grey_range=4095) == 255
  assert len(caplog.records) == 1


@pytest.mark.parametrize("feed", ["resident", "streaming"])
def test_what_is_no_regular_file_is_named_and_not_opened(put, tmp_path, feed):
  source = put(*SMALL, "test/a/0.png")
  made = [tmp_path / "set/train/a" / f"{i}.jpg" for i in range(1, 4)]
  os.mkfifo(made[0])
  made[1].symlink_to("/dev/zero")
  made[2].symlink_to(made[0])
  with pytest.raises(ValueError, match="3 of 5 images .*is no regular file"):
    sources.load(data_config(source, calibration=2, feed=feed))


def test_links_in_a_circle_are_refused_and_others_followed(put, tmp_path):
  source = put(*SMALL, "test/a/0.png", "more/1.png")
  root = tmp_path / "set"
  (root / "train/a/more").symlink_to(root / "more")
  assert len(open_folder(source)[0]) == 3
  (root / "more/back").symlink_to(root / "train")
  with pytest.raises(ValueError, match="more/back is a link to a directory around"):
    open_folder(source)


def test_a_class_is_the_same_in_composed_and_decomposed_letters(put):
  source = put("train/caf\u00e9/0.png", "train/b/0.png", "test/cafe\u0301/0.png")
  train, test, names = open_folder(source)
  assert names == ("b", "caf\u00e9") and test.read(0)[1] == 1
  put("train/cafe\u0301/0.png")
  with pytest.raises(ValueError, match="whose names look alike"):
    open_folder(source)


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


def test_another_version_of_a_tfds_set_is_named_and_read(kept, tmp_path):
  root = shutil.copytree(kept["array_record"][1], tmp_path / "older")
  (folder,) = (root / "cifar100").iterdir()
  older = folder.rename(folder.with_name("3.0.1"))
  info = older / "dataset_info.json"
  info.write_text(info.read_text().replace(folder.name, "3.0.1"))
  with pytest.raises(
    ValueError, match="another version is: .*=(tfds:.*)$"
  ) as error:
    sources.load(data_config("tfds:cifar100", str(root)))
  source = str(error.value).partition("config.data.source=")[2]
  same(
    sources.load(data_config(source, str(root))),
    sources.load(data_config(*kept["array_record"])),
  )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pixels_of_a_tfds_set_are_whole_numbers(dtype):
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.dtype(dtype)),
      "label": tfds.features.ClassLabel(names=["a", "b"]),
    }
  )
  info = types.SimpleNamespace(
    features=features, supervised_keys=("image", "label")
  )
  if dtype == "float32":
    with pytest.raises(
      ValueError, match="images of float32; only uint8 and uint16"
    ):
      tfds_files._class_names("x", info)
  else:
    assert tfds_files._class_names("x", info) == ("a", "b")


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
  # A set that there is not leaves no folder behind.
  monkeypatch.setattr(
    "sys.argv", ["prepare", "nosuchset", "--data_dir", str(tmp_path / "none")]
  )
  with pytest.raises(SystemExit):
    prepare.main()
  assert "has no set 'nosuchset'" in capsys.readouterr().err
  assert not (tmp_path / "none").exists()
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
    title, channels, files, labels = "grey", 1, [], None

    def __len__(self):
      return 2

    def read(self, i):
      import io

      from PIL import Image

      file = io.BytesIO()
      Image.new("L", (4, 4), 50 * i).save(file, "PNG")
      return file.getvalue(), i

    def place(self, i):
      return 0, i

    def where(self, i):
      return str(i)

  index, images = stored.read_all(Grey(), config_lib.defaults().data)
  assert images.shape == (2, 4, 4, 1) and images[1].max() == 50
  assert pixels.to_array(images[0]).shape == (4, 4, 1)
  np.testing.assert_array_equal(index.labels, [0, 1])


@pytest.mark.parametrize("kind", [AssertionError, TypeError])
def test_a_version_that_tfds_has_not_is_one_line(monkeypatch, kind):
  tfds = pytest.importorskip("tensorflow_datasets")

  def refuse(*_, **__):
    raise kind("Failed to construct dataset\n  only version 3.0.1 is there")

  monkeypatch.setattr(tfds, "builder", refuse)
  says = "cannot make 'mnist:9.9.9': only version 3.0.1 is there; see its catalogue"
  with pytest.raises(ValueError, match=says) as caught:
    tfds_files.builder("mnist:9.9.9", "")
  assert len(str(caught.value).splitlines()) == 1
