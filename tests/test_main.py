"""The command line: the first command end to end, and one line for an error."""

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_main, tiny_flags

from l2w_jax import config as config_lib
from l2w_jax import main
from l2w_jax.run import parallel
from l2w_jax.training import loop as train
from l2w_jax.training import scores

# jaxlib 0.8 to 0.10.1 says of each program in the compile cache that LLVM's
# preferences, such as prefer-no-gather, are no features of this machine.
XLA_ON_CACHED_PROGRAMS = " cpu_aot_loader.cc:"


def own_lines(err: str) -> list[str]:
  return [line for line in err.splitlines() if XLA_ON_CACHED_PROGRAMS not in line]


def read_results(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "results.json").read_text())


def test_the_first_command_trains_evaluates_and_reports(finished):
  workdir, command = finished
  assert command.code == 0, command.err
  assert {path.name for path in workdir.iterdir()} >= {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "results.json",
    "report",
  }
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8", "16"}
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["num_exits"] == 2 and config["meta"]["epsilon"] == 0.8
  assert [path.name for path in (workdir / "report").iterdir()] == ["index.html"]
  page = (workdir / "report" / "index.html").read_text()
  for name in ("curves", "classes", "weights", "samples", "training"):
    assert f'aria-label="{name}"' in page
  assert 'download="curves.csv" href="data:text/csv;base64,' in page
  # What is being written is never left behind.
  assert not [path for path in workdir.rglob(".*") if path.is_file()]


def test_what_the_first_command_says(finished):
  workdir, (_, out, err) = finished
  lines = out.splitlines()
  assert [
    re.match(r"exit \d: +\d+\.\d\d M MACs, accuracy \d+\.\d\d %$", line) is not None
    for line in lines
  ] == [True, True, False, False]
  point = (
    r"q:0\.75: 0\.\d\d M MACs on average \(\d+ %\), accuracy \d+\.\d\d %, leaving "
    r"at the exits \d+\.\d %, \d+\.\d %, thresholds 0\.\d+, -inf$"
  )
  assert re.match(point, lines[2])
  assert lines[3] == f"report: {workdir}/report/index.html"
  # Nothing but our own lines: no log of a library, no warning.
  for line in own_lines(err):
    assert line.startswith(("train l2w: ", "evaluate: ")), line
  assert "train l2w: step 16/16 (100 %), " in err
  assert "evaluate: image 720/720 (100 %)" in err


def test_results_hold_what_is_promised(finished):
  results = read_results(finished.workdir)
  anytime, budgeted = results["anytime"], results["budgeted"]
  assert [row["exit"] for row in anytime] == [1, 2]
  assert [row["q"] for row in budgeted] == [q / 20 for q in range(1, 40)]
  for row in budgeted:
    assert row.keys() >= {
      "q",
      "thresholds",
      "calibration_accuracy",
      "accuracy",
      "macs",
      "exits",
    }
    assert len(row["thresholds"]) == len(row["exits"]) == 2
    assert row["thresholds"][-1] == "-inf"
    assert sum(row["exits"]) == pytest.approx(1, abs=1e-6)
    assert anytime[0]["macs"] <= row["macs"] <= anytime[1]["macs"]
  for row in anytime + budgeted:
    # Of 360 images, in float32.
    assert row["accuracy"] * 360 == pytest.approx(
      round(row["accuracy"] * 360), abs=1e-4
    )
  assert results["samples"] == {"train": 1077, "calibration": 360, "test": 360}
  assert results["params"] == results["params_to_exit"][-1] > 0
  assert {"train", "compile", "evaluate"} <= results["seconds"].keys()
  assert all(seconds > 0 for seconds in results["seconds"].values())
  assert results["versions"].keys() >= {"l2w_jax", "jax", "flax", "optax"}
  assert results["device"].keys() >= {"platform", "kind", "count"}
  assert results["step"] == 16 and results["complete"] is True


def test_metrics_have_a_line_for_every_step(finished):
  lines = [
    json.loads(line)
    for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()
  ]
  train = [line for line in lines if line["kind"] == "train"]
  assert [line["step"] for line in train] == list(range(1, 17))
  assert all(line["meta_loss"] > 0 and line["train_loss"] > 0 for line in train)
  for kind in ("evaluate", "weights"):
    assert [line["step"] for line in lines if line["kind"] == kind] == [8, 16]


def test_tensorboard_events_are_written(finished):
  pytest.importorskip("tensorboardX")
  (events,) = (finished.workdir / "tensorboard").iterdir()
  written = events.read_bytes()
  for tag in (b"train/train_loss", b"train/meta_loss", b"evaluate/accuracy/exit_2"):
    assert tag in written


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished.workdir, tmp_path / "run")


def contents(workdir):
  return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_running_again_says_so_and_returns_at_once(
  workdir, tiny_config, capsys, monkeypatch
):
  monkeypatch.setattr(train, "Step", None)
  monkeypatch.setattr(scores, "compile_scorer", None)
  before = contents(workdir)
  main.run("all", workdir, tiny_config)
  out = capsys.readouterr()
  assert "training had already finished" in out.out
  assert f"nothing to do; see {workdir}/report/index.html" in out.out
  assert out.err == ""
  assert contents(workdir) == before


def test_running_again_makes_up_for_a_missing_report(workdir, tiny_config, capsys):
  shutil.rmtree(workdir / "report")
  (workdir / "results.json").unlink()
  main.run("all", workdir, tiny_config)
  assert "nothing to do" not in capsys.readouterr().out
  assert (workdir / "report/index.html").exists()
  assert (workdir / "results.json").exists()


def test_evaluate_and_report_by_themselves(finished, workdir, capsys):
  shutil.rmtree(workdir / "report")
  (workdir / "results.json").unlink()
  main.run("evaluate", workdir, None)
  assert not (workdir / "report").exists()
  mine, theirs = read_results(workdir), read_results(finished.workdir)
  for name in ("anytime", "budgeted", "macs", "params", "samples", "step"):
    assert mine[name] == theirs[name]
  main.run("report", workdir, None)
  assert (workdir / "report/index.html").exists()
  assert capsys.readouterr().out.endswith(f"report: {workdir}/report/index.html\n")


def test_a_page_of_other_results_is_drawn_again(
  workdir, tiny_config, capsys, caplog
):
  says = f"{workdir}/report/index.html is of an earlier evaluation; draw it again"
  main.run("evaluate", workdir, None)
  assert f"{says} with --mode=report" in caplog.text
  caplog.clear()
  main.run("all", workdir, tiny_config)
  assert "nothing to do" not in capsys.readouterr().out
  main.run("all", workdir, tiny_config)
  assert "nothing to do" in capsys.readouterr().out
  assert says not in caplog.text


def test_one_image_is_no_images():
  found = [main._images(x) for x in (1, 2000, "1", "0")]
  assert found == ["1 image", "2,000 images", "1 image", "0 images"]


def test_the_compilations_are_counted(compilations):
  import jax

  jax.jit(lambda x: x * 3.25)(7).block_until_ready()
  assert compilations() > 0


# Flags, and a part of the one line they bring.
MISTAKES = [
  (
    ["--config=configs/digits.py", "--config.epoch=3"],
    "config.epoch does not exist; did you mean config.epochs? keys of config",
  ),
  (
    ["--config=configs/digits.py", "--config.model.scales=3"],
    "no such key in this config: scales",
  ),
  (
    ["--config=configs/digits.py", "--config.epochs=many"],
    "flag --config.epochs=many: invalid literal for int()",
  ),
  (
    ["--config=configs/digits.py", "--config.model.bottleneck=7"],
    "flag --config.model.bottleneck=7",
  ),
  (
    ["--config=configs/digits.py", "--config.meta.epsilon=2"],
    "config.meta.epsilon must be a number at least 0 and at most 1, got 2.0",
  ),
  (
    ["--config=configs/digits.py", "--config.model={}"],
    "config.model.name is missing",
  ),
  (["--config=configs/nope.py"], "no config file 'configs/nope.py'; give a FILE"),
  (
    ["--config=digit", "--config.epochs=3"],
    "no config file 'digit'; give a FILE.py, the config.json of a run, or one of "
    "the names cifar100_msdnet, ",
  ),
  (["predict"], "unexpected argument 'predict'; did you mean --mode=predict?"),
  (
    ["--mode=evaluate", "--workdir=/nowhere", "--config.evaluate.target=q:1"],
    "--config.evaluate.target changes a config, and there is none: give --config",
  ),
  (
    ["--mode=predict", "--workdir=/nowhere", "--images=x.npy"],
    "workdir /nowhere does not exist; train one first",
  ),
  (["--config=run/config.json:uniform"], "a config.json takes no argument"),
  (
    ["--config=gs://bucket/run/config.json"],
    "--config=gs://bucket/run/config.json: a config is read from this machine",
  ),
  (["--config=configs/digits.py:lw2"], "config.method must be one of"),
  (["--config=configs/digits.py", "--workdir="], "--workdir is missing"),
  (
    ["--config=configs/digits.py", "--mode=test"],
    "<all|train|evaluate|report|latency|export|predict>",
  ),
  (["--config=configs/digits.py", "--wrokdir=x"], "wrokdir"),
  (["--config=configs/digits.py", "evaluate"], "unexpected argument 'evaluate'"),
  (
    ["--config=configs/digits.py", "--config.batch=129"],
    "batch 129 does not split into two halves",
  ),
  ([], "--mode=all needs --config=NAME or FILE.py"),
  (["--format=onnx", "--mode=report"], "--format=onnx is for --mode=export"),
  (["--mode=evaluate"], "does not exist; train one first"),
  (["--mode=report"], "does not exist; train one first"),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
  """Answers to all mistakes; each process takes two seconds to start."""
  from concurrent.futures import ThreadPoolExecutor

  folder = tmp_path_factory.mktemp("mistakes")

  def ask(i):
    return run_main(f"--workdir={folder / str(i)}", *MISTAKES[i][0])

  with ThreadPoolExecutor(2) as pool:
    return folder, list(pool.map(ask, range(len(MISTAKES))))


@pytest.mark.parametrize(
  "i", range(len(MISTAKES)), ids=[" ".join(flags) for flags, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_exit_code_2(mistakes, i):
  folder, commands = mistakes
  command = commands[i]
  assert command.code == 2, command.err
  assert command.out == ""
  (line,) = command.err.splitlines()
  assert line.startswith("error: ") and MISTAKES[i][1] in line
  assert not (folder / str(i)).exists()


def test_verbosity_1_says_where_an_error_was_raised(tmp_path):
  command = run_main(f"--workdir={tmp_path}", "--mode=evaluate", "--verbosity=1")
  assert command.code == 2
  assert "Traceback" in command.err and "in read_config" in command.err
  # JAX may add a line of its own as it leaves.
  assert any(
    line.startswith("error: workdir ") for line in command.err.splitlines()[-2:]
  )


def test_help():
  command = run_main("--help")
  assert command.code == 0 and command.err == ""
  for name in ("--config", "--workdir", "--mode"):
    assert f"  {name}: " in command.out


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="the setting is glibc's"
)
@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=1"])
def test_a_command_asks_glibc_for_huge_pages_unless_told_otherwise(given):
  script = (
    "import os, sys; from l2w_jax.run import huge_pages; huge_pages.use(); "
    "print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
  )
  env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  env |= {} if given is None else {"GLIBC_TUNABLES": given}
  done = subprocess.run(
    [sys.executable, "-c", script, "a b"],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.stdout == f"{given or 'glibc.malloc.hugetlb=1'} a b\n", done.stderr


def test_a_config_file_that_fails_is_named_by_its_error(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("def get_config():\n  raise ValueError('no such set')\n")
  command = run_main(f"--config={path}", f"--workdir={tmp_path / 'run'}")
  assert command.code == 2
  assert command.err.splitlines() == [
    f"error: {path}, line 2: ValueError: no such set"
  ]
  path.write_text(
    "from l2w_jax import config\ndef get_config():\n"
    "  c = config.defaults()\n  c.epoch = 3\n  return c\n"
  )
  command = run_main(f"--config={path}", f"--workdir={tmp_path / 'run'}")
  assert command.code == 2
  (line,) = command.err.splitlines()
  assert line.endswith('Did you mean "epochs" instead of "epoch"?')
  assert len(line) < 250 and line.startswith(f"error: {path}, line 4: Attribute")


@pytest.mark.parametrize(
  "key, value, says",
  [
    ("batch", 129, "129 does not split into two halves .* such as 128"),
    ("batch", 20_000, "8616 images, fewer than one loader batch"),
    ("num_devices", 64, "config.num_devices is 64, but this run has"),
    ("data.source", "mnist", "unknown data source 'mnist'"),
    ("data.source", "folder:gs://bucket/set", "read from a disk; copy or mount"),
    ("model.growth_factors", (1, 2, 4, 4, 4), "the same number of scales"),
    ("model.growth", 3, None),
  ],
)
@pytest.mark.parametrize("mode", ["all", "train"])
def test_what_does_not_fit_is_told_before_anything_else(
  tmp_path, compilations, mode, key, value, says
):
  config = config_lib.load_config(str(ROOT / "configs/digits.py"), {key: value})
  if says is None:
    says, config.model.growth_factors = "splits its growth in two", (1, 1)
  with pytest.raises(ValueError, match=says):
    main.run(mode, tmp_path / "run", config)
  assert compilations() == 0
  assert not list(tmp_path.iterdir())


def test_images_too_small_for_the_scales(tmp_path, compilations):
  factors = (1, 2, 4, 4, 4)
  config = config_lib.load_config(
    str(ROOT / "configs/digits.py"),
    {"model.growth_factors": factors, "model.bottleneck_factors": factors},
  )
  with pytest.raises(ValueError, match="8×8 pixels are too small for 5 scales"):
    main.run("all", tmp_path / "run", config)
  assert compilations() == 0
  assert not list(tmp_path.iterdir())


def test_a_cost_below_the_first_exit_is_told_before_training(tmp_path, tiny_config):
  tiny_config.evaluate.target = "macs:10"
  with pytest.raises(
    ValueError, match="at most 10 MACs on average: the nearest is"
  ):
    main.run("all", tmp_path / "run", tiny_config)
  assert not list(tmp_path.iterdir())


def test_a_batch_must_split_over_devices_too(tmp_path, tiny_config, monkeypatch):
  monkeypatch.setattr(parallel, "count_devices", lambda wanted: 3)
  with pytest.raises(ValueError, match="on 3 .* a multiple of 6, such as 126"):
    main.run("all", tmp_path / "run", tiny_config)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["evaluate", "report"])
def test_a_workdir_without_a_run(tmp_path, tiny_config, mode):
  for config in (None, tiny_config):
    with pytest.raises(ValueError, match="does not exist; train one first"):
      main.run(mode, tmp_path / "none", config)
    with pytest.raises(ValueError, match="holds no run .*; train one first"):
      main.run(mode, tmp_path, config)
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file(tmp_path, tiny_config):
  path = tmp_path / "file"
  path.touch()
  with pytest.raises(ValueError, match="is not a directory"):
    main.run("all", path, tiny_config)


def test_evaluating_with_another_config_is_refused(workdir, tiny_config):
  tiny_config.model.channels = 8
  with pytest.raises(ValueError, match="config.model.channels is 8 here and 4"):
    main.run("evaluate", workdir, tiny_config)


def test_the_tiny_flags_are_the_tiny_config(finished, tiny_config):
  written = json.loads((finished.workdir / "config.json").read_text())
  assert config_lib.differences(config_lib.from_dict(written), tiny_config) == []
  assert len(tiny_flags()) > 1
