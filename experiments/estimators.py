"""Estimators of the meta-gradient side by side: error, operations, memory, time.

    python experiments/estimators.py configs/digits.py --steps 80 --out digits.json

trains for some steps with the exact gradient, compares the estimators at the state
reached, on one train half and M meta halves of train images, and prints a table for
a README. The same numbers are stored, and noise and weights with them: it is a line
of kind "diagnose" (`l2w_jax/training/diagnostics.py`). --estimators names others,
and --set changes keys of the config.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
from options import config_parser

import l2w_jax as l2w
from l2w_jax.data import feeds, order, sources
from l2w_jax.results import page, report
from l2w_jax.run import backend, files
from l2w_jax.run.command import one_line_errors
from l2w_jax.training import diagnostics, loop
from l2w_jax.training.state import split_seed


def trained(backbone, config, dataset, steps: int):
  """The state after some steps of a run, on one device."""
  keys = split_seed(config.seed)
  state = l2w.init_state(keys.init, backbone, config)
  step = loop.Step(backbone, config, _per_epoch(config, dataset), 1)
  feed = feeds.make_feed(dataset, config, keys.data, 1)
  for t in range(steps):
    state, _ = step(state, feed.halves(t), t)
  return jax.block_until_ready(state)


def _per_epoch(config, dataset) -> int:
  return order.steps_per_epoch(len(dataset.train.labels), config.batch)


def measure(config, steps: int) -> dict:
  """A "diagnose" line for the state after `steps` steps."""
  dataset = sources.load(config.data)
  if isinstance(dataset.train.images, sources.LazyImages):
    raise ValueError(f"{config.data.source} streams; set data.feed=resident")
  total = config.epochs * _per_epoch(config, dataset)
  if steps >= total:
    raise ValueError(
      f"--steps={steps}, but a run has {total} steps and ends with a learning rate "
      f"of 0; set config.epochs above {config.epochs}, or take fewer steps"
    )
  backbone = l2w.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )
  print(f"{steps} steps ...", file=sys.stderr, flush=True)
  state = trained(backbone, config, dataset, steps)
  probe = diagnostics.make_probe(
    dataset, config.batch // 2, config.diagnose.meta_halves
  )
  print("compiling the estimators ...", file=sys.stderr, flush=True)
  diagnosis = diagnostics.Diagnosis(
    backbone, config, _per_epoch(config, dataset), state, probe
  )
  diagnosis(state)  # the first call of a program is slower
  device = jax.devices()[0]
  return {
    "step": steps,
    **diagnosis(state),
    "jax": jax.__version__,
    "device": f"{device.platform} {device.device_kind}",
  }


def main(arguments=None) -> None:
  """The command line."""
  parser = config_parser(__doc__)
  parser.add_argument(
    "--steps",
    default=0,
    type=int,
    help="training steps before (default %(default)s)",
  )
  parser.add_argument(
    "--estimators",
    nargs="+",
    default=None,
    help="instead of those of diagnose.estimators",
  )
  parser.add_argument(
    "--out",
    default="estimators.json",
    type=pathlib.Path,
    help="where the line is stored (default %(default)s)",
  )
  options = parser.parse_args(arguments)
  with one_line_errors():
    backend.check()
    if options.steps < 0:
      raise ValueError(f"--steps must be at least 0, got {options.steps}")
    config = l2w.load_config(options.config, dict(options.set))
    if config.method != "l2w":
      raise ValueError(f"method {config.method!r} has no meta-gradient; use l2w")
    config.diagnose.every = 1
    if options.estimators:
      config.diagnose.estimators = tuple(options.estimators)
    config.diagnose.half = config.batch // 2
    files.make_folder(options.out.parent)  # told before anything compiles
    line = measure(l2w.config.validate(config), options.steps)
    print(page.markdown(*report.estimators([line])))
    files.write(options.out, json.dumps(line, indent=2) + "\n")


if __name__ == "__main__":
  main()
