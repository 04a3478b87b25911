"""Addresses, platforms and streams: one line, and before anything waits."""

import os
import re
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT

from l2w_jax.run import backend, parallel


@pytest.mark.parametrize(
  "coordinator",
  [
    "localhost",
    "localhost:",
    "localhost:abc",
    "localhost:0",
    "localhost:65536",
    "localhost:-1",
    "localhost:1_0",
    ":1234",
    "",
    "http://host:1234",
    "two words:1234",
    "a:b:1234",
    "[::1:1234",
    "[:::]:1234",
    "::1:1234",
    "me@host:1234",
  ],
)
def test_a_coordinator_is_a_host_and_a_port(coordinator, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
  with pytest.raises(ValueError) as refused:
    parallel.initialize(coordinator, 1, 0)
  (line,) = str(refused.value).splitlines()
  assert line.startswith(f"--coordinator={coordinator} must be HOST:PORT")


@pytest.mark.parametrize(
  "coordinator, says",
  [
    ("localhost:1234", r"processes of this run \(--coordinator=localhost:1234\)"),
    ("[::1]:1234", r"processes of this run \(--coordinator=\[::1\]:1234\)"),
    ("no.such.invalid:1234", "the name no.such.invalid of .* to be known here"),
    (None, "the other processes of this run"),
  ],
)
def test_processes_that_wait_say_for_what(coordinator, says, monkeypatch, capsys):
  monkeypatch.setattr(parallel, "PATIENCE_SECONDS", 0.01)
  monkeypatch.setattr(parallel.socket, "getaddrinfo", resolve)
  given = (coordinator, 2, 1) if coordinator else (None, None, None)

  def wait(*found, **unused):
    assert found == given
    until = time.monotonic() + 10
    while time.monotonic() < until and not (err := capsys.readouterr().err):
      time.sleep(0.01)
    raise RuntimeError(f"nobody came\n{err}")

  monkeypatch.setattr(jax.distributed, "initialize", wait)
  with pytest.raises(ValueError, match="did not find each other: nobody") as error:
    parallel.initialize(*given)
  _, line = str(error.value.__cause__).strip().split("\n")
  assert re.fullmatch(rf"waiting until \d\d:\d\d:\d\d for .*{says}", line)


def resolve(host, port):
  if host.endswith(".invalid"):
    raise OSError("unknown")


def test_what_keeps_devices_from_starting_is_named(monkeypatch):
  def broken():
    raise RuntimeError("no such thing\nand more")

  monkeypatch.setattr(jax, "devices", broken)
  for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES"):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ValueError, match="start its devices: no such thing$"):
    backend.check()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "0")
  with pytest.raises(ValueError) as refused:
    backend.check()
  assert (
    "with JAX_PLATFORMS=cpu, JAX_NUM_CPU_DEVICES=0: no such thing; unset "
    "JAX_PLATFORMS and JAX_NUM_CPU_DEVICES to compute"
  ) in str(refused.value)


def start(*flags, **environment):
  return subprocess.Popen(
    [sys.executable, "-m", "l2w_jax.main", *flags],
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_streams_and_backends_of_all_kinds(tmp_path):
  """Started side by side: each takes seconds to import JAX."""
  report = "--mode=report"
  ascii_ = start(
    report, f"--workdir={tmp_path / 'läuft'}", PYTHONIOENCODING="ascii"
  )
  nonsense = start(report, f"--workdir={tmp_path}", MPLBACKEND="nonsense")
  for command, says in (
    (ascii_, r"/l\xe4uft does not exist; train one first"),
    (nonsense, "matplotlib does not know MPLBACKEND=nonsense; unset it"),
  ):
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_standard_output_is_one_line():
  script = (
    "from l2w_jax.run import command, huge_pages; huge_pages.use = lambda: 0; "
    "command.run(lambda arguments: print('answer'))"
  )
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", script],
      cwd=ROOT,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      timeout=60,
    )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: standard output: No space left on device")


def test_more_processes_than_jax_can_count_are_refused(monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
  with pytest.raises(ValueError, match="=99999999999 is more than 1,000,000; give"):
    parallel.initialize("localhost:1234", 99_999_999_999, 0)
