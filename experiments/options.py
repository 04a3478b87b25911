"""What scripts of this folder share: image shapes, and values of command lines."""
from __future__ import annotations

import argparse
import ast
from typing import Any

# Data source: image shape and classes.
SHAPES = {
    "tfds:cifar10": ((32, 32, 3), 10),
    "tfds:cifar100": ((32, 32, 3), 100),
    "tfds:imagenet2012": ((224, 224, 3), 1000),
    "digits": ((8, 8, 1), 10),
}


def literal(text: str) -> Any:
  """The Python literal that the text is, or else the text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def override(text: str) -> tuple[str, Any]:
  """(key, value) of "KEY=VALUE", for argparse."""
  key, equals, rest = text.partition("=")
  if not equals:
    raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
  return key, literal(rest)
