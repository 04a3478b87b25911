"""Command line: train, evaluate and report. `--help` lists the flags."""
from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

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
  from l2w_jax import checkpoint, evaluate, report, train
  from l2w_jax import config as config_lib

  if config is not None:
    config = config_lib.validate(config)
  elif mode in ("all", "train"):
    raise ValueError(f"--mode={mode} needs --config=FILE.py")
  else:
    config = checkpoint.read_config(workdir)
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


def _main(unused_argv) -> None:
  try:
    run(FLAGS.mode, pathlib.Path(FLAGS.workdir), FLAGS.config)
  except ValueError as error:
    if FLAGS.debug:
      raise
    _fail(error)


def _parse_flags(argv):
  """Flags, or one line on standard error and exit code 2."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    _fail(error)


def _fail(error: Exception) -> None:
  print(f"error: {_one_line(error)}", file=sys.stderr)
  sys.exit(2)


def _one_line(error: Exception) -> str:
  # str(KeyError) is the repr of its message.
  message = error.args[0] if isinstance(error, KeyError) else error
  return " ".join(str(message).split())


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  flags.mark_flag_as_required("workdir")
  app.run(_main, flags_parser=_parse_flags)
