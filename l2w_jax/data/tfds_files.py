"""Sets that TensorFlow Datasets has prepared, read without TensorFlow.

TFDS says what a set is: its files, features and class names. The files are read
here, because TFDS itself reads array_record only without TensorFlow and tfrecord
only with it. A tfrecord is a row of frames of 8 bytes length, 4 bytes checksum,
the record, 4 bytes checksum.
"""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from l2w_jax.data import remembered, stored

LENGTH = struct.Struct("<Q")
FRAMES = dict.fromkeys(("shards", "offsets", "lengths"), np.int64)
HEADER, FOOTER = 12, 4  # bytes around a tfrecord


class TfdsRecords:
  """The records of one split of a prepared set; see `stored.Records`."""

  labels = None  # the records say them

  def __init__(self, builder: Any, split: str):
    import tensorflow_datasets as tfds

    info = builder.info
    self.title = f"{info.name} {split}"
    self.files = [pathlib.Path(path) for path in info.splits[split].filepaths]
    self._image, self._label = info.supervised_keys or ("image", "label")
    self.channels = info.features[self._image].shape[-1]
    self._features = info.features
    self._decoders = {self._image: tfds.decode.SkipDecoding()}
    self._ends = np.cumsum(info.splits[split].shard_lengths)
    missing = [path for path in self.files if not path.is_file()]
    if missing:
      raise ValueError(
        f"{missing[0]} is missing from a prepared set; prepare it again"
      )
    readers = {"array_record": _ArrayRecords, "tfrecord": _TfRecords}
    self._raw = readers[info.file_format.value](self)

  def __len__(self) -> int:
    """Number of records."""
    return int(self._ends[-1])

  def read(self, i: int) -> tuple[bytes, int]:
    """(encoded image, label) of record i."""
    example = self._features.deserialize_example_np(
      self._raw[i], decoders=self._decoders
    )
    return example[self._image], int(example[self._label])

  def place(self, i: int) -> tuple[int, int]:
    """(number of the file, of the record in it)."""
    shard = int(np.searchsorted(self._ends, i, side="right"))
    return shard, i - int(self._ends[shard - 1] if shard else 0)

  def where(self, i: int) -> str:
    """File and number of record i."""
    shard, number = self.place(i)
    return f"{self.files[shard]} record {number}"


class _ArrayRecords:
  """records[i]: bytes."""

  def __init__(self, records: TfdsRecords):
    from array_record.python import array_record_data_source

    _allow_open_files(len(records.files))
    self._source = array_record_data_source.ArrayRecordDataSource(
      [str(path) for path in records.files]
    )
    if len(self._source) != len(records):
      raise _other_count(records, len(self._source))

  def __getitem__(self, i: int) -> bytes:
    return self._source[int(i)]


class _TfRecords:
  """records[i]: bytes."""

  def __init__(self, records: TfdsRecords):
    self._files = records.files
    frames = _frames(records)
    if len(frames["offsets"]) != len(records):
      raise _other_count(records, len(frames["offsets"]))
    self._frames = frames

  def __getitem__(self, i: int) -> bytes:
    shard, offset, length = (
      int(self._frames[name][i]) for name in ("shards", "offsets", "lengths")
    )
    # Opened for each read: a thousand files may not all be open at once.
    with self._files[shard].open("rb", buffering=0) as file:
      return os.pread(file.fileno(), length, offset)


def _other_count(records: TfdsRecords, found: int) -> ValueError:
  return ValueError(
    f"the files of {records.title}, {records.files[0]} and on, hold {found} "
    f"records, but their dataset_info.json says {len(records)}; prepare the "
    "set again"
  )


def _frames(records: TfdsRecords) -> dict[str, np.ndarray]:
  """File, offset and length in bytes of every record; remembered."""
  stamps = map(remembered.stamp, records.files)
  name = f"frames 3 {' '.join(map(str, stamps))}"
  frames = remembered.load(name, FRAMES)
  if frames is None:
    frames = _all_frames(records.files)
    remembered.save(name, frames, records.title)
  return frames


def _all_frames(files: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
  frames = list(
    stored.in_threads(
      lambda shard: tfrecord_frames(files[shard]),
      range(len(files)),
      "find records",
      unit="file",
    )
  )
  return {
    "shards": np.repeat(np.arange(len(files)), [len(x) for x in frames]),
    "offsets": np.concatenate([x[:, 0] for x in frames]),
    "lengths": np.concatenate([x[:, 1] for x in frames]),
  }


def tfrecord_frames(path: pathlib.Path) -> np.ndarray:
  """int64 [N 2]: offset and length in bytes of the records of a tfrecord file.

  Raises:
    ValueError: the file is no tfrecord, or was cut off.
  """
  frames, start, size = [], 0, path.stat().st_size
  with path.open("rb", buffering=0) as file:
    while start < size:
      header = os.pread(file.fileno(), HEADER, start)
      length = LENGTH.unpack_from(header)[0] if len(header) == HEADER else size
      end = start + HEADER + length + FOOTER
      if end > size:
        raise ValueError(
          f"{path} is cut off or no tfrecord: record {len(frames)} should "
          f"end at byte {end} of {size}; prepare the set again"
        )
      frames.append((start + HEADER, length))
      start = end
  return np.array(frames, np.int64).reshape(-1, 2)


def _allow_open_files(count: int) -> None:
  """Array_record keeps its files open; a thousand are above the usual limit."""
  try:
    import resource
  except ImportError:  # Windows has no such limit
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and count > soft // 4:
    most = soft + count if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, most), hard))


def open_tfds(
  name: str, data_dir: str
) -> tuple[TfdsRecords, TfdsRecords, tuple[str, ...]]:
  """(train, test, class names) of a prepared set; nothing is downloaded.

  The test split is `test`, or `validation` for sets (such as imagenet2012) that
  have no labelled one.

  Args:
    name: as TFDS has it, such as cifar100 or imagenet_resized/32x32.
    data_dir: the directory that holds prepared sets; empty: TFDS's own default.

  Raises:
    ValueError: unknown, not prepared, in an unknown format, or not a set of
      images with one label each.
  """
  prepare = f"python -m l2w_jax.data.prepare {name}" + (
    f" --data_dir={data_dir}" if data_dir else ""
  )
  if data_dir and not os.path.isdir(os.path.expanduser(data_dir)):
    raise ValueError(
      f"no directory {data_dir} (config.data.data_dir); prepare a set in it "
      f"with {prepare}"
    )
  prepared = builder(name, data_dir)
  if not prepared.info.splits:
    others = sorted(
      path.parent.name
      for path in pathlib.Path(prepared.data_path).parent.glob(
        "*/dataset_info.json"
      )
    )
    if others:
      found = [f"tfds:{name.partition(':')[0]}:{version}" for version in others]
      raise ValueError(
        f"tfds:{name} is not prepared in {prepared.data_path}, but another version "
        f"is: set config.data.source={' or '.join(found)}"
      )
    raise ValueError(
      f"tfds:{name} is not prepared in {prepared.data_path}; prepare it with "
      f"{prepare} (it downloads the set), or set config.data.data_dir to the "
      "directory that holds it"
    )
  file_format = prepared.info.file_format.value
  if file_format not in ("array_record", "tfrecord"):
    raise ValueError(
      f"{prepared.data_path} is in the format {file_format}; only array_record "
      f"and tfrecord can be read. Prepare it again elsewhere with {prepare}"
    )
  class_names = _class_names(name, prepared.info)
  splits = prepared.info.splits
  if "train" not in splits:
    raise ValueError(f"tfds:{name} has no train split, only {', '.join(splits)}")
  for split in ("test", "validation"):
    if split in splits and splits[split].num_examples:
      records = TfdsRecords(prepared, split)
      if _is_labelled(records):
        return TfdsRecords(prepared, "train"), records, class_names
  raise ValueError(
    f"tfds:{name} has no labelled test or validation split, only "
    f"{', '.join(splits)}"
  )


def _is_labelled(records: TfdsRecords) -> bool:
  """Whether a split has labels; TFDS writes -1 where it has none."""
  try:
    return records.read(0)[1] >= 0
  except Exception:  # an unreadable record is named when all are read
    return True


def builder(name: str, data_dir: str) -> Any:
  """The TFDS builder of a set, prepared or not; empty data_dir: TFDS's default.

  Raises:
    ValueError: TFDS does not know the set.
  """
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
  except tfds.core.registered.DatasetNotFoundError as error:
    raise ValueError(
      f"TensorFlow Datasets has no set {name!r}; see its catalogue, "
      "https://www.tensorflow.org/datasets/catalog/overview"
    ) from error
  except (AssertionError, TypeError) as error:  # a version or config it has not
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    raise ValueError(
      f"TensorFlow Datasets cannot make {name!r}: {reason.strip(' .')}; see its "
      "catalogue, https://www.tensorflow.org/datasets/catalog/overview"
    ) from error
  except ImportError as error:
    raise ValueError(
      f"TensorFlow Datasets cannot describe {name!r} here: "
      f"{error}; install what it names"
    ) from error


def _class_names(name: str, info: Any) -> tuple[str, ...]:
  import tensorflow_datasets as tfds

  features = info.features
  keys = info.supervised_keys or ("image", "label")
  if not (
    isinstance(features, dict | tfds.features.FeaturesDict)
    and all(isinstance(key, str) and key in features for key in keys)
    and len(keys) == 2
    and isinstance(features[keys[0]], tfds.features.Image)
    and isinstance(features[keys[1]], tfds.features.ClassLabel)
    and features[keys[0]].shape[-1] in (1, 3)
  ):
    raise ValueError(
      f"tfds:{name} is not a set of images with one label each; "
      f"its features are {', '.join(features)}"
    )
  dtype = np.dtype(features[keys[0]].np_dtype)
  if dtype not in (np.uint8, np.uint16):  # TFDS hides floats in the bytes of a PNG
    raise ValueError(
      f"tfds:{name} has images of {dtype}; only uint8 and uint16 can be read, so "
      "write the set as a folder of images or as .npz"
    )
  return tuple(features[keys[1]].names)
