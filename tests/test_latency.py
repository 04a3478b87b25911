"""The latency table: every way of running, with the costs it is held against."""

import math

import numpy as np
import pytest
from test_early_exit import make_images, make_network, thresholds_for

from l2w_jax.exits import latency
from l2w_jax.exits import policy as exit_policy


def test_every_way_is_timed_beside_its_simulated_cost():
  network, images = make_network(), make_images(20)
  thresholds = thresholds_for(network, images)
  rows = latency.time_all(
    network, images, {"q = 0.75": np.asarray(thresholds)}, {1: (1, 3), 16: (2, 1)}
  )
  kinds = [(row["batch"], row["kind"], row["point"]) for row in rows]
  for batch in (1, 16):
    assert (batch, "full", "all exits") in kinds
    assert (batch, "anytime", "exit 1") in kinds
    assert kinds.count((batch, "early", "q = 0.75")) == 2
  macs = network.backbone.macs
  for row in rows:
    assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
    assert row["p95_ms"] is None  # too few calls to speak of the slowest
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    size = row.get("call", row["batch"])
    assert row["images_per_second"] == pytest.approx(1e3 * size / row["ms"])
    assert row["speedup_by_macs"] == pytest.approx(macs[-1] / row["macs"])
    if row["kind"] == "full":
      assert row["speedup"] == 1 and row["macs"] == macs[-1]
  # The 16 · 2 images of batch 16 are the 20 and the first 12 again.
  own = images[np.resize(np.arange(20), 32)]
  _, confidence = network.simulate(own)
  taken = np.asarray(exit_policy.exits_taken(confidence, thresholds))
  early = [row for row in rows if row["kind"] == "early" and row["batch"] == 16]
  assert [row["call"] for row in early] == [16, 32]
  assert early[0]["macs"] == pytest.approx(macs[taken].mean())


@pytest.mark.parametrize("num, rank", [(5, 1), (8, 1), (12, 3), (20, 6)])
def test_the_interval_of_a_median_is_that_of_order_statistics(num, rank):
  values = np.random.default_rng(0).permutation(num) + 1.0
  median, low, high = latency.median_interval(values)
  assert (median, low, high) == ((num + 1) / 2, rank, num + 1 - rank)
  outside = 2 * sum(math.comb(num, b) for b in range(rank)) / 2**num
  assert num < 6 or outside <= 0.05


def test_the_slowest_are_told_of_many_calls_alone():
  way = latency.Way({"kind": "full", "point": "all exits"}, None, 1, 1.0)
  (row,) = latency._rows([way], {0: np.arange(1, 401) / 1e3}, 20, 1)
  assert row["p95_ms"] == pytest.approx(380.05) and row["ms"] == pytest.approx(
    200.5
  )
