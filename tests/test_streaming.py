"""The streaming feed: the batches of the resident one, wherever it starts."""

import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from conftest import ROOT

from l2w_jax import config as config_lib
from l2w_jax.data import feeds, order, sources, streaming
from l2w_jax.results import evaluate
from l2w_jax.run import parallel
from l2w_jax.training import loop as train

BATCH, STEPS = 64, 4  # of 1,077 digits cut down to 270: 14 are left out


def make_config(feed="streaming", **changes):
  config = config_lib.load_config(
    str(ROOT / "configs/digits.py"),
    {
      "batch": BATCH,
      "epochs": 3,
      "data.source": "digits",
      "data.feed": feed,
      "data.augment": "shift_flip",
      "data.mean": (8.0,),
      "data.std": (6.0,),
    }
    | changes,
  )
  return config


def make_dataset(config):
  dataset = sources.load(config.data)
  return dataset._replace(train=dataset.train.keep(np.arange(270)))


def make_feed(config, num_devices=1, host=None, num_hosts=1):
  key, dataset = jax.random.key(3), make_dataset(config)
  if host is None:
    return feeds.make_feed(dataset, config, key, num_devices)
  return streaming.StreamingFeed(
    dataset,
    config,
    key,
    num_devices,
    parallel.rows_of_host(BATCH, num_hosts, host, num_hosts),
  )


def batches_of(config, steps):
  feed = make_feed(config)
  found = [whole(feed, step) for step in steps]
  feed.close()
  return found


def whole(feed, step):
  """Both halves of a step, one after the other."""
  return jax.tree.map(lambda *x: np.concatenate(x), *feed.halves(step))


def same(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys() == {"image", "label"}
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("augment", ["none", "shift_flip"])
def test_both_feeds_give_the_same_batches(augment):
  steps = range(2 * STEPS + 1)
  resident, streamed = (
    batches_of(make_config(feed, **{"data.augment": augment}), steps)
    for feed in ("resident", "streaming")
  )
  assert isinstance(make_dataset(make_config("resident")).train.images, np.ndarray)
  same(streamed, resident)


def test_random_crops_are_those_of_the_step_and_differ_between_epochs():
  config = make_config(**{"data.augment": "crop_flip", "data.image_size": 6})
  run = batches_of(config, range(3 * STEPS))
  assert run[0]["image"].shape == (BATCH, 6, 6, 1)
  # Started in the middle, and asked twice for the same step.
  same(batches_of(config, [5, 5, 6, 11]), [run[i] for i in (5, 5, 6, 11)])
  # One image for all, so that only crops differ.
  dataset = make_dataset(config)
  one = dataset._replace(train=dataset.train.keep(np.zeros(BATCH, int)))
  feed = feeds.make_feed(one, config, jax.random.key(3), 1)
  crops = [whole(feed, step)["image"] for step in range(2)]
  feed.close()
  distinct = {image.tobytes() for image in np.concatenate(crops)}
  assert len(distinct) > BATCH  # of 128, where small crops can agree


def test_hosts_read_disjoint_rows_that_cover_the_batch():
  config = make_config(**{"data.augment": "none"})
  run = make_feed(config)
  parts = [make_feed(config, 1, host, 2) for host in range(2)]
  for step in (0, STEPS + 1):
    hosts = [feed.halves(step) for feed in parts]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *hosts)
    same(joined, run.halves(step))
  for feed in (run, *parts):
    feed.close()


@pytest.mark.parametrize("hosts, devices", [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_rows_of_hosts_are_those_of_their_devices(hosts, devices):
  batch = 24
  rows = np.stack(
    [
      parallel.rows_of_host(batch, hosts * devices, host, hosts)
      for host in range(hosts)
    ]
  ).reshape(hosts * devices, 2, -1)
  for d, (first, second) in enumerate(rows):
    size = batch // 2 // hosts // devices
    np.testing.assert_array_equal(first, d * size + np.arange(size))
    np.testing.assert_array_equal(second, first + batch // 2)
  with pytest.raises(ValueError, match="does not split into two halves"):
    parallel.rows_of_host(batch + 1, hosts * devices, 0, hosts)


def test_a_closed_feed_leaves_no_thread_behind():
  before = set(threading.enumerate())
  feed = make_feed(make_config())
  feed.halves(0)
  assert set(threading.enumerate()) - before
  feed.close()
  left = [t for t in set(threading.enumerate()) - before if t.is_alive()]
  for thread in left:
    thread.join(timeout=10)
  assert not [t for t in left if t.is_alive()]


def test_an_image_that_broke_later_stops_the_run_by_its_name(monkeypatch):
  feed = make_feed(make_config())

  def broken(self, i):
    raise OSError("no such image 7.png")

  monkeypatch.setattr(sources.LazyImages, "middle", broken)
  with pytest.raises(OSError, match="7.png"):
    feed.halves(0)
  feed.close()


@pytest.mark.parametrize("num, batch", [(23, 7), (21, 7), (5, 8), (1, 3)])
def test_evaluation_reads_every_image_once_and_in_order(num, batch):
  config = make_config()
  images = make_dataset(config).train.keep(np.arange(num)).images
  found = list(feeds.batches(images, batch))
  assert [len(rows) for rows in found[:-1]] == [batch] * (len(found) - 1)
  np.testing.assert_array_equal(np.concatenate(found), images[:])


def test_a_streamed_run_is_the_resident_one(finished, tiny_config, tmp_path):
  tiny_config.data.feed = "streaming"
  assert train.train(tmp_path / "run", tiny_config)
  ours, theirs = (
    [
      json.loads(line)
      for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    for workdir in (tmp_path / "run", finished.workdir)
  )
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    for name in a.keys() & {"train_loss", "meta_loss", "accuracy", "count"}:
      # Equal to the last bit.
      assert a[name] == b[name], (a, b)
  results = evaluate.evaluate(tmp_path / "run", tiny_config)
  expected = json.loads((finished.workdir / "results.json").read_text())
  for name in ("anytime", "budgeted", "samples"):
    assert results[name] == expected[name]


def first_losses(num_devices):
  """Of two streamed steps on that many devices; run in a process of its own."""
  from toy import LinearExits

  class Linear(LinearExits):
    num_classes = 10

    def init(self, key):
      weight = jax.random.normal(key, (3, 64, 10))
      return {
        "params": {"weight": 0.1 * weight},
        "batch_stats": {"mean": np.zeros((3, 10), np.float32)},
      }

  from l2w_jax.training.state import init_state

  config, backbone = make_config(), Linear()
  feed = make_feed(config, num_devices)
  state = parallel.replicate(
    init_state(jax.random.key(0), backbone, config), num_devices
  )
  run, losses = train.Step(backbone, config, STEPS, num_devices), []
  run.compile(state, feed.halves(0))
  for step in range(2):
    state, metrics = run(state, feed.halves(step), step)
    losses += [float(x["meta_loss"]) for x in parallel.first(metrics, num_devices)]
  feed.close()
  return losses


@pytest.mark.slow
def test_devices_share_a_streamed_batch():
  done = subprocess.run(
    [sys.executable, __file__],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      "PYTHONPATH": str(ROOT),
    },
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  one, four = json.loads(done.stdout)
  assert len(set(one)) == 4
  # Float32 sums over a batch, in another order.
  np.testing.assert_allclose(four, one, rtol=1e-5)


def test_the_order_leaves_out_the_end_of_an_epoch():
  assert order.steps_per_epoch(270, BATCH) == STEPS


if __name__ == "__main__":
  print(json.dumps([first_losses(1), first_losses(4)]))
