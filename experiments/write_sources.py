"""Writes an .npz image set as a TFDS directory or as class folders.

    python experiments/write_sources.py cifar100.npz OUT --kind=array_record

The .npz holds train_images, train_labels, test_images, test_labels (and
class_names). --kind=array_record or tfrecord goes through TFDS's own builder
(--name, cifar100 by default), whose download alone is replaced, so that what is
written is what that builder reads; features that an .npz lacks, such as
coarse_label, are 0. TFDS writes tfrecord with TensorFlow only. --kind=folder
writes OUT/train/CLASS/NUMBER.png and OUT/test. Images stay lossless.
"""

from __future__ import annotations

import argparse
import io
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from l2w_jax.run.command import one_line_errors


def png(image: np.ndarray) -> bytes:
  """A uint8 [H W channels] image as a lossless file."""
  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
    file, "PNG", compress_level=1
  )
  return file.getvalue()


def write_tfds(
  name: str,
  data_dir: pathlib.Path,
  file_format: str,
  splits: Mapping[str, Iterator[tuple[str, dict[str, Any]]]],
  class_names: list[str] | None = None,
) -> None:
  """Prepares a TFDS set from examples instead of its download.

  Args:
    name: of a set that TFDS knows.
    data_dir: where prepared sets lie.
    file_format: array_record, or tfrecord (with TensorFlow).
    splits: for each split pairs of a unique key and an example, whose image is
      an encoded file.
    class_names: of the label; as TFDS has them if None.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format=file_format)
  if class_names:
    # Left unset without the download, and then settable once.
    builder.info.features["label"].names = class_names
  builder._split_generators = lambda *_: splits
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )


def examples(arrays, split: str, features) -> Iterator[tuple[str, dict]]:
  """(key, example) of every image of a split of an .npz set."""
  images, labels = (arrays[f"{split}_{what}"] for what in ("images", "labels"))
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    key = f"{split}_{i:05d}"
    example = {name: key if name == "id" else 0 for name in features}
    yield key, example | {"image": png(image), "label": int(label)}


def write_folder(arrays, out: pathlib.Path, class_names: list[str]) -> None:
  """OUT/SPLIT/CLASS/NUMBER.png of every image."""
  for split in ("train", "test"):
    for name in class_names:
      (out / split / name).mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(arrays[f"{split}_labels"]):
      path = out / split / class_names[label] / f"{i:05d}.png"
      path.write_bytes(png(arrays[f"{split}_images"][i]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("npz", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument(
    "--kind", required=True, choices=["array_record", "tfrecord", "folder"]
  )
  parser.add_argument("--name", default="cifar100", help="TFDS set")
  args = parser.parse_args()
  with np.load(args.npz) as file:
    arrays = dict(file)
  class_names = [
    str(name)
    for name in arrays.get(
      "class_names", range(1 + int(arrays["train_labels"].max()))
    )
  ]
  if args.kind == "folder":
    write_folder(arrays, args.out, class_names)
    return
  import tensorflow_datasets as tfds

  features = tfds.builder(args.name, data_dir=args.out).info.features
  write_tfds(
    args.name,
    args.out,
    args.kind,
    {split: examples(arrays, split, features) for split in ("train", "test")},
    class_names,
  )


if __name__ == "__main__":
  with one_line_errors():
    main()
