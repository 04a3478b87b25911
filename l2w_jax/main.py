"""Command line: train, evaluate and report. `--help` lists the flags."""
from __future__ import annotations

import json
import pathlib

from absl import flags

from l2w_jax import command
from l2w_jax import config as config_lib

FLAGS = flags.FLAGS
command.define_config(
    "Needed to train; evaluate and report read the workdir's.")
flags.DEFINE_string("workdir", None, "Run directory.")
flags.DEFINE_enum(
    "mode", "all", ["all", "train", "evaluate", "report", "latency", "export"],
    "all: train, evaluate and report, as far as not done yet. latency: time "
    "early exits of an evaluated run. export: write its stages as StableHLO.")


def run(mode: str, workdir: pathlib.Path, config) -> None:
  """Runs one mode; `config` may be None for evaluate and report.

  Raises:
    ValueError: one line on what was wrong and what to do.
  """
  # Imported here, so that a mistyped flag is told at once.
  from l2w_jax import (
      checkpoint,
      compile_cache,
      evaluate,
      export,
      latency,
      report,
      train,
  )

  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir {workdir} is not a directory; name another")
  if config is not None:
    config = config_lib.validate(config)
  elif mode in ("all", "train"):
    raise ValueError(f"--mode={mode} needs --config=FILE.py")
  compile_cache.enable()
  if mode in ("evaluate", "report", "latency", "export"):
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
  if mode == "latency":
    _print_latency(latency.measure(workdir, config))
  if mode == "export":
    print(f"export: {export.export(workdir)}")
  if mode in ("all", "report", "latency"):
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


def _print_latency(latency) -> None:
  for row in latency["rows"]:
    detail = row.get("decides") or f"call of {row.get('call', row['batch'])}"
    print(f"batch {row['batch']:3d}, {row['kind']:7s} {row['point']:15s} "
          f"{detail:12s} p50 {row['p50_ms']:.3f} ms, p95 {row['p95_ms']:.3f} ms, "
          f"{row['images_per_second']:.0f} images/s, {row['speedup']:.2f} of "
          f"{row['speedup_by_macs']:.2f} times as fast")


def _main(arguments: list[str]) -> None:
  if arguments:
    raise ValueError(f"unexpected argument {arguments[0]!r}; flags begin with --")
  if not FLAGS.workdir:
    raise ValueError("--workdir is missing; name the directory of the run")
  run(FLAGS.mode, pathlib.Path(FLAGS.workdir), FLAGS.config)


if __name__ == "__main__":
  command.run(_main)
