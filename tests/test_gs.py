"""Run directories on gs://, against an emulator of its API on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from http import HTTPStatus
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, tiny_flags

from l2w_jax.run import lock

pytest.importorskip("gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server")

from gcp_storage_emulator.exceptions import NotFound  # noqa: E402
from gcp_storage_emulator.handlers import objects  # noqa: E402

WORKDIR = "gs://bucket/runs/tiny"


def _generation(request, storage) -> str:
  """Generation of an object; "0", as gs:// has it, if there is none."""
  name = request.params.get("object_id") or request.query["name"][0]
  try:
    return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
  except NotFound:
    return "0"


def _told(handler):
  """Answers of the emulator with the generation, as the API promises."""

  def handle(request, response, storage):
    handler(request, response, storage)
    response["x-goog-generation"] = _generation(request, storage)

  return handle


def _conditional(handler):
  """Writes only at the generation that was asked for, as the API promises."""

  def handle(request, response, storage, *args):
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != _generation(request, storage):
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
    handler(request, response, storage, *args)

  return handle


class Emulator(NamedTuple):
  """Environment of a command that sees the bucket, and what is in it."""

  environment: dict[str, str]
  storage: Any

  def start(self, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, "-m", "l2w_jax.main", *flags],
      cwd=ROOT,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def names(self) -> set[str]:
    prefix = WORKDIR.removeprefix("gs://bucket/") + "/"
    objects, _ = self.storage.get_file_list("bucket", prefix, None)
    return {found["name"].removeprefix(prefix) for found in objects}

  def read(self, name: str) -> bytes:
    path = f"{WORKDIR}/{name}".removeprefix("gs://bucket/")
    return self.storage.get_file("bucket", path)


@pytest.fixture(scope="module")
def emulator():
  made = {
    objects.download: _told(objects.download),
    objects.insert: _conditional(objects.insert),
    objects.delete: _conditional(objects.delete),
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(objects, "download", made[objects.download])
    for _, handlers in server.HANDLERS:
      for method, handler in handlers.items():
        patch.setitem(handlers, method, made.get(handler, handler))
    started = server.create_server(
      "127.0.0.1", 0, in_memory=True, default_bucket="bucket"
    )
    started.start()
    where = f"http://127.0.0.1:{started._api._httpd.server_port}"
    environment = os.environ | {
      "TENSORSTORE_GCS_HTTP_URL": where,
      "STORAGE_EMULATOR_HOST": where,
      # Would ask a kind of bucket that the emulator has not.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    yield Emulator(environment, started._storage)
    started.stop()


def test_a_run_on_gs_is_stopped_and_goes_on(emulator, finished):
  flags = [*tiny_flags(), "--config.log.seconds=0.01", f"--workdir={WORKDIR}"]
  first = emulator.start(*flags)
  err = ""
  for line in first.stderr:
    err += line
    if " step 2/16" in line:
      first.send_signal(signal.SIGTERM)
  first.communicate(timeout=60)
  assert first.returncode == 143, err
  stopped = int(re.search(r"stopped at step (\d+); the same", err)[1])
  assert 2 <= stopped < 16 and "lock.json" not in emulator.names()
  again = emulator.start(*flags)
  out, err = again.communicate(timeout=120)
  assert again.returncode == 0, err
  assert f"resuming after step {stopped}" in err
  assert f"report: {WORKDIR}/report/index.html" in out
  names = emulator.names()
  assert {
    "config.json",
    "metrics.jsonl",
    "results.json",
    "scores.npz",
    "samples.npz",
    "curves.csv",
    "confusion.csv",
    "report/index.html",
  } <= names
  assert "lock.json" not in names
  steps = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
  assert {"8", "16"} <= steps
  # The same as without a stop, and as on a disk.
  ours = json.loads(emulator.read("results.json"))
  theirs = json.loads((finished.workdir / "results.json").read_text())
  for name in ("anytime", "budgeted", "chosen", "temperatures"):
    assert ours[name] == theirs[name], name
  lines = [json.loads(line) for line in emulator.read("metrics.jsonl").splitlines()]
  assert [x["step"] for x in lines if x["kind"] == "train"] == list(range(1, 17))


def test_a_bucket_that_is_not_there(emulator):
  done = emulator.start(*tiny_flags(), "--workdir=gs://none/run")
  out, err = done.communicate(timeout=60)
  assert done.returncode == 2 and out == ""
  line = err.splitlines()[-1]
  assert line.startswith("error: cannot use gs://none/run")
  assert "check that the bucket exists" in line


def test_a_run_that_another_process_writes(emulator):
  holder = {
    "host": "here",
    "pid": os.getpid(),
    "started": lock._started(os.getpid()),
    "machine": lock._machine(),
  }
  name, data = "runs/held/lock.json", json.dumps(holder).encode()
  found = objects._make_object_resource("", "bucket", name, "", str(len(data)))
  emulator.storage.create_file(
    "bucket", name, data, objects._checksums(data, found)
  )
  done = emulator.start(*tiny_flags(), "--workdir=gs://bucket/runs/held")
  out, err = done.communicate(timeout=60)
  assert done.returncode == 2
  assert f"is being written by process {os.getpid()} on here" in err
