"""Mean weight of each population of setting A, or of wrong labels in C, by exit.

    python experiments/populations.py RUN [RUN …]

reads run directories whose data are `npz:…/populations.npz` (make_sets.py), weighs
train images by the WPN of the last checkpoint, half by half as a step would, and
prints mean weight and its standard deviation at every exit: of CIFAR images and of
digits, and with label noise of right and of wrong labels.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np
from make_sets import COARSE

import l2w_jax as l2w
from l2w_jax.data import feeds, sources
from l2w_jax.run import directory, files
from l2w_jax.run.command import one_line_errors
from l2w_jax.training import checkpoint, diagnostics
from l2w_jax.training.state import split_seed

HALVES = 20


def weights_of_run(workdir: files.Path) -> list[list]:
  """Rows of the table: [run, group, images, "mean ± std" of each exit]."""
  config = directory.read_config(workdir)
  if config.method != "l2w":
    raise ValueError(f"{workdir} is of method {config.method}, which has no WPN")
  config.data.augment = "none"
  dataset = sources.load(config.data)
  if dataset.class_names[: len(COARSE)] != tuple(COARSE):
    raise ValueError(
      f"{workdir} is of {config.data.source}, not of the populations.npz that "
      "make_sets.py writes"
    )
  backbone = l2w.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )
  state, _ = checkpoint.restore(workdir, config, backbone)
  weigh = diagnostics.make_weights_fn(backbone, config)
  truth = sources.load(_clean(config).data).train.labels
  # A label that the feed cannot tell from another: the number of the image.
  numbered = dataset._replace(
    train=dataset.train._replace(labels=np.arange(len(truth), dtype=np.int32))
  )
  feed = feeds.make_feed(numbered, config, split_seed(config.seed).data, 1)
  weights, numbers = [], []
  for step in range(HALVES // 2):
    for half in feed.halves(step)[:2]:
      rows = np.asarray(half["label"])
      half = half | {"label": jax.numpy.asarray(dataset.train.labels[rows])}
      weights.append(np.asarray(weigh(state, half)[0]))
      numbers.append(rows)
  weights, numbers = np.concatenate(weights), np.concatenate(numbers)
  digit = truth[numbers] >= len(COARSE)
  groups = {"CIFAR": ~digit, "digits": digit}
  if config.data.label_noise:
    wrong = dataset.train.labels[numbers] != truth[numbers]
    groups |= {"right labels": ~wrong, "wrong labels": wrong}
  return [
    [workdir.name, name, int(rows.sum())]
    + [f"{x.mean():.2f} ± {x.std():.2f}" for x in weights[rows].T]
    for name, rows in groups.items()
    if rows.any()
  ]


def _clean(config):
  """The config with every label right."""
  config = config.copy_and_resolve_references()
  config.data.label_noise = 0.0
  return config


def main(arguments=None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="+", type=files.path)
  options = parser.parse_args(arguments)
  with one_line_errors():
    for i, run in enumerate(options.runs):
      rows = weights_of_run(run)
      if not i:
        exits = [f"exit {k + 1}" for k in range(len(rows[0]) - 3)]
        for row in (["run", "images", "n", *exits], ["---"] * (3 + len(exits))):
          print("| " + " | ".join(row) + " |")
      for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
  main()
