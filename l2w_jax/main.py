"""Trains, evaluates and reports a run, as far as that is not done yet.

    l2w-jax --config=digits --workdir=runs/digits
    l2w-jax --config=digits:uniform --workdir=runs/uniform --config.epochs=60
    l2w-jax --mode=evaluate --workdir=runs/digits
    l2w-jax --mode=predict --workdir=runs/digits --images=FOLDER

--config is a config of the package (a wrong name lists them), a FILE.py of your own
or the config.json of a run; --config.KEY=VALUE sets one of its keys, which are all
documented in l2w_jax/config.py. `python -m l2w_jax` is the same command. Others:

    l2w-jax compare --help    several methods from the same seeds, and their table
    l2w-jax prepare --help    downloads and prepares a set of TFDS
    l2w-jax convert --help    PyTorch checkpoints of the released code, in and out
    l2w-jax benchmark --help  speed, operations, memory and compile time of a config
"""

from __future__ import annotations

from l2w_jax.run import stopping

if __name__ == "__main__":
  stopping.install()  # before the imports that take long

import sys
from functools import partial

from absl import flags

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.run import command, files

FLAGS = flags.FLAGS
command.define_config(
  "Needed to train; without it the keys given change the config of the workdir."
)
flags.DEFINE_string(
  "workdir",
  None,
  "Run directory, local or gs://BUCKET/RUN; of several processes, 0 keeps it.",
)
flags.DEFINE_enum(
  "mode",
  "all",
  ["all", "train", "evaluate", "report", "latency", "export", "predict"],
  "all: train, evaluate and report, as far as not done yet. latency: time "
  "early exits of an evaluated run. export: write its programs for others to run. "
  "predict: answer images of your own.",
)
flags.DEFINE_string(
  "images",
  None,
  "Of --mode=predict: a folder of images at any depth, an image, or a .npy file "
  "with uint8 [N H W channels].",
)
flags.DEFINE_string(
  "out", None, "Of --mode=predict: the table, WORKDIR/predictions.csv if not given."
)
flags.DEFINE_enum(
  "format",
  None,
  ["stablehlo", "onnx"],
  "Of --mode=export: stablehlo, for JAX, if not given; onnx needs jax2onnx.",
)
flags.DEFINE_enum(
  "figures",
  None,
  ["pdf", "png", "svg"],
  "Of --mode=report: write the pictures into WORKDIR/report/figures as well.",
)
flags.DEFINE_bool("version", False, "Print the version and leave.")
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

# Folders of the run directory, "" itself, that files are added to in each mode.
WRITTEN = {
  "all": ("", "checkpoints", "report"),
  "train": ("", "checkpoints"),
  "evaluate": ("",),
  "report": ("report",),
  "latency": ("", "report"),
  "export": ("", "export", "onnx"),
}
# Flags that go with one mode alone.
OWN = {
  "format": "export",
  "figures": "report",
  "images": "predict",
  "out": "predict",
}


def run(mode: str, workdir: files.Path, config, **own: str | None) -> None:
  """Runs one mode; `config` may be None but to train.

  Args:
    mode, workdir, config: see the flags.
    **own: flags of `OWN`, as far as they are given.

  Raises:
    ValueError: one line on what was wrong and what to do.
  """
  # Imported here, so that a mistyped flag is told at once.
  import jax

  from l2w_jax.exits import targets
  from l2w_jax.results import drawing
  from l2w_jax.run import compile_cache, lock, os_errors, parallel
  from l2w_jax.training import identity

  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir {workdir} is not a directory; name another")
  if config is not None:
    config = config_lib.validate(config)
  elif mode in ("all", "train"):
    raise ValueError(f"--mode={mode} needs --config=NAME or FILE.py")
  for name, value in own.items():
    if value and mode != OWN[name]:
      raise ValueError(
        f"--{name}={value} is for --mode={OWN[name]}; got --mode={mode}"
      )
  if mode == "predict" and not own.get("images"):
    raise ValueError("--mode=predict needs --images=FOLDER or FILE")
  if mode in ("latency", "export", "predict") and jax.process_count() > 1:
    raise ValueError(f"--mode={mode} is for one process; start it alone")
  # Now, as training may take weeks.
  if config is not None and mode in ("all", "train", "evaluate", "predict"):
    targets.check(config.evaluate.target, config_lib.holds_out(config))
  if mode in ("all", "train"):
    config_lib.check_rule(config)
  if mode in ("all", "report", "latency"):
    drawing.check()
  compile_cache.enable()
  if mode not in ("all", "train") and not workdir.is_dir():
    if parallel.is_writer():
      identity.read_config(workdir)  # which says so
    return _run(mode, workdir, config, own)
  if mode == "predict":  # of what others may write meanwhile, it writes nothing
    out = files.path(own.get("out") or workdir / "predictions.csv")
    place = files.target(out).parent
    if out.is_file() and not out.read_bytes().startswith(b"image,label,"):
      raise ValueError(
        f"--out={out} is there and no table of predictions, so it is not written "
        "over; name another file"
      )
    if out.is_dir() or (files.is_local(out) and not place.is_dir()):
      what = "it is a folder" if out.is_dir() else f"there is no folder {place}"
      raise ValueError(
        f"--out={out}: {what}; name a file in a folder that is there"
      )
    os_errors.check_writable([place])
    return _predict(workdir, config, files.path(str(own["images"])), out)
  if parallel.is_writer():
    os_errors.check_writable([workdir / name for name in WRITTEN[mode]])
  with lock.held(workdir):
    _run(mode, workdir, config, own)


def _predict(workdir, config, images, out) -> None:
  """Answers images with an evaluated run; its target may be another one."""
  from l2w_jax.results import predict
  from l2w_jax.training import identity

  if config is not None:
    identity.check_config(workdir, config, free=predict.FREE_KEYS)
    identity.check_choice(workdir, config, free=("target",))
  else:
    config = identity.read_config(workdir)
  found = predict.predict(workdir, images, out, config)
  shares = ", ".join(f"{100 * share:.1f} %" for share in found["exits"])
  speed = f"{found['images'] / found['seconds']:,.0f}"
  left_out = f", {found['left_out']:,} left out" if found["left_out"] else ""
  print(
    f"predict: {_images(found['images'])}{left_out}, {_images(speed)}/s, "
    f"{100 * found['cost']:.0f} % of the full network's cost, leaving at the exits "
    f"{shares}: {out}"
  )


def _images(number: int | str) -> str:
  """A number of images, in words: 1 image, 2,000 images."""
  text = number if isinstance(number, str) else f"{number:,}"
  return f"{text} image" if text == "1" else f"{text} images"


def _run(mode, workdir, config, own) -> None:
  """Runs one mode in a run directory that nobody else writes into."""
  # What a mode does not need is not waited for.
  from l2w_jax.run import backend, directory, parallel
  from l2w_jax.training import identity

  say = print if parallel.is_writer() else lambda *_: None
  if mode in ("evaluate", "report", "latency", "export") and parallel.is_writer():
    if config is not None:
      identity.check_config(workdir, config)
    made_with = identity.read_config(workdir)
    if mode != "evaluate":
      identity.check_choice(workdir, config)
    if config is None:
      config = made_with
      if config.sync == "local":
        config.num_devices = 0  # those that trained it need not be here
  config = config_lib.from_dict(parallel.from_writer(config and config.to_dict()))
  if mode in ("all", "train"):
    from l2w_jax.exits import targets
    from l2w_jax.training import loop

    fits = partial(targets.check_run, config.evaluate.target)
    if not loop.train(workdir, config, fits):
      say(f"{workdir}: training had already finished")
      if mode == "all" and parallel.from_writer(
        identity.is_evaluated(workdir, config, directory.REPORT)
      ):
        say(f"nothing to do; see {workdir / directory.REPORT}")
        return
  if mode in ("all", "evaluate"):
    from l2w_jax.results import evaluate

    results = evaluate.evaluate(workdir, config)
    if parallel.is_writer():
      _print_results(results)
      if mode == "evaluate":  # else the page is drawn below
        evaluate.say_if_reported(workdir)
  if mode == "latency":
    from l2w_jax.exits import latency

    _print_latency(latency.measure(workdir, config))
  if mode == "export":
    from l2w_jax.exits import export

    folder = export.export(workdir, own.get("format") or "stablehlo")
    print(f"export: {backend.describe()}", file=sys.stderr)
    say(f"export: {folder}")
  if mode in ("all", "report", "latency") and parallel.is_writer():
    from l2w_jax.results import report

    page = report.write_report(workdir, own.get("figures"))
    if mode == "report":
      print(f"report: {backend.describe()}", file=sys.stderr)
    say(f"report: {page}")


def _print_results(results) -> None:
  for row in results["anytime"]:
    print(
      f"exit {row['exit']}: {row['macs'] / 1e6:8.2f} M MACs, "
      f"accuracy {100 * row['accuracy']:.2f} %"
    )
  chosen, full = results["chosen"], results["macs"][-1]
  left = ", ".join(f"{100 * share:.1f} %" for share in chosen["exits"])
  print(
    f"{chosen['target']}: {chosen['macs'] / 1e6:.2f} M MACs on average "
    f"({100 * chosen['macs'] / full:.0f} %), accuracy "
    f"{100 * chosen['accuracy']:.2f} %, leaving at the exits {left}, thresholds "
    f"{', '.join(f'{float(t):.4g}' for t in chosen['thresholds'])}"
  )
  if chosen["note"]:
    print(f"note: {chosen['note']}")


def _print_latency(latency) -> None:
  for row in latency["rows"]:
    detail = row.get("decides") or f"call of {row.get('call', row['batch'])}"
    print(
      f"batch {row['batch']:3d}, {row['kind']:7s} {row['point']:15s} "
      f"{detail:12s} {row['ms']:.3f} ms [{row['ms_low']:.3f}, {row['ms_high']:.3f}]"
      f", {row['images_per_second']:.0f} images/s, {row['speedup']:.2f} of "
      f"{row['speedup_by_macs']:.2f} times as fast"
    )


def _main(arguments: list[str]) -> None:
  if arguments:
    modes = FLAGS["mode"].parser.enum_values  # ty: ignore[missing-attribute]
    known = arguments[0] in modes
    raise ValueError(
      f"unexpected argument {arguments[0]!r}; "
      + (f"did you mean --mode={arguments[0]}?" if known else "flags begin with --")
    )
  if FLAGS.version:
    print(f"l2w_jax {l2w_jax.__version__}")
    return
  if not FLAGS.workdir:
    raise ValueError("--workdir is missing; name the directory of the run")
  # Not above, so that flags are checked, and huge pages asked for, before JAX.
  import jax

  from l2w_jax.run import backend

  workdir = files.path(FLAGS.workdir)
  processes = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
  several = FLAGS.distributed or any(x is not None for x in processes)
  if several:
    from l2w_jax.run import parallel

    parallel.initialize(*processes)
  backend.check()
  try:
    own = {name: getattr(FLAGS, name) for name in OWN}
    run(FLAGS.mode, workdir, FLAGS.config, **own)
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
  command.run(_main, of_run=True)
