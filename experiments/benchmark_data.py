"""What the feeds cost and whether they keep their promises.

    python experiments/benchmark_data.py make DIR       # synthetic JPEGs, once
    python experiments/benchmark_data.py streaming DIR  # against bare decoding
    python experiments/benchmark_data.py resume DIR     # killed, started again
    python experiments/benchmark_data.py memory DIR     # over 5 epochs
    python experiments/benchmark_data.py resident       # against a fixed batch

`make` writes 2,000 train and 1,000 validation JPEGs of 500×375 pixels (smooth
noise, about 80 KB each) through TFDS's own imagenet2012 builder. Each line printed
is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from PIL import Image
from write_sources import write_tfds

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.data import feeds, order, pixels, sources, stored, tfds_files
from l2w_jax.training import loop

ROOT = pathlib.Path(__file__).parents[1]


def jpeg(rng: np.random.Generator) -> bytes:
  """A file of 500×375 pixels that costs about what a photograph does."""
  smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(
    (500, 375), Image.Resampling.BICUBIC
  )
  noisy = np.asarray(smooth) + rng.normal(0, 12, (375, 500, 3))
  file = io.BytesIO()
  Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(
    file, "JPEG", quality=90
  )
  return file.getvalue()


def make(data_dir: pathlib.Path) -> None:
  """Writes the set."""
  rng = np.random.default_rng(0)

  def examples(split, count):
    for i in range(count):
      name = f"{split}_{i:05d}.JPEG"
      yield name, {"image": jpeg(rng), "label": i % 1000, "file_name": name}

  data_dir.mkdir(parents=True, exist_ok=True)
  write_tfds(
    "imagenet2012",
    data_dir,
    "array_record",
    {"train": examples("train", 2000), "validation": examples("val", 1000)},
  )


def streaming_config(data_dir: pathlib.Path, **changes):
  """The ImageNet configuration on the synthetic set."""
  return config_lib.load_config(
    str(ROOT / "configs/imagenet_msdnet.py"),
    {
      "data.data_dir": str(data_dir),
      "data.calibration": 1000,
      "batch": 100,
      "epochs": 5,
    }
    | changes,
  )


def open_feed(config):
  """(feed, steps of an epoch)."""
  dataset = sources.load(config.data)
  return (
    feeds.make_feed(dataset, config, jax.random.key(0), 1),
    order.steps_per_epoch(len(dataset.train.labels), config.batch),
  )


def streaming(data_dir: pathlib.Path) -> None:
  """Images per second of the feed, and of decoding and cropping alone."""
  config = streaming_config(data_dir, epochs=100)
  records, _, _ = tfds_files.open_tfds("imagenet2012", str(data_dir))

  def bare(i):
    rng = np.random.default_rng(i)
    encoded, _ = records.read(i)
    return pixels.random_crop(pixels.decode(encoded, 3, config.data), 224, rng)

  feed, steps = open_feed(config)
  rates, start, images = {"bare": [], "feed": []}, 0, 2000
  with ThreadPoolExecutor(stored.num_threads()) as pool:
    for _ in range(6):
      began = time.perf_counter()
      for part in range(0, images, 100):  # results are let go, as batches are
        list(pool.map(bare, range(part, part + 100)))
      rates["bare"].append(images / (time.perf_counter() - began))
      jax.block_until_ready(feed.halves(start))  # fills up what is ahead
      time.sleep(2)
      count = 2 * steps
      began = time.perf_counter()
      for step in range(start + 1, start + 1 + count):
        jax.block_until_ready(feed.halves(step))
      seconds = time.perf_counter() - began
      # Two batches, and as many images as wait to be batched, were ready.
      rates["feed"].append((count - 3) * 100 / seconds)
      start += count + 1
      feed.close()
  print(
    json.dumps(
      {
        name: {
          "images_per_second": round(statistics.mean(x), 1),
          "std": round(statistics.stdev(x), 1),
          "n": len(x),
        }
        for name, x in rates.items()
      }
      | {
        "ratio": round(
          statistics.mean(rates["feed"]) / statistics.mean(rates["bare"]), 3
        )
      }
    )
  )


def stream_hashes(data_dir: pathlib.Path, start: int) -> None:
  """Prints a digest of each batch from step `start` to the end of 2 epochs."""
  feed, steps = open_feed(streaming_config(data_dir, epochs=2))
  for step in range(start, 2 * steps):
    content = hashlib.sha1()
    for half in feed.halves(step):
      for name in ("image", "label"):
        content.update(np.asarray(half[name]).tobytes())
    print(step, content.hexdigest(), flush=True)
  feed.close()


def resume(data_dir: pathlib.Path) -> None:
  """Kills a streaming process in its second epoch, and starts another."""

  def start(step):
    return subprocess.Popen(
      [sys.executable, __file__, "hashes", str(data_dir), "--start", str(step)],
      stdout=subprocess.PIPE,
      text=True,
    )

  with start(0) as whole:
    expected = dict(line.split() for line in whole.stdout)
  seen = {}
  with start(0) as killed:
    for line in killed.stdout:
      step, content = line.split()
      seen[step] = content
      if int(step) == len(expected) // 2 + 2:
        killed.send_signal(signal.SIGKILL)
        break
  last = max(map(int, seen))
  with start(last + 1) as resumed:
    rest = dict(line.split() for line in resumed.stdout)
  print(
    json.dumps(
      {
        "steps": len(expected),
        "killed_after_step": last,
        "exit_of_killed": killed.returncode,
        "resumed_batches": len(rest),
        "all_batches_equal": seen | rest == expected,
      }
    )
  )


def memory(data_dir: pathlib.Path) -> None:
  """Resident memory at the end of each of 5 epochs, in MiB."""
  feed, steps = open_feed(streaming_config(data_dir))
  used = []
  for step in range(5 * steps):
    jax.block_until_ready(feed.halves(step))
    if (step + 1) % steps == 0:
      pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
      used.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1))
  feed.close()
  print(json.dumps({"mib_after_each_epoch": used}))


def resident(batch: int) -> None:
  """Milliseconds of a CIFAR-100 L2W step on a fixed batch, and of the feed."""
  config = config_lib.load_config(
    str(ROOT / "configs/cifar100_msdnet.py"),
    {"batch": batch, "data.source": "synthetic:32x32x3"},
  )
  rng = np.random.default_rng(0)
  split = sources.Split(
    rng.integers(0, 256, (45_000, 32, 32, 3), np.uint8),
    rng.integers(0, 100, 45_000).astype(np.int32),
  )
  dataset = sources.Dataset(
    split,
    split,
    split,
    tuple(map(str, range(100))),
    np.full(3, 127.0),
    np.full(3, 70.0),
  )
  feed = feeds.make_feed(dataset, config, jax.random.key(0), 1)
  backbone = l2w_jax.build_backbone(config.model, 100, (32, 32, 3))
  state = l2w_jax.init_state(jax.random.key(0), backbone, config)
  step = loop.Step(backbone, config, 45_000 // batch, 1)
  fixed = jax.block_until_ready(feed.halves(0))
  state, _ = jax.block_until_ready(step(state, fixed, 0))
  times = {"step": [], "feed": []}
  for t in range(8):
    began = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, fixed, 0))
    times["step"].append(1000 * (time.perf_counter() - began))
    for _ in range(3):
      began = time.perf_counter()
      jax.block_until_ready(feed.halves(t))
      times["feed"].append(1000 * (time.perf_counter() - began))
  print(
    json.dumps(
      {"batch": batch}
      | {
        name: {
          "ms": round(statistics.mean(x), 2),
          "std": round(statistics.stdev(x), 2),
          "n": len(x),
        }
        for name, x in times.items()
      }
      | {
        "feed_percent_of_step": round(
          100 * statistics.mean(times["feed"]) / statistics.mean(times["step"]), 2
        )
      }
    )
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "what", choices=["make", "streaming", "resume", "memory", "resident", "hashes"]
  )
  parser.add_argument("data_dir", type=pathlib.Path, nargs="?")
  parser.add_argument("--start", type=int, default=0)
  parser.add_argument("--batch", type=int, default=128)
  args = parser.parse_args()
  if args.what == "resident":
    resident(args.batch)
  elif args.what == "hashes":
    stream_hashes(args.data_dir, args.start)
  else:
    {"make": make, "streaming": streaming, "resume": resume, "memory": memory}[
      args.what
    ](args.data_dir)


if __name__ == "__main__":
  main()
