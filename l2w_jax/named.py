"""What names stand for: config files, and backbones and rules of one's own.

    digits, cifar100_msdnet:7-l2w    a config of this package, with its argument
    FILE.py, FILE.py:ARGUMENT        a config file
    runs/digits/config.json          the config of a run
    my_nets.Plain                    what the module my_nets calls so

Where a file is there, it is meant. A run keeps the last kind of name in its
config.json, and so finds its code again wherever the module can be imported; the
code itself it never keeps.
"""

from __future__ import annotations

import importlib
import pathlib
import re
from typing import Any

_HERE = pathlib.Path(__file__).parent
# Inside of an installed package; beside it where that is a checkout.
CONFIGS, EXPERIMENTS = (
  _HERE / name if (_HERE / name).is_dir() else _HERE.parent / name
  for name in ("configs", "experiments")
)


class NotHere(ValueError):
  """Code of one's own that cannot be imported where this runs."""


def config_names() -> list[str]:
  """Names of the configs that come with the package."""
  return sorted(path.stem for path in CONFIGS.glob("*.py"))


def config_file(name: str) -> tuple[pathlib.Path, str]:
  """(file, argument) that NAME or NAME:ARGUMENT stands for.

  Raises:
    ValueError: neither a file nor a config of the package is called so.
  """
  if "://" in name:
    raise ValueError(
      f"--config={name}: a config is read from this machine; copy it here first. "
      "To go on with a run, --workdir=gs://BUCKET/RUN alone is enough"
    )
  place, _, argument = name.partition(":")
  if place.endswith(".json") and argument:
    raise ValueError(
      f"--config={name}: a config.json takes no argument; change its keys by "
      "--config.KEY=VALUE"
    )
  if pathlib.Path(place).is_file():
    return pathlib.Path(place), argument
  if place in config_names():
    return CONFIGS / f"{place}.py", argument
  raise ValueError(
    f"no config file {place!r}; give a FILE.py, the config.json of a run, or one "
    f"of the names {', '.join(config_names())}"
  )


def is_own(name: Any) -> bool:
  """Whether it is MODULE.NAME, of whatever module."""
  word = r"[^\W\d]\w*"
  return isinstance(name, str) and bool(re.fullmatch(rf"{word}(\.{word})+", name))


def own(name: str) -> Any:
  """What MODULE.NAME stands for; the module is imported.

  Raises:
    NotHere: there is no such module, or nothing of the name in it.
  """
  module, _, attribute = name.rpartition(".")
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    top = module.partition(".")[0]
    raise NotHere(
      f"{name!r}: cannot import {module} ({error}); start in the folder that {top} "
      "lies in, or put that folder on PYTHONPATH"
    ) from error
  if not hasattr(found, attribute):
    raise NotHere(
      f"{name!r}: {getattr(found, '__file__', module)} has no {attribute!r}"
    )
  return getattr(found, attribute)
