"""What docs/early-exits.md says of them, measured.

python experiments/early_exit.py [RUN]

With an evaluated run its network and test images; without, a CIFAR-shaped MSDNet
with 5 exits, random weights and random images, with the thresholds of q = 0.75
on its own confidences, so that the shares leaving are p_k ∝ 0.75^k.
"""

import pathlib
import sys
import time

import jax
import numpy as np

from l2w_jax import config as config_lib
from l2w_jax import models
from l2w_jax.exits import early_exit, latency
from l2w_jax.exits import policy as exit_policy
from l2w_jax.run import files
from l2w_jax.run.command import one_line_errors
from l2w_jax.training import identity

MISMATCH_SAMPLES = 10_000


def search_times():
  """Median seconds of the threshold search, 5 exits and 39 values of q."""
  shares = exit_policy.proportions(np.arange(1, 40) / 20, 5)
  for num in (10_000, 50_000):
    confidence = jax.numpy.asarray(
      np.random.default_rng(0).random((num, 5), np.float32)
    )
    seconds = []
    for _ in range(21):
      began = time.perf_counter()
      jax.block_until_ready(exit_policy.find_thresholds(confidence, shares))
      seconds.append(time.perf_counter() - began)
    low, middle, high = 1e3 * np.percentile(seconds[1:], [0, 50, 100])
    print(
      f"search [{num}, 5] x 39 q: median {middle:.1f} ms, "
      f"{low:.1f} to {high:.1f}, n = 20"
    )


def cifar_shaped():
  """(network, images) with random weights."""
  config = config_lib.load_config(
    str(pathlib.Path(__file__).parents[1] / "configs/cifar100_msdnet.py")
  )
  backbone = models.build_backbone(config.model, 100, (32, 32, 3))
  network = early_exit.EarlyExit(
    backbone, backbone.init(jax.random.key(0)), [0.0] * 5, [127.0] * 3, [70.0] * 3
  )
  images = np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3), np.uint8)
  return network, images


def of_run(workdir):
  """(network, images) of an evaluated run."""
  workdir = files.path(workdir)
  return (
    early_exit.load(workdir),
    identity.open_data(workdir, identity.read_config(workdir))[0].test.images,
  )


def mismatches(network, images):
  """Answers that differ from the simulated ones, over 10,000 images."""
  rng = np.random.default_rng(1)
  many = images[rng.integers(len(images), size=MISMATCH_SAMPLES)]
  noise = rng.integers(-2, 3, many.shape)
  many = np.clip(many + noise, 0, images.max()).astype(np.uint8)
  answers = network.predict(many)
  prediction, confidence = network.simulate(many)
  exits = np.asarray(exit_policy.exits_taken(confidence, network.thresholds))
  rows = np.arange(len(many))
  print(
    f"of {len(many)}: {np.sum(exits + 1 != answers.exit)} other exits, "
    f"{np.sum(prediction[rows, exits] != answers.label)} other labels, "
    f"{np.sum(confidence[rows, exits] != answers.confidence)} other "
    "confidences than simulated by the same programs"
  )
  logits = jax.jit(network.backbone.apply)
  mean, std = network.mean, network.std
  whole = []
  for start in range(0, len(many), 500):  # as evaluation runs it
    x = (many[start : start + 500].astype(np.float32) - mean) / std
    whole.append(
      exit_policy.confidence(logits(network.variables, x), network.measure)[1]
    )
  other = np.asarray(
    exit_policy.exits_taken(np.concatenate(whole), network.thresholds)
  )
  print(
    f"of {len(many)}: {np.sum(other + 1 != answers.exit)} other exits than "
    "simulated from the whole network's logits in batches of 500"
  )
  print(f"programs compiled per stage: {network.compilations()}")


def main():
  """Prints every figure."""
  if any(argument.startswith("-") for argument in sys.argv[1:]):
    sys.exit(__doc__)
  search_times()
  network, images = of_run(sys.argv[1]) if sys.argv[1:] else cifar_shaped()
  _, confidence = network.simulate(images)
  thresholds = np.asarray(
    exit_policy.find_thresholds(
      confidence,
      exit_policy.proportions(0.75, network.backbone.num_exits),
      calibration="held_out",
    )
  )
  network = network.with_thresholds(thresholds)
  mismatches(network, images)
  for row in latency.time_all(network, images, {"q = 0.75": thresholds}):
    detail = row.get("decides") or row.get("call", "")
    print(
      f"batch {row['batch']} {row['kind']} {row['point']} {detail}: "
      f"{row['ms']:.3f} [{row['ms_low']:.3f}, {row['ms_high']:.3f}] ms, "
      f"{row['images_per_second']:.0f} images/s, {row['speedup']:.2f} of "
      f"{row['speedup_by_macs']:.2f}, "
      f"{100 * row['speedup'] / row['speedup_by_macs']:.0f} %"
    )


if __name__ == "__main__":
  with one_line_errors():
    main()
