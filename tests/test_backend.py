"""A backend with wrong sums is refused; every run says what computes."""

import os
import re
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT, run_main

from l2w_jax.run import backend

LINE = r"\d+ cpu devices? \(cpu\), JAX [\d.]+, 1 process"


def test_the_sum_is_right_here():
  assert backend.sum_of_products() == 2**30
  backend.check()


@pytest.mark.parametrize(
  "platform, version, may_set",
  [("cpu", (0, 10, 2), True), ("cpu", (0, 9, 2), False), ("gpu", (0, 11), False)],
)
def test_a_wrong_sum_is_refused_with_what_to_do(
  platform, version, may_set, monkeypatch
):
  device = types.SimpleNamespace(platform=platform)
  monkeypatch.setattr(backend.jax, "devices", lambda: [device])
  monkeypatch.setattr(backend.jax, "__version__", ".".join(map(str, version)))
  monkeypatch.setattr(backend.jax, "__version_info__", version)
  # What jaxlib 0.10.2 computes.
  monkeypatch.setattr(backend, "sum_of_products", lambda: 1_065_369_600.0)
  monkeypatch.setenv("XLA_FLAGS", "--mine=1")
  with pytest.raises(ValueError) as refused:
    backend.check()
  says = str(refused.value)
  assert f"JAX {backend.jax.__version__} computes wrong sums of products" in says
  assert "jax-ml/jax#39103: 1065369600 where 1073741824 is right" in says
  assert f'pip install "jax!={backend.jax.__version__}"' in says
  flags = 'XLA_FLAGS="--mine=1 --xla_cpu_experimental_ynn_fusion_type="'
  assert (flags in says) is may_set and ("XLA_FLAGS" in says) is may_set


@pytest.mark.parametrize(
  "name, value",
  [
    ("jax_disable_jit", True),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_transfer_guard", "disallow"),
    ("jax_transfer_guard_device_to_host", "disallow_explicit"),
  ],
)
def test_settings_that_end_every_run_are_named(name, value):
  was = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    with pytest.raises(ValueError, match=f"^{name.upper()}={value}: .*; unset it$"):
      backend.check()
  finally:
    jax.config.update(name, was)
  backend.check()


def test_devices_version_and_processes_in_words(monkeypatch):
  assert re.fullmatch(LINE, backend.describe())
  monkeypatch.setattr(backend.jax, "device_count", lambda: 8)
  monkeypatch.setattr(backend.jax, "process_count", lambda: 2)
  assert backend.describe().startswith("8 cpu devices (cpu), ")
  assert backend.describe(1).startswith("1 of 8 cpu devices (cpu), ")
  assert backend.describe().endswith(", 2 processes")


def test_the_first_line_of_a_run_names_them(finished):
  assert re.fullmatch(f"train l2w: {LINE}", finished.command.err.splitlines()[0])
  command = run_main("--mode=report", f"--workdir={finished.workdir}")
  assert re.fullmatch(f"report: {LINE}\n", command.err)


COMMANDS = [
  ["-m", "l2w_jax", "--mode=evaluate", "--workdir=none"],
  ["-m", "l2w_jax.convert", "--export=none.pth", "--workdir=none"],
  ["-m", "l2w_jax.data.prepare", "mnist"],
  ["-m", "l2w_jax", "compare", "--config=configs/digits.py", "--workdir=none"],
  ["experiments/benchmark.py", "configs/digits.py", "--compile-only"],
]


@pytest.mark.parametrize(
  "command, platform",
  [(COMMANDS[0], "nonsense"), *((command, "cuda") for command in COMMANDS)],
)
def test_a_platform_that_is_not_here_is_one_line(command, platform):
  done = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: JAX ") and f"JAX_PLATFORMS={platform}: " in line
  assert done.returncode == 2 and done.stdout == ""
