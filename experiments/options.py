"""What scripts of this folder share: image shapes, and their command lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from l2w_jax.compare import literal
from l2w_jax.data import sources

# Data source: image shape and classes.
SHAPES = {
  "tfds:cifar10": ((32, 32, 3), 10),
  "tfds:cifar100": ((32, 32, 3), 100),
  "tfds:imagenet2012": ((224, 224, 3), 1000),
  "digits": ((8, 8, 1), 10),
  "digits:mixed": ((8, 8, 1), 10),
}


def shape_and_classes(config) -> tuple[tuple[int, int, int], int]:
  """(image shape, classes) of a config's data; only a source of one's own is read.

  Raises:
    ValueError: a source that cannot be read.
  """
  if config.data.source in SHAPES:
    return SHAPES[config.data.source]
  dataset = sources.load(config.data)
  return dataset.image_shape, dataset.num_classes


def override(text: str) -> tuple[str, Any]:
  """(key, value) of "KEY=VALUE", for argparse."""
  key, equals, rest = text.partition("=")
  if not equals:
    raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
  return key, literal(rest)


def config_parser(
  description: str, commands: Sequence[str] = ()
) -> argparse.ArgumentParser:
  """A parser that takes a config and --set, behind one of `commands` if any."""
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawTextHelpFormatter,
    allow_abbrev=False,
  )
  if commands:
    parser.add_argument("what", choices=commands)
  parser.add_argument("config", help="a config by name or file, with :ARGUMENT")
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    type=override,
    metavar="KEY=VALUE",
    help="override a key of the config",
  )
  return parser
