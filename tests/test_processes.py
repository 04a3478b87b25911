"""Several processes give what one gives, and one that dies stops the others.

This file is also the program that each of the processes runs.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_parallel as one_process
from conftest import ROOT, enable_x64, tiny_flags
from jax.experimental import multihost_utils

from l2w_jax.data import feeds
from l2w_jax.run import parallel
from l2w_jax.training import loop, scores

CASES = {
  "linear exits": ("linear", "exits", "resident"),
  "linear batch": ("linear", "batch", "streaming"),
  "linear all": ("linear", "all", "resident"),
  "msdnet all": ("msdnet", "all", "streaming"),
}


def start_case(name):
  """(config, backbone, data set) of a case."""
  network, center_over, feed = CASES[name]
  config = one_process.make_config(center_over)
  config.data.feed = feed
  backbone = (
    one_process.Linear() if network == "linear" else one_process.make_msdnet()
  )
  return config, backbone, one_process.make_dataset(config)


def outcome(name, num_devices):
  """Leaves of state and metrics of the last of two steps."""
  config, backbone, dataset = start_case(name)
  state = one_process.start(config, backbone)
  with enable_x64(True):
    feed = feeds.make_feed(dataset, config, jax.random.key(1), num_devices)
    step_fn = loop.Step(backbone, config, one_process.STEPS_PER_EPOCH, num_devices)
    state = parallel.replicate(state, num_devices)
    step_fn.compile(state, feed.halves(0))
    for step in range(one_process.STEPS):
      state, metrics = step_fn(state, feed.halves(step), step)
    feed.close()
    metrics = multihost_utils.process_allgather(metrics, tiled=True)
    metrics = one_process.of_whole_halves(metrics, num_devices)
    state = jax.device_get(parallel.first(state, num_devices))
    return jax.tree.leaves((state, metrics))


def confidences(num_devices):
  """Confidences on a split whose size no batch divides."""
  config, backbone, dataset = start_case("linear all")
  variables = parallel.replicate(backbone.init(jax.random.key(0)), num_devices)
  score = scores.compile_scorer(variables, backbone, dataset, config, num_devices)
  return score(variables, dataset.test).confidence


def main(coordinator, num_processes, process_id, folder, *cases):
  parallel.initialize(coordinator, int(num_processes), int(process_id))
  num_devices = parallel.count_devices(0)
  arrays = {
    f"{name} {i}": leaf
    for name in cases
    for i, leaf in enumerate(outcome(name, num_devices))
  }
  assert parallel.from_writer({"process": int(process_id)}) == {"process": 0}
  agree = parallel.Agreement(num_devices)
  said = [agree(int(process_id) if step < 2 else 0, 5) for step in range(4)]
  last = int(num_processes) - 1
  assert said == [(0, 0), (last, 5), (last, 5), (0, 5)]
  assert parallel.largest(int(process_id)) == last
  np.savez(
    pathlib.Path(folder) / f"{process_id}.npz",
    **arrays,
    scores=confidences(num_devices),
    devices=num_devices,
  )


def launch(command, num_processes, devices=1):
  """Starts the processes of one run: command(coordinator, process_id)."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{server.getsockname()[1]}"
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command(coordinator, i))],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ
      | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_"
        f"device_count={devices}",
      },
    )
    for i in range(num_processes)
  ]


@pytest.mark.parametrize(
  "num_processes, devices, cases",
  [
    (2, 1, ["linear batch", "linear all"]),
    pytest.param(2, 2, ["linear all", "msdnet all"], marks=pytest.mark.slow),
    pytest.param(4, 1, ["linear exits", "linear batch"], marks=pytest.mark.slow),
  ],
)
def test_processes_agree_with_one(num_processes, devices, cases, tmp_path):
  processes = launch(
    lambda coordinator, i: (
      __file__,
      coordinator,
      num_processes,
      i,
      tmp_path,
      *cases,
    ),
    num_processes,
    devices,
  )
  for process in processes:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
  for i in range(num_processes):
    with np.load(tmp_path / f"{i}.npz") as ours:
      assert ours["devices"] == num_processes * devices
      for name in cases:
        expected = outcome(name, 1)
        leaves = [ours[f"{name} {j}"] for j in range(len(expected))]
        # Float64: sums over a batch in another order, through two steps.
        assert one_process.relative_difference(leaves, expected) < 1e-12
      np.testing.assert_allclose(ours["scores"], confidences(1), rtol=1e-5)


@pytest.mark.slow
def test_one_that_dies_stops_the_others_and_the_run_resumes(tmp_path):
  workdir = tmp_path / "run"

  def command(coordinator, i):
    return [
      "-m",
      "l2w_jax.main",
      *tiny_flags(),
      "--config.method=uniform",
      "--config.epochs=4",
      f"--workdir={workdir}",
      "--num_processes=2",
      f"--coordinator={coordinator}",
      f"--process_id={i}",
    ]

  processes = launch(command, 2)
  deadline = time.monotonic() + 200
  while not list(workdir.glob("checkpoints/[0-9]*")):
    assert time.monotonic() < deadline, processes[0].communicate()[0]
    assert processes[0].poll() is None, processes[0].communicate()[0]
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGKILL)
  died = time.monotonic()
  output, _ = processes[0].communicate(timeout=120)
  assert time.monotonic() - died < 60
  assert processes[0].returncode != 0
  assert "another" in output  # that it is most likely another one's fault
  processes[1].communicate()

  processes = launch(command, 2)
  outputs = [process.communicate(timeout=200)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert "resuming after step" in outputs[0]
  assert "train" not in outputs[1]  # one process writes
  assert (workdir / "results.json").exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("localhost:1", 2, None), "belong together"),
    (("localhost:1", 2, 2), "below --num_processes=2"),
  ],
)
def test_flags_that_do_not_fit(arguments, message):
  with pytest.raises(ValueError, match=message):
    parallel.initialize(*arguments)


if __name__ == "__main__":
  main(*sys.argv[1:])
