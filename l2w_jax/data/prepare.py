"""Downloads and prepares a TFDS set, by TFDS itself, when a user asks for it.

    l2w-jax prepare cifar100 --data_dir=DIR

Afterwards --config.data.source=tfds:cifar100 --config.data.data_dir=DIR reads it.
Without --data_dir it goes where TFDS puts things ($TFDS_DATA_DIR, or
~/tensorflow_datasets). Sets that may not be downloaded freely, imagenet2012 among
them, want their archives in --manual_dir. Some sets need TensorFlow to be
prepared: pip install "l2w_jax[prepare]".
"""

from __future__ import annotations

from l2w_jax.run import stopping

if __name__ == "__main__":
  stopping.install()  # before the imports that take long

import argparse
import os
import pathlib
import sys


def prepare(name: str, data_dir: str, manual_dir: str, file_format: str) -> str:
  """Prepares a set unless it is there; returns its directory.

  Raises:
    ValueError: TFDS does not know the set, or could not download or write it.
  """
  from l2w_jax.data import tfds_files

  builder = tfds_files.builder(name, data_dir)
  if builder.info.splits:
    return str(builder.data_path)
  import tensorflow_datasets as tfds

  if data_dir:
    pathlib.Path(os.path.expanduser(data_dir)).mkdir(parents=True, exist_ok=True)
  try:
    builder.download_and_prepare(
      file_format=file_format,
      download_config=tfds.download.DownloadConfig(
        manual_dir=manual_dir or None, try_download_gcs=False
      ),
    )
  except ImportError as error:
    raise ValueError(
      f"preparing {name} needs more than reading it ({error}); "
      'pip install "l2w_jax[prepare]"'
    ) from error
  except Exception as error:  # downloads and builders raise anything
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise ValueError(
      f"{name} could not be prepared in {builder.data_path}: "
      f"{type(error).__name__}: {' '.join(lines)}"
    ) from error
  return str(builder.data_path)


def main() -> None:
  """The command line; errors are one line and exit code 2 or 1."""
  parser = argparse.ArgumentParser(
    prog="l2w-jax prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("name", help="of a TFDS set, such as cifar100")
  parser.add_argument("--data_dir", default="", help="where to put it")
  parser.add_argument(
    "--manual_dir", default="", help="archives that you have downloaded yourself"
  )
  parser.add_argument(
    "--file_format", default="array_record", choices=["array_record", "tfrecord"]
  )
  args = parser.parse_args()
  from l2w_jax.run import backend, command

  with command.one_line_errors():
    backend.check()
    where = prepare(args.name, args.data_dir, args.manual_dir, args.file_format)
  data_dir = f" --config.data.data_dir={args.data_dir}" if args.data_dir else ""
  print(f"prepare: {backend.describe()}", file=sys.stderr)
  print(
    f"{args.name} is in {where}; read it with "
    f"--config.data.source=tfds:{args.name}{data_dir}"
  )


if __name__ == "__main__":
  main()
