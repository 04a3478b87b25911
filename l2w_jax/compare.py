r"""Trains methods from the same seeds, and compares them: a table and pictures.

    l2w-jax compare --config=digits --methods=uniform,l2w --seeds=10 \
        --workdir=runs/digits10

trains, evaluates and reports every method from every seed into a run directory
of its own, WORKDIR/METHOD-SEED. Finished runs are left as they are and begun
ones resumed, so the same command goes on wherever it was stopped. A method may
carry overrides, METHOD:KEY=VALUE+KEY=VALUE, and the first one is what the others
are compared with:

    --methods=l2w,l2w:meta.epsilon=0.3,l2w:meta.epsilon=0.8+meta.interval=10

WORKDIR/comparison.txt (also printed) and comparison.json hold accuracy of every
exit and at equal mean cost, mean ± standard deviation over seeds, and differences
seed by seed with their t interval; comparison/index.html adds the pictures.
"""

from __future__ import annotations

from l2w_jax.run import stopping

if __name__ == "__main__":
  stopping.install()  # before the imports that take long

import ast
import copy
import re
import sys
from functools import partial
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.run import command, files

FLAGS = flags.FLAGS
ANY_SIZE = 512  # of images: enough for all scales; exits do not depend on it


def parse_methods(text: str) -> dict[str, dict[str, Any]]:
  """{as given: overrides of the config} for every method of --methods.

  Commas within brackets belong to a value.

  Raises:
    ValueError: an override without "=", one that changes the network or the
      images, or one method twice.
  """
  methods = {}
  for name in _split(text):
    method, colon, rest = name.partition(":")
    if colon and not rest:
      raise ValueError(f"--methods={text}: nothing follows the colon of {name!r}")
    overrides = {"method": method}
    for item in filter(None, rest.split("+")):
      key, equals, value = item.partition("=")
      if not equals:
        raise ValueError(
          f"--methods={text}: {item!r} is no override; write "
          "METHOD:KEY=VALUE, such as l2w:meta.epsilon=0.3"
        )
      if key.split(".")[0] in ("method", "seed", "model", "data"):
        raise ValueError(
          f"--methods={text}: {key} may not differ between "
          "methods; they are compared on one network and its "
          "images"
        )
      if key in overrides:
        raise ValueError(f"--methods={text}: {name!r} gives {key} twice")
      overrides[key] = literal(value)
    if name in methods:
      raise ValueError(f"--methods={text} names {name!r} twice")
    methods[name] = overrides
  return methods


def _split(text: str) -> list[str]:
  """The comma-separated parts; commas within brackets do not separate."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([") - (letter in ")]")
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def literal(text: str) -> Any:
  """The Python literal that the text is, or else the text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def plan(
  config: ConfigDict,
  methods: dict[str, dict[str, Any]],
  seeds: int,
  workdir: files.Path,
) -> list[tuple[str, files.Path, ConfigDict]]:
  """(method, run directory, config) of every run, one seed after the other."""
  runs = []
  for seed in range(config.seed, config.seed + seeds):
    for name, overrides in methods.items():
      run = config_lib.with_overrides(
        copy.deepcopy(config), overrides | {"seed": seed}
      )
      folder = re.sub(r"[^\w.=+-]", "_", f"{name}-{seed}")
      runs.append((name, workdir / folder, run))
  return runs


def check(runs: list[tuple[str, files.Path, ConfigDict]]) -> None:
  """Raises ValueError or OSError for what a later run would only end at.

  What the data decide is left to the first run: all have the same.
  """
  from l2w_jax import models
  from l2w_jax.exits import targets
  from l2w_jax.results import drawing
  from l2w_jax.run import os_errors
  from l2w_jax.training import identity, loop

  drawing.check()
  for _, workdir, config in runs:
    identity.check_config(workdir, config)
    if identity.is_evaluated(workdir, config, "scores.npz"):
      continue
    targets.check(config.evaluate.target, config_lib.holds_out(config))
    loop.check(config)
    if config.method == "fixed":
      size = config.data.image_size or ANY_SIZE
      backbone = models.build_backbone(config.model, 2, (size, size, 3))
      config_lib.check_method(config, backbone.num_exits)
    os_errors.check_writable([workdir, workdir / "checkpoints", workdir / "report"])
  folder = runs[0][1].parent
  os_errors.check_writable([folder, folder / "comparison"])


def finish(workdir: files.Path, config: ConfigDict) -> None:
  """Trains, evaluates and reports one run, as far as not done yet."""
  from l2w_jax.exits import targets
  from l2w_jax.results import evaluate, report
  from l2w_jax.run import lock
  from l2w_jax.training import identity
  from l2w_jax.training import loop as train

  identity.check_config(workdir, config)
  if not identity.is_evaluated(workdir, config, "scores.npz"):
    with lock.held(workdir):
      train.train(
        workdir, config, partial(targets.check_run, config.evaluate.target)
      )
      evaluate.evaluate(workdir, config)
      report.write_report(workdir)


def _define_flags() -> None:
  """Not on import, where they would clash with those of other commands."""
  command.define_config("Its method and seed are set for every run.")
  flags.DEFINE_string(
    "methods",
    "uniform,l2w",
    "What to compare with the first: METHOD, or "
    "METHOD:KEY=VALUE with overrides joined by +; separated by commas.",
  )
  flags.DEFINE_integer(
    "seeds", 3, "Runs of each method, from config.seed on.", lower_bound=1
  )
  flags.DEFINE_string("workdir", None, "Folder of the runs and the comparison.")
  flags.DEFINE_enum(
    "figures",
    None,
    ["pdf", "png", "svg"],
    "Write the pictures into WORKDIR/comparison/figures as well.",
  )


def _main(arguments: list[str]) -> None:
  if arguments:
    raise ValueError(f"unexpected argument {arguments[0]!r}; flags begin with --")
  for name in ("config", "workdir"):
    if not getattr(FLAGS, name):
      raise ValueError(f"--{name} is missing")
  from l2w_jax.results import comparison
  from l2w_jax.run import backend, compile_cache, lock

  folder = files.path(FLAGS.workdir)
  if (folder / "config.json").exists():
    raise ValueError(
      f"--workdir={folder} is a run; name a folder for all runs of the comparison"
    )
  runs = plan(FLAGS.config, parse_methods(FLAGS.methods), FLAGS.seeds, folder)
  backend.check()
  check(runs)
  compile_cache.enable()
  print(f"compare: {backend.describe()}", file=sys.stderr)
  for i, (_, workdir, config) in enumerate(runs, 1):
    print(f"compare: run {i} of {len(runs)}, {workdir}", file=sys.stderr)
    finish(workdir, config)
  with lock.held(folder):
    comparison.write(
      folder,
      {
        name: [path for other, path, _ in runs if other == name]
        for name, _, _ in runs
      },
      FLAGS.figures,
    )
  print((folder / "comparison.txt").read_text("utf-8"), end="")
  print(f"pictures: {folder / 'comparison' / 'index.html'}")


if __name__ == "__main__":
  _define_flags()
  command.run(_main)
