"""Set-up of the suite: types checked, compiled programs kept, one run shared."""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Before JAX is imported. Programs compiled by one test, or one run of the
# suite, serve the others and the processes that tests start.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax")
)
# Programs are compiled more often than run: less optimised, they compile in half
# the time and compute the same numbers.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Commands are not to start a second time for huge pages; one test lets them.
os.environ.setdefault("GLIBC_TUNABLES", "")

from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# An int passes for a float, as PEP 484 has it.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
# Every annotation of the package is checked at each call, shapes included.
install_import_hook("l2w_jax", "conftest.check_types")

# A run of 16 steps on plain digits whose network compiles in seconds.
TINY = {
  "data.source": "digits",
  "batch": 128,
  "optimizer.learning_rate": 0.2,
  "epochs": 2,
  "model.num_exits": 2,
  "model.channels": 4,
  "model.growth": 4,
  "model.classifier_width": 8,
  "meta.hidden": 8,
  "checkpoint.every": 1,
  "evaluate.every": 1,
  "log.weights_every": 1,
}


class Command(NamedTuple):
  """What `python -m l2w_jax.main` with some flags returned and wrote."""

  code: int
  out: str
  err: str


def run_main(*flags: object) -> Command:
  """The command line in a process of its own, as a user would start it."""
  done = subprocess.run(
    [sys.executable, "-m", "l2w_jax.main", *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  return Command(done.returncode, done.stdout, done.stderr)


def tiny_flags() -> list[str]:
  return [
    "--config=configs/digits.py",
    *(f"--config.{key}={value}" for key, value in TINY.items()),
  ]


def enable_x64(enable: bool = True):
  """`jax.enable_x64`, a context, by the name that it had before JAX 0.8."""
  import jax

  if not hasattr(jax, "enable_x64"):
    from jax.experimental import enable_x64 as before

    return before(enable)
  return jax.enable_x64(enable)


class Finished(NamedTuple):
  """A finished run: do not write into its workdir, copy it."""

  workdir: pathlib.Path
  command: Command


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
  """The first command of the README on a tiny network."""
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  return Finished(workdir, run_main(*tiny_flags(), f"--workdir={workdir}"))


@pytest.fixture
def tiny_config():
  """The config of `finished`."""
  from l2w_jax import config

  return config.load_config(str(ROOT / "configs/digits.py"), TINY)


@pytest.fixture(scope="session")
def _all_compilations():
  import jax

  events = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: events.append(event)
  )
  return events


@pytest.fixture
def compilations(_all_compilations):
  """Returns how often XLA compiled, or read a program, since the test began."""
  event = "/jax/core/compile/backend_compile_duration"
  before = _all_compilations.count(event)
  return lambda: _all_compilations.count(event) - before
