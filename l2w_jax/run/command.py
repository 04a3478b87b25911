"""What every command line shares: a config flag, and one line for a mistake.

A mistyped flag or key, an unreadable config file and any ValueError of the
command itself end in one line on standard error and exit code 2.
`--verbosity=1` shows where the error was raised.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from l2w_jax import config as config_lib

FLAGS = flags.FLAGS
# `--help` lists a flag with the module that had it defined here.
flags.disclaim_key_flags()


def define_config(explanation: str) -> None:
  """Defines --config=FILE.py[:ARGUMENT] and its overrides.

  Without a default: that would parse overrides at import, where a typo is a
  traceback nobody can catch. `FLAGS.config` is None where it is not given.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    f"Config file, FILE.py or FILE.py:ARGUMENT. "
    f"--config.KEY=VALUE overrides a key. {explanation}",
    lock_config=True,
  )


def run(main: Callable[[list[str]], None]) -> NoReturn:
  """Parses the flags and calls `main` with the arguments that are none."""
  use_huge_pages()
  logging.set_verbosity(logging.WARNING)

  def guarded(argv: list[str]) -> None:
    try:
      main(argv[1:])
    except ValueError as error:
      _fail(error)

  app.run(guarded, flags_parser=_parse)


def use_huge_pages() -> None:
  """Starts this command again where glibc is to be told of huge pages.

  XLA on CPUs allocates the temporary memory of a program at every call, and Linux
  faults it in page by page: with 2 MiB pages a plain step of a network for CIFAR
  takes a fifth less time (README, Speed). glibc reads the setting only when a
  process starts. A GLIBC_TUNABLES of one's own, also an empty one, is left alone.
  """
  if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):
      os.execv(sys.executable, sys.orig_argv)


def _parse(argv: list[str]) -> list[str]:
  try:
    for argument in argv[1:]:
      override = re.match(r"--?(?:no)?config\.([^=]+)", argument)
      if override is not None:
        config_lib.check_key(override[1])
    arguments = FLAGS(argv)
    if "config" in FLAGS and FLAGS.config is not None:
      FLAGS.config.keys()  # raises now if the file could not be read
    return arguments
  except SystemExit as leave:  # after --help absl leaves with 1
    sys.exit(0 if leave.code == 1 else leave.code)
  except (AttributeError, KeyError) as error:
    _fail(error, "no such key in this config: ")
  except (flags.Error, OSError, TypeError, ValueError) as error:
    _fail(error)


def _fail(error: Exception, prefix: str = "") -> NoReturn:
  logging.debug("where it was raised (--verbosity=1):", exc_info=error)
  print(f"error: {prefix}{_one_line(error)}", file=sys.stderr)
  sys.exit(2)


def _one_line(error: Exception) -> str:
  message = str(error)
  if isinstance(error, (AttributeError, KeyError)):
    # The name of a key comes in quotes, and with every other key and value.
    message = re.sub(
      "Other fields present: .*?(?=Did you mean|$)",
      "",
      message.strip("'\""),
      flags=re.DOTALL,
    )
  if isinstance(error, OSError) or "Traceback" in message:
    # Config files that cannot be read or run: the cause comes last.
    message = message.strip().splitlines()[-1]
  return " ".join(message.split())
