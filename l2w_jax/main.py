"""Command line: train, evaluate and report. `--help` lists the flags."""

from __future__ import annotations

import pathlib
import sys

import jax
from absl import flags

from l2w_jax import config as config_lib
from l2w_jax.run import command

FLAGS = flags.FLAGS
command.define_config("Needed to train; evaluate and report read the workdir's.")
flags.DEFINE_string(
  "workdir", None, "Run directory, kept by process 0 if there are several."
)
flags.DEFINE_enum(
  "mode",
  "all",
  ["all", "train", "evaluate", "report", "latency", "export"],
  "all: train, evaluate and report, as far as not done yet. latency: time "
  "early exits of an evaluated run. export: write its stages as StableHLO.",
)
flags.DEFINE_bool(
  "distributed",
  False,
  "One of several processes, which the environment "
  "(Cloud TPU, Slurm, Open MPI) names.",
)
flags.DEFINE_string(
  "coordinator", None, "One of several processes: HOST:PORT of process 0."
)
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def run(mode: str, workdir: pathlib.Path, config) -> None:
  """Runs one mode; `config` may be None for evaluate and report.

  Raises:
    ValueError: one line on what was wrong and what to do.
  """
  # Imported here, so that a mistyped flag is told at once.
  from l2w_jax.exits import export, latency
  from l2w_jax.results import evaluate, report
  from l2w_jax.run import compile_cache, directory, parallel
  from l2w_jax.training import loop as train

  say = print if parallel.is_writer() else lambda *_: None
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir {workdir} is not a directory; name another")
  if config is not None:
    config = config_lib.validate(config)
  elif mode in ("all", "train"):
    raise ValueError(f"--mode={mode} needs --config=FILE.py")
  if mode in ("latency", "export") and jax.process_count() > 1:
    raise ValueError(f"--mode={mode} is for one process; start it alone")
  compile_cache.enable()
  if mode in ("evaluate", "report", "latency", "export") and parallel.is_writer():
    made_with = directory.read_config(workdir)
    if config is None:
      config = made_with
      if config.sync == "local":
        config.num_devices = 0  # those that trained it need not be here
    else:
      directory.check_same_run(workdir, config)
  config = config_lib.from_dict(parallel.from_writer(config and config.to_dict()))
  if mode in ("all", "train") and not train.train(workdir, config):
    say(f"{workdir}: training had already finished")
    if mode == "all" and parallel.from_writer(
      directory.is_finished(workdir, "report/index.html")
    ):
      say(f"nothing to do; see {workdir / 'report' / 'index.html'}")
      return
  if mode in ("all", "evaluate"):
    results = evaluate.evaluate(workdir, config)
    if parallel.is_writer():
      _print_results(results)
  if mode == "latency":
    _print_latency(latency.measure(workdir, config))
  if mode == "export":
    say(f"export: {export.export(workdir)}")
  if mode in ("all", "report", "latency") and parallel.is_writer():
    say(f"report: {report.write_report(workdir)}")


def _print_results(results) -> None:
  for row in results["anytime"]:
    print(
      f"exit {row['exit']}: {row['macs'] / 1e6:8.2f} M MACs, "
      f"accuracy {100 * row['accuracy']:.2f} %"
    )


def _print_latency(latency) -> None:
  for row in latency["rows"]:
    detail = row.get("decides") or f"call of {row.get('call', row['batch'])}"
    print(
      f"batch {row['batch']:3d}, {row['kind']:7s} {row['point']:15s} "
      f"{detail:12s} p50 {row['p50_ms']:.3f} ms, p95 {row['p95_ms']:.3f} ms, "
      f"{row['images_per_second']:.0f} images/s, {row['speedup']:.2f} of "
      f"{row['speedup_by_macs']:.2f} times as fast"
    )


def _main(arguments: list[str]) -> None:
  if arguments:
    raise ValueError(f"unexpected argument {arguments[0]!r}; flags begin with --")
  if not FLAGS.workdir:
    raise ValueError("--workdir is missing; name the directory of the run")
  processes = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
  several = FLAGS.distributed or any(x is not None for x in processes)
  if several:
    from l2w_jax.run import parallel

    parallel.initialize(*processes)
  try:
    run(FLAGS.mode, pathlib.Path(FLAGS.workdir), FLAGS.config)
  except jax.errors.JaxRuntimeError as error:
    if not several:
      raise
    # Mostly a connection that broke because the other end is gone.
    sys.exit(
      f"error: process {jax.process_index()} of {jax.process_count()} stopped "
      f"({str(error).splitlines()[0]}), most likely because another one had; "
      "see what the others wrote first, then start all of them again: the run "
      "goes on from its last checkpoint"
    )


if __name__ == "__main__":
  command.run(_main)
