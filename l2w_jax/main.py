"""Command line: train, evaluate and report. `--help` lists the flags."""
from __future__ import annotations

import json
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from l2w_jax import config as config_lib

FLAGS = flags.FLAGS
# No default: a default value would parse overrides at import, where a typo is
# a traceback nobody can catch.
config_flags.DEFINE_config_file(
    "config", None,
    "Config file, FILE.py or FILE.py:ARGUMENT. --config.KEY=VALUE overrides "
    "a key. Needed to train; evaluate and report read the workdir's.",
    lock_config=True)
flags.DEFINE_string("workdir", None, "Run directory.")
flags.DEFINE_enum(
    "mode", "all", ["all", "train", "evaluate", "report"],
    "all: train, evaluate and report, as far as not done yet.")


def run(mode: str, workdir: pathlib.Path, config) -> None:
  """Runs one mode; `config` may be None for evaluate and report.

  Raises:
    ValueError: one line on what was wrong and what to do.
  """
  # Imported here, so that a mistyped flag is told at once.
  from l2w_jax import checkpoint, compile_cache, evaluate, report, train

  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir {workdir} is not a directory; name another")
  if config is not None:
    config = config_lib.validate(config)
  elif mode in ("all", "train"):
    raise ValueError(f"--mode={mode} needs --config=FILE.py")
  compile_cache.enable()
  if mode in ("evaluate", "report"):
    made_with = checkpoint.read_config(workdir)
    if config is None:
      config = made_with
    else:
      checkpoint.check_same_run(workdir, config)
  if mode in ("all", "train") and not train.train(workdir, config):
    print(f"{workdir}: training had already finished")
    if mode == "all" and _is_reported(workdir):
      print(f"nothing to do; see {workdir / 'report' / 'index.html'}")
      return
  if mode in ("all", "evaluate"):
    _print_results(evaluate.evaluate(workdir, config))
  if mode in ("all", "report"):
    print(f"report: {report.write_report(workdir)}")


def _is_reported(workdir: pathlib.Path) -> bool:
  """Whether results of the finished run and their report are there."""
  try:
    results = json.loads((workdir / "results.json").read_text())
  except (OSError, json.JSONDecodeError):
    return False
  page = workdir / "report" / "index.html"
  return bool(results.get("complete")) and page.exists()


def _print_results(results) -> None:
  for row in results["anytime"]:
    print(f"exit {row['exit']}: {row['macs'] / 1e6:8.2f} M MACs, "
          f"accuracy {100 * row['accuracy']:.2f} %")


def _main(argv) -> None:
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not FLAGS.workdir:
      raise ValueError("--workdir is missing; name the directory of the run")
    run(FLAGS.mode, pathlib.Path(FLAGS.workdir), FLAGS.config)
  except ValueError as error:
    _fail(error)


def _parse_flags(argv):
  """Flags, or one line on standard error and exit code 2."""
  try:
    for argument in argv[1:]:
      override = re.match(r"--?(?:no)?config\.([^=]+)", argument)
      if override is not None:
        config_lib.check_key(override[1])
    arguments = FLAGS(argv)
    if FLAGS.config is not None:
      FLAGS.config.keys()  # raises now if the file could not be read
    return arguments
  except SystemExit as leave:  # after --help absl leaves with 1
    sys.exit(0 if leave.code == 1 else leave.code)
  except (AttributeError, KeyError) as error:
    _fail(error, "no such key in this config: ")
  except (flags.Error, OSError, TypeError, ValueError) as error:
    _fail(error)


def _fail(error: Exception, prefix: str = "") -> None:
  logging.debug("where it was raised (--verbosity=1):", exc_info=error)
  print(f"error: {prefix}{_one_line(error)}", file=sys.stderr)
  sys.exit(2)


def _one_line(error: Exception) -> str:
  message = str(error)
  if isinstance(error, (AttributeError, KeyError)):
    # The name of a key comes in quotes, and with every other key and value.
    message = re.sub("Other fields present: .*?(?=Did you mean|$)", "",
                     message.strip("'\""), flags=re.DOTALL)
  if isinstance(error, OSError) or "Traceback" in message:
    # Config files that cannot be read or run: the cause comes last.
    message = message.strip().splitlines()[-1]
  return " ".join(message.split())


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(_main, flags_parser=_parse_flags)
