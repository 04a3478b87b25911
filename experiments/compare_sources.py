"""Trains a reduced MSDNet from several sources and compares every loss.

    python experiments/compare_sources.py OUT SOURCE[@DATA_DIR][+streaming] ...

such as npz:cifar100.npz tfds:cifar100@DIR folder:DIR+streaming. One epoch of
batches of 128 (351 steps of CIFAR-100), L2W, two exits. Prints how many of the
numbers in metrics.jsonl differ from those of the first source, and whether the
final weights are equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from l2w_jax import config as config_lib
from l2w_jax.training import loop as train

ROOT = pathlib.Path(__file__).parents[1]
REDUCED = {
  "epochs": 1,
  "batch": 128,
  "optimizer.learning_rate": 0.1,
  "model.num_exits": 2,
  "model.channels": 8,
  "model.growth": 4,
  "model.growth_factors": (1, 2),
  "model.bottleneck_factors": (1, 2),
  "model.classifier_width": 32,
  "meta.hidden": 50,
  "checkpoint.every": 1,
}
NUMBERS = ("train_loss", "meta_loss", "accuracy", "count", "mean_weight")


def run(out: pathlib.Path, name: str):
  """(losses, all compared numbers, digests of the final state) of a run."""
  source, _, feed = name.partition("+")
  source, _, data_dir = source.partition("@")
  config = config_lib.load_config(
    str(ROOT / "configs/cifar100_msdnet.py"),
    {
      **REDUCED,
      "data.source": source,
      "data.data_dir": data_dir,
      "data.feed": feed or "resident",
    },
  )
  train.train(out, config)
  lines = [
    json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
  ]
  (saved,) = (out / "checkpoints").glob("[0-9]*")
  (info,) = saved.glob("info/metadata")
  return (
    [line["train_loss"] for line in lines if line["kind"] == "train"],
    [line.get(key) for line in lines for key in NUMBERS],
    json.loads(info.read_text())["digests"],
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("sources", nargs="+")
  args = parser.parse_args()
  first = None
  for i, name in enumerate(args.sources):
    losses, numbers, digests = run(args.out / str(i), name)
    first = first or (numbers, digests)
    print(
      json.dumps(
        {
          "source": name,
          "steps": len(losses),
          "first_loss": losses[0],
          "last_loss": losses[-1],
          "numbers_that_differ": sum(
            a != b for a, b in zip(numbers, first[0], strict=True)
          ),
          "final_state_equal": digests == first[1],
        }
      ),
      flush=True,
    )


if __name__ == "__main__":
  main()
