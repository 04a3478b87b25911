"""What every command line shares: a config flag, and one line for a mistake.

A mistyped flag or key, an unreadable config file and any ValueError of the
command itself end in one line on standard error and exit code 2, what the
operating system refuses in one with the path and exit code 1. `--verbosity=1`
shows where the error was raised.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Generator
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from l2w_jax import config as config_lib
from l2w_jax import named
from l2w_jax.run import files, huge_pages, os_errors, stopping

FLAGS = flags.FLAGS
# `--help` lists a flag with the module that had it defined here.
flags.disclaim_key_flags()


def define_config(explanation: str) -> None:
  """Defines --config=NAME[:ARGUMENT] and its overrides.

  Without a default: that would parse overrides at import, where a typo is a
  traceback nobody can catch. `FLAGS.config` is None where it is not given.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    f"Config of the package by its name, FILE.py, either with :ARGUMENT, or the "
    f"config.json of a run. --config.KEY=VALUE overrides a key. {explanation}",
    lock_config=True,
  )


def run(main: Callable[[list[str]], None], of_run: bool = False) -> NoReturn:
  """Parses the flags and calls `main` with the arguments that are none.

  Args:
    main: the command.
    of_run: whether keys of a config given alone change that of --workdir.
  """
  huge_pages.use()
  stopping.install()
  logging.set_verbosity(logging.WARNING)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      # A name that the stream's encoding has not is escaped, as in é of ASCII.
      stream.reconfigure(errors="backslashreplace")

  def guarded(argv: list[str]) -> None:
    with one_line_errors():
      main(argv[1:])

  app.run(guarded, flags_parser=lambda argv: _parse(argv, of_run))


@contextlib.contextmanager
def one_line_errors() -> Generator[None, None, None]:
  """What is raised inside ends the process: in one line, and exit code 2 or 1."""
  # Orbax logs what it raises, in as many tracebacks as it has threads.
  logging.get_absl_logger().addFilter(
    lambda record: not record.exc_info or "orbax" not in record.pathname
  )
  # And writes that fail, or end, after another one did find nobody that waits.
  logging.get_absl_logger().manager.getLogger("asyncio").disabled = True
  sys.unraisablehook = _tell_unraisable
  try:
    yield
  except ValueError as error:
    _fail(error)
  except OSError as error:
    if error.filename is None and not _can_print(error):
      error.filename = "standard output"
    _fail(error, code=1)
  except MemoryError as error:
    advice = os_errors.ADVICE[errno.ENOMEM]
    _fail(error if str(error) else MemoryError(advice), "not enough memory: ", 1)


def _tell_unraisable(found) -> None:
  if str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)


def _can_print(error: OSError) -> bool:
  """False, and from now on silence, where it is standard output that failed."""
  try:
    if not isinstance(error, BrokenPipeError):
      print(end="", flush=True)  # fails again with what could not be written
      return True
  except OSError:
    pass
  # Python writes what is left when it ends, and would complain of that.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  return False


def _parse(argv: list[str], of_run: bool = False) -> list[str]:
  try:
    arguments = FLAGS(_with_config(argv, of_run))
    if "config" in FLAGS and FLAGS.config is not None:
      FLAGS.config.keys()  # raises now if the file could not be read
    return arguments
  except SystemExit as leave:  # after --help absl leaves with 1
    sys.exit(0 if leave.code == 1 else leave.code)
  except (AttributeError, KeyError) as error:
    if unknown := _unknown_key(argv):
      _fail(unknown)
    _fail(error, "no such key in this config: ")
  except flags.UnrecognizedFlagError as error:
    if not error.flagname.removeprefix("no").startswith("config."):
      _fail(error)
    _fail(_unknown_key(argv) or _no_config(error, of_run))
  except OSError as error:  # without a number: config files that cannot be run
    _fail(error, code=2 if error.errno is None else 1)
  except (flags.Error, TypeError, ValueError) as error:
    _fail(error)


def _with_config(argv: list[str], of_run: bool) -> list[str]:
  """With --config as a file that its flag can read; see `run`."""
  from l2w_jax.run import config_by_name, config_of_run

  read, given, words = [], {}, iter(argv)
  for word in words:
    if word == "-h":
      word = "--help"
    if re.fullmatch("--?(config|workdir)", word):
      word = f"{word}={next(words, '')}"
    found = re.match(
      r"--?(config|workdir|(?:no)?config\..+?)(?:=(.*))?$", word, re.DOTALL
    )
    if found:
      given[found[1]] = found[2]
    if found and found[1] == "config":
      named.config_file(found[2])  # raises now, without a traceback in its words
      word = f"--config={config_by_name.__file__}:{found[2]}"
    read.append(word)
  workdir = given.pop("workdir", "")
  if of_run and given and "config" not in given and workdir:
    path = files.path(workdir)
    if any((path / name).exists() for name in ("config.json", "checkpoints")):
      config_of_run.get_config(workdir)  # raises now, as above
      read.insert(1, f"--config={config_of_run.__file__}:{workdir}")
  return read


def _no_config(error: flags.UnrecognizedFlagError, of_run: bool) -> ValueError:
  return ValueError(
    f"--{error.flagname} changes a config, and there is none: give --config=NAME"
    + (", or the --workdir of a run" if of_run else "")
  )


def _unknown_key(argv: list[str]) -> ValueError | None:
  """The error of the first override of a key that no config has."""
  for word in argv[1:]:
    override = re.match(r"--?(?:no)?config\.([^=]+)", word)
    try:
      if override is not None:
        config_lib.check_key(override[1])
    except ValueError as error:
      return error
  return None


def _fail(error: Exception, prefix: str = "", code: int = 2) -> NoReturn:
  logging.debug("where it was raised (--verbosity=1):", exc_info=error)
  with contextlib.suppress(OSError):
    print(f"error: {prefix}{_one_line(error)}", file=sys.stderr)
  sys.exit(code)


def _one_line(error: Exception) -> str:
  if isinstance(error, OSError) and error.errno is not None:
    return os_errors.explain(error)
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
    # An error of our own.
    message = re.sub(r"^(l2w_jax\.[\w.]+|ValueError): ", "", message)
  return " ".join(message.split())
