"""One run, one writer: who is refused, who takes over, and what is left behind."""

import json
import os
import subprocess
import sys
import time

import pytest

from l2w_jax.run import files, lock

HOLD = """
import sys, pathlib, time
from l2w_jax.run import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """(run directory, another process that holds it)."""
  workdir = tmp_path / "a b" / "ü"
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, workdir], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "held\n"
    yield workdir, process
    process.kill()


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "PATIENCE", 1.0)


def change(workdir, **values):
  """Edits the lock."""
  path = workdir / lock.NAME
  found = json.loads(path.read_text()) if path.exists() else {}
  files.make_folder(workdir)
  path.write_text(json.dumps(found | values))


def test_the_second_is_refused_by_name_until_the_first_is_killed(holder, capsys):
  workdir, process = holder
  with pytest.raises(ValueError, match=f"process {process.pid} on") as refused:
    with lock.held(workdir):
      pass
  assert "\n" not in str(refused.value) and os.uname().nodename in str(
    refused.value
  )
  assert (workdir / lock.NAME).exists()
  process.kill()  # and not waited for: what is left of it still has its number
  time.sleep(0.2)
  with lock.held(workdir):
    assert f"process {process.pid} on" in capsys.readouterr().err
  assert list(workdir.iterdir()) == []


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path, capsys):
  with lock.held(tmp_path):
    held = json.loads((tmp_path / lock.NAME).read_text())
  change(tmp_path, **held | {"started": "1"})
  with lock.held(tmp_path):
    assert "taken over" in capsys.readouterr().err


@pytest.mark.parametrize("left", ['{"host": "tpu-7", "pid": 1}', "", "[", "[1]"])
def test_one_of_another_machine_is_taken_over_without_a_sign_of_life(
  tmp_path, left, quick, capsys
):
  (tmp_path / lock.NAME).write_text(left)
  with lock.held(tmp_path):
    pass
  waits, takes = capsys.readouterr().err.splitlines()
  name = "process 1 on tpu-7" if "tpu" in left else "process ? on ?"
  assert "waiting up to 1 s" in waits and name in waits
  assert "taken over" in takes and name in takes


def test_one_of_another_machine_is_refused_at_a_sign_of_life(
  tmp_path, quick, monkeypatch
):
  monkeypatch.setattr(lock, "_machine", lambda: "other")
  with lock.held(tmp_path):
    monkeypatch.setattr(lock, "_machine", lambda: "this")
    with pytest.raises(ValueError, match="being written by process"):
      with lock.held(tmp_path):
        pass


def test_a_name_that_no_checkpoint_can_have_is_one_error(tmp_path):
  with pytest.raises(ValueError, match="bytes that are no UTF-8.* another place"):
    files.path(tmp_path / os.fsdecode(b"caf\xe9"))


def test_of_many_that_take_over_at_once_one_does(tmp_path):
  change(tmp_path, host="here", pid=1, machine=lock._machine(), started="1")
  code = HOLD.replace("60", "1.5").replace("import sys", "input();import sys")
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, tmp_path],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    for _ in range(4)
  ]
  for process in processes:
    process.stdin.write("\n")
    process.stdin.flush()
  assert sum("held" in process.communicate()[0] for process in processes) == 1


def test_whoever_finds_its_lock_gone_ends(tmp_path):
  code = HOLD.replace("with lock", "lock.BEAT = 0.1\nwith lock")
  with subprocess.Popen(
    [sys.executable, "-c", code, tmp_path],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    process.stdout.readline()
    change(tmp_path, pid=1)
    _, err = process.communicate(timeout=20)
  assert process.returncode == 1
  assert err.startswith("error: ") and err.count("\n") == 1
  assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == 1


@pytest.mark.parametrize("error", [SystemExit, ValueError, KeyboardInterrupt])
def test_it_is_released_on_every_way_out(tmp_path, error):
  workdir = tmp_path / "run"
  with pytest.raises(error), lock.held(workdir):
    assert (workdir / lock.NAME).exists()
    raise error
  assert not workdir.exists()  # nothing was written


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="file") as error, lock.held(tmp_path / "file"):
    pass
  assert error.value.errno


def test_a_run_keeps_its_lock_while_it_is_written(tmp_path, monkeypatch):
  from l2w_jax import main

  (tmp_path / "config.json").touch()
  seen = []
  monkeypatch.setattr(main, "_run", lambda *_: seen.append(os.listdir(tmp_path)))
  main.run("report", tmp_path, None)
  with pytest.raises(ValueError, match="missing does not exist"):
    main.run("report", tmp_path / "missing", None)
  assert len(seen) == 1 and lock.NAME in seen[0]
  assert os.listdir(tmp_path) == ["config.json"]
