"""What the operating system refuses is one line, before training if it can be."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, run_main, tiny_flags

from l2w_jax import main
from l2w_jax.results import drawing
from l2w_jax.run import files, os_errors
from l2w_jax.training import loop as train
from l2w_jax.training.metrics_log import MetricsLog


@pytest.mark.parametrize("number", sorted(os_errors.ADVICE))
def test_a_line_has_the_path_what_was_refused_and_what_to_do(number):
  line = os_errors.explain(OSError(number, os.strerror(number), "a/b"))
  assert line == f"a/b: {os.strerror(number)}; {os_errors.ADVICE[number]}"


def test_other_errors_are_said_as_they_are():
  assert os_errors.explain(OSError("not an\n image")) == "not an image"
  assert os_errors.explain(OSError(errno.EPIPE, "Broken")) == "Broken"
  assert os_errors.explain(OSError()) == "OSError"
  two = OSError(errno.EXDEV, "Invalid link", "a", None, b"b")
  assert os_errors.explain(two) == "a -> b: Invalid link"


def test_errors_without_a_path_get_one():
  with pytest.raises(OSError, match="No space") as caught, os_errors.naming("a/b"):
    raise OSError(errno.ENOSPC, "No space left on device")
  assert caught.value.filename == "a/b"
  with pytest.raises(PermissionError) as caught, os_errors.naming("a/b"):
    open_denied = PermissionError(errno.EACCES, "denied", "c")
    raise open_denied
  assert caught.value.filename == "c"
  # As TensorStore says it.
  with pytest.raises(OSError, match="No space") as caught, os_errors.naming("a/b"):
    raise ValueError("RESOURCE_EXHAUSTED: Failed [os_error_code='28']")
  assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "a/b")
  with pytest.raises(ValueError, match="other"), os_errors.naming("a/b"):
    raise ValueError("other")


def test_a_name_relative_to_a_folder_is_joined_to_it():
  for name, whole in {"c": "/a/b/c", b"c": "/a/b/c", "/d/c": "/d/c"}.items():
    with pytest.raises(OSError, match="denied") as caught, os_errors.naming("/a/b"):
      raise OSError(errno.EACCES, "denied", name)
    assert caught.value.filename == whole


def limited(workdir, code: str, limit: int) -> subprocess.CompletedProcess:
  """A command in which writing beyond a file size fails, as on a full disk."""
  script = f"""
import pathlib, resource, sys
import numpy as np
from l2w_jax.run import command, files
from l2w_jax.training.checkpoint import Checkpoints
from l2w_jax.training.metrics_log import MetricsLog
def main():
{textwrap.indent(textwrap.dedent(code), "  ")}
workdir = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
with command.one_line_errors():
  main()
"""
  return subprocess.run(
    [sys.executable, "-c", script, str(workdir)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


TOO_LARGE = os.strerror(errno.EFBIG)


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
  code = """
    with Checkpoints(workdir, 2) as checkpoints:
      for step in (1, 2):
        checkpoints.save(step, {"a": np.random.rand(10_000)}, {})
  """
  done = limited(tmp_path, code, limit=20_000)
  assert len(done.stderr.splitlines()) == 1, done.stderr
  line = done.stderr
  assert line.startswith(f"error: {tmp_path}/checkpoints: {TOO_LARGE}; raise")
  assert done.returncode == 1


def test_a_last_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
  code = """
    checkpoints = Checkpoints(workdir, 2)
    checkpoints.save(1, {"a": np.random.rand(10_000)}, {})
    checkpoints.wait()
  """
  done = limited(tmp_path, code, limit=20_000)
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stderr.startswith(
    f"error: {tmp_path}/checkpoints: {TOO_LARGE}; raise"
  )
  assert done.returncode == 1


def test_a_metrics_file_that_cannot_be_written_is_one_line(tmp_path):
  code = """
    with MetricsLog(workdir) as log:
      for step in range(1000):
        log.write("train", step, 0.0, {"loss": 1.0, "nan": float("nan")})
        log.flush()
  """
  done = limited(tmp_path, code, limit=20_000)
  # TensorBoard's events are the larger file: they end first, and nothing waits.
  lines = done.stderr.splitlines()
  assert lines[-1].startswith(
    f"error: {tmp_path}/metrics.jsonl: {TOO_LARGE}; raise"
  )
  assert all("no TensorBoard events from here on" in line for line in lines[:-1])
  assert len(lines) <= 2 and done.returncode == 1


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(tmp_path):
  files.write(tmp_path / "results.json", "old")
  done = limited(
    tmp_path, 'files.write(workdir / "results.json", 30_000 * "x")', 20_000
  )
  assert len(done.stderr.splitlines()) == 1, done.stderr
  line = done.stderr
  assert line.startswith(f"error: {tmp_path}/results.json: {TOO_LARGE}; raise")
  assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
  assert (tmp_path / "results.json").read_text() == "old"


def test_a_link_is_followed_and_what_is_no_file_is_left_alone(tmp_path):
  (tmp_path / "there").mkdir()
  real, link, pipe = (tmp_path / x for x in ("there/real", "link", "pipe"))
  link.symlink_to("there/real")
  for data in ("new", "newer"):
    files.write(link, data)
    assert link.is_symlink() and real.read_text() == data
  os.mkfifo(pipe)
  real.unlink()
  real.symlink_to(pipe)
  for path in (pipe, link):
    with pytest.raises(ValueError, match=f"{path} is there and no regular file; "):
      files.write(path, "data")
    assert pipe.is_fifo()
  link.unlink()
  link.symlink_to(link)
  with pytest.raises(OSError, match="symbolic links"):
    files.write(link, "data")


@pytest.mark.parametrize("place", ["/dev/full", None])
def test_standard_output_that_takes_no_more_is_one_line(place):
  script = (
    "from l2w_jax.run import command, stopping\nstopping.install()\n"
    "with command.one_line_errors():\n  while True:\n    print('x' * 1000)"
  )
  reader, writer = os.pipe()
  os.close(reader)
  if place:
    writer = os.open(place, os.O_WRONLY)
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT,
    stdout=writer,
    stderr=subprocess.PIPE,
    text=True,
    timeout=60,
  )
  os.close(writer)
  assert len(done.stderr.splitlines()) == 1, done.stderr
  line = done.stderr
  assert line.startswith("error: standard output: ") and done.returncode == 1


def test_places_are_checked_before_training(tmp_path, tiny_config, compilations):
  (tmp_path / "file").touch()
  with pytest.raises(NotADirectoryError) as caught:
    main.run("all", tmp_path / "file/run", tiny_config)
  assert caught.value.filename == tmp_path / "file"
  with pytest.raises(OSError, match="too long"):
    main.run("all", tmp_path / ("x" * 300), tiny_config)
  (tmp_path / "run").mkdir()
  for name in ("report", "checkpoints"):
    (tmp_path / "run" / name).touch()
    with pytest.raises(NotADirectoryError) as caught:
      main.run("all", tmp_path / "run", tiny_config)
    assert caught.value.filename == tmp_path / "run" / name
    (tmp_path / "run" / name).unlink()
  assert not list((tmp_path / "run").iterdir()) and compilations() == 0


@pytest.mark.parametrize("name", ["export", "onnx"])
def test_a_folder_of_an_export_is_checked_before_it(
  finished, tmp_path, compilations, name
):
  workdir = shutil.copytree(finished.workdir, tmp_path / "run")
  (workdir / name).touch()
  with pytest.raises(NotADirectoryError) as caught:
    main.run("export", workdir, None)
  assert caught.value.filename == workdir / name and compilations() == 0


@pytest.mark.parametrize("mode", ["all", "train", "evaluate", "report"])
def test_a_place_that_cannot_be_written_is_told_at_once(
  finished, tiny_config, monkeypatch, compilations, mode
):
  def refuse(dir):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{dir}/tmp123")

  monkeypatch.setattr(os_errors.tempfile, "TemporaryFile", refuse)
  with pytest.raises(OSError, match="Read-only") as caught:
    main.run(mode, finished.workdir, tiny_config)
  there = finished.workdir / ("report" if mode == "report" else "")
  assert caught.value.filename == str(there) and compilations() == 0


def test_a_command_says_it_in_one_line_and_leaves_with_1():
  command = run_main(*tiny_flags(), "--workdir=/dev/null/run")
  assert command.err.startswith("error: /dev/null: Not a directory; a part of the ")
  assert len(command.err.splitlines()) == 1
  assert command.code == 1 and command.out == ""


@pytest.mark.parametrize("mode", ["all", "train", "evaluate"])
def test_a_target_is_read_before_training(
  tmp_path, tiny_config, compilations, mode
):
  with tiny_config.unlocked():
    tiny_config.evaluate.target = "accuracy:93"
  workdir = tmp_path / "run"
  if mode == "evaluate":
    workdir.mkdir()
    train.directory.write_config(workdir, tiny_config)
  with pytest.raises(ValueError, match="did you mean accuracy:0.93"):
    main.run(mode, workdir, tiny_config)
  assert compilations() == 0 and not list(tmp_path.rglob("checkpoints"))


def test_a_report_that_cannot_be_drawn_is_told_before_training(
  tmp_path, tiny_config, monkeypatch
):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ValueError, match="needs matplotlib .*pip install"):
    main.run("all", tmp_path / "run", tiny_config)
  with pytest.raises(ValueError, match="needs matplotlib"):
    drawing.check()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [None, object()])
def test_without_tensorboardX_there_are_no_events(tmp_path, monkeypatch, module):
  monkeypatch.setitem(sys.modules, "tensorboardX", module)
  with MetricsLog(tmp_path) as log:
    log.write("train", 1, 0.5, {"train_loss": float("nan")})
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_orbax_leaves_behind_is_not_told():
  code = """
import asyncio, logging, sys
from l2w_jax.run import command
with command.one_line_errors():
  loop = asyncio.new_event_loop()
  future = loop.create_future()
  future.set_exception(OSError("one of many writes"))
  del future  # never retrieved
  class Late:
    def __del__(self):
      raise RuntimeError(self.why)
  for Late.why in ("Event loop is closed", "something else"):
    Late()
  raise ValueError("the one that counts")
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert "one of many" not in done.stderr and "is closed" not in done.stderr
  assert "RuntimeError: something else" in done.stderr
  assert done.stderr.splitlines()[-1] == "error: the one that counts"


@pytest.mark.parametrize(
  "words, says", [("", "close other programs, or take"), ("of it", "of it")]
)
def test_memory_that_is_not_there_is_one_line(words, says):
  code = (
    "from l2w_jax.run import command\n"
    f"with command.one_line_errors(): raise MemoryError({words!r})"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.stderr.startswith(f"error: not enough memory: {says}")
  assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_a_write_that_fails_names_the_file_that_was_asked_for(tmp_path):
  for path in (tmp_path / "none" / "x.json", tmp_path):
    (tmp_path / "inside").touch()  # or a file takes the place of the folder
    with pytest.raises(OSError) as error:
      files.write(path, "x")
    assert error.value.filename == str(path)
    assert str(os.getpid()) not in str(error.value)
