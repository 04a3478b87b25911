"""Signals: held while steps are trained, answered at once anywhere else."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from l2w_jax.run import stopping

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
SIGNALS += [(signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGXCPU, 152)]
# Neither waits nor goes on where an exception would say so.
DEAF = """
print("ready", flush=True)
while True:
  try:
    time.sleep(60)
  except BaseException:
    print("swallowed", flush=True)
"""
HELD = """
with stopping.held():
  print("ready", flush=True)
  while not stopping.asked():
    time.sleep(0.01)
  print("asked", stopping.asked(), flush=True)
  {then}
sys.exit(stopping.exit_code(stopping.asked()))
"""


def start(body: str, before: str = "") -> subprocess.Popen:
  """A program that answers signals, and in its `body` has said "ready"."""
  process = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import os, signal, sys, time\nfrom l2w_jax.run import stopping\n"
      # What the process of the tests ignores, this one would, too.
      "for x in stopping.SIGNALS: signal.signal(x, signal.SIG_DFL)\n"
      f"{before}\nstopping.install()\n{body}",
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n", process.communicate()
  return process


def end(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=20)
  return process.returncode, out, err


@pytest.mark.parametrize("number, code", SIGNALS)
def test_outside_training_a_command_leaves_at_once(number, code):
  process = start(DEAF)
  process.send_signal(number)
  assert end(process) == (code, "", "stopped\n")


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_that_is_held_only_sets_a_flag(number, code):
  process = start(HELD.format(then=""))
  process.send_signal(number)
  assert end(process) == (code, f"asked {int(number)}\n", "")


def test_the_second_signal_ends_at_once():
  process = start(HELD.format(then="time.sleep(60)"))
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == f"asked {int(signal.SIGTERM)}\n"
  time.sleep(2 * stopping.TOGETHER)
  process.send_signal(signal.SIGINT)
  assert end(process) == (130, "", "")


def test_two_at_once_are_one():
  both = "os.kill(os.getpid(), 15); os.kill(os.getpid(), 1)"
  process = start(
    f"print('ready')\nwith stopping.held():\n  {both}\n  time.sleep(0.3)"
  )
  assert end(process) == (0, "", "")


def test_what_was_printed_is_not_lost():
  process = start("print('ready')\nprint('results')\ntime.sleep(60)")
  assert process.stdout.readline() == "results\n"
  process.send_signal(signal.SIGTERM)
  assert end(process) == (143, "", "stopped\n")


def test_a_signal_that_was_ignored_stays_so():
  ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
  process = start("print('ready')\ntime.sleep(0.3)\nprint('done')", ignore)
  process.send_signal(signal.SIGHUP)
  assert end(process) == (0, "done\n", "")


def test_a_signal_waits_for_the_program_that_this_one_turns_into():
  program = (
    "import os, sys\nfrom l2w_jax.run import stopping\n"
    "if 'AGAIN' in os.environ: stopping.install()\n"
    "else:\n"
    "  stopping.install(); stopping.block(); os.kill(os.getpid(), 2)\n"
    "  os.environ['AGAIN'] = ''; os.execv(sys.executable, sys.orig_argv)\n"
    "import time; time.sleep(60)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=20,
  )
  assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_importing_the_package_leaves_signals_alone():
  process = subprocess.run(
    [
      sys.executable,
      "-c",
      "import signal; was = [*map(signal.getsignal, (1, 2, 15))]\n"
      "import l2w_jax.main, l2w_jax.data.prepare\n"
      "from l2w_jax.run import stopping\n"
      "assert was == [*map(signal.getsignal, (1, 2, 15))]\n"
      "with stopping.held(): assert stopping.asked() == 0",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_are_closed_lead_nowhere(closed, tmp_path):
  code = (
    "import os, sys; from l2w_jax.run import stopping; stopping.install(); "
    "print('out'); print('err', file=sys.stderr); assert not sys.stdin.isatty(); "
    f"assert os.open({str(tmp_path)!r}, os.O_RDONLY) > 2"
  )
  done = subprocess.run(
    ["sh", "-c", f'"{sys.executable}" -c "$0" {closed}', code],
    cwd=ROOT,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0
  assert done.stdout == ("" if "1>" in closed else "out\n")
  assert done.stderr == ("" if "2>" in closed else "err\n")
