"""What is installed: names of configs, commands, code of one's own, the wheel."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, TINY, run_main

import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax import main, models, named
from l2w_jax.exits import early_exit

NAMES = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))]
OWN = """
from flax import linen as nn

from l2w_jax import config as l2w_config
from l2w_jax.models import layers


class Small(nn.Module):
  num_classes: int
  initializer: str
  num_exits: int = 2
  channels: int = 4
  strides: tuple = (2, 1)
  slope: float = 0.0
  bias: bool = True

  @staticmethod
  def check(config, image_shape):
    layers.check_image_size(image_shape, 4, "2 exits")

  def setup(self):
    self.blocks = [
      layers.ConvBNReLU(self.channels, 3, stride, self.initializer)
      for stride in self.strides
    ]
    self.pool = layers.GlobalAveragePool()
    self.classifier = [
      layers.Linear(self.num_classes, self.initializer) for _ in self.strides
    ]

  def stage(self, k, carry, mode=layers.EVALUATE):
    carry = self.blocks[k](carry, mode)
    return carry, self.classifier[k](self.pool(carry))


def halves(losses, average):
  return losses * 0 + 0.5


def wrong(losses, average):
  return losses[0]


def get_config(method="uniform"):
  config = l2w_config.defaults("my_nets.Small")
  config.method = method
  config.data.source = "digits"
  config.batch = 128
  config.epochs = 1
  return config
"""


def test_a_config_of_the_package_has_a_name(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert named.config_names() == NAMES and "digits" in NAMES
  for name in NAMES:
    by_name = l2w.load_config(name)
    by_file = l2w.load_config(str(ROOT / f"configs/{name}.py"))
    assert config_lib.differences(by_name, by_file) == []
  assert l2w.load_config("digits:uniform").method == "uniform"
  seven = l2w.load_config("cifar100_msdnet:7-l2w", {"epochs": 2})
  assert (seven.model.num_exits, seven.epochs) == (7, 2)


def test_a_file_comes_before_a_name(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits").mkdir()
  assert l2w.load_config("digits").batch == 512
  (tmp_path / "digits").rmdir()
  text = (ROOT / "configs/digits.py").read_text().replace("512", "256")
  (tmp_path / "mine.py").write_text(text)
  (tmp_path / "digits").symlink_to("mine.py")
  assert named.config_file("digits:l2w") == (pathlib.Path("digits"), "l2w")
  assert l2w.load_config("mine.py").batch == 256


@pytest.mark.parametrize(
  "name", ["digit", "digits.py", "no/digits", "", "digit:l2w"]
)
def test_a_wrong_name_lists_those_there_are(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError) as error:
    l2w.load_config(name)
  assert f"no config file {name.partition(':')[0]!r}; " in str(error.value)
  assert str(error.value).endswith(f"names {', '.join(NAMES)}")
  assert "\n" not in str(error.value)


def test_the_config_of_a_run_is_a_config(tmp_path):
  config = l2w.load_config("digits:uniform", {"model.num_exits": 3})
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  again = l2w.load_config(str(path), {"epochs": 7})
  assert config_lib.differences(again, config) == ["epochs is 7 here and 30 there"]
  assert again.is_locked and again.model.growth_factors == (1, 2)
  for text in ("{", "[1]", '"x"'):
    path.write_text(text)
    with pytest.raises(ValueError, match="config.json is no config of a run"):
      l2w.load_config(str(path))
  path.write_text("{}")
  with pytest.raises(ValueError, match=r"config\.\w+ is missing"):
    l2w.load_config(str(path))


def test_the_command_takes_names_and_configs_of_runs(finished, tmp_path):
  again = shutil.copytree(finished.workdir, tmp_path / "again")
  for flags in (
    [f"--config={again}/config.json"],
    ["--config", f"{again}/config.json"],
  ):
    command = run_main(*flags, f"--workdir={again}")
    assert command.code == 0, command.err
    assert "training had already finished" in command.out
  command = run_main("--config=digits:uniform", f"--workdir={again}")
  assert command.code == 2
  assert f"error: workdir {again} was made with another config" in command.err


def run_package(*flags: object, cwd=ROOT) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "l2w_jax", *map(str, flags)],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_version():
  done = run_package("--version")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == f"l2w_jax {l2w.__version__}\n"


def test_help_has_examples():
  done = run_package("--help")
  assert done.returncode == 0 and done.stdout.startswith(main.__doc__)
  for flag in ("--config", "--workdir", "--mode", "--[no]version"):
    assert f"  {flag}: " in done.stdout


@pytest.mark.parametrize(
  "flags, says",
  [
    (["--mode=evaluate"], "error: --workdir is missing"),
    (["compare", "--config=digits"], "error: --workdir is missing"),
    (["convert"], "error: name the run directory with --workdir=DIR"),
    (["prepare"], "usage: l2w-jax prepare"),
    (["compar"], "error: unexpected argument 'compar'"),
  ],
)
def test_one_command_has_them_all(flags, says, tmp_path):
  done = run_package(*flags, cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.startswith(says) and done.stdout == ""


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
  (tmp_path / "my_nets.py").write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "my_nets", raising=False)
  yield tmp_path / "my_nets.py"
  config_lib._own_models.clear()


def test_fields_of_a_backbone_of_ones_own_are_keys(my_nets):
  config = l2w.load_config(f"{my_nets}:l2w", {"model.channels": 8})
  assert config.model.to_dict().keys() >= {"name", "num_exits", "init", "remat"}
  assert config.model.name == "my_nets.Small" and config.model.strides == (2, 1)
  backbone = models.build_backbone(config.model, 10, (8, 8, 1))
  assert (backbone.num_exits, backbone.module.channels) == (2, 8)
  assert config_lib.from_dict(config.to_dict()) == config
  config_lib.check_key("model.strides")
  for key, value, says in (
    ("model.width", 3, "config.model.width does not exist; keys of config.model: "),
    (
      "model.channels",
      -1,
      "must be a whole number at least 0.*field of my_nets.Small",
    ),
    ("model.name", "my_nets.Large", "my_nets.py has no 'Large'"),
    ("model.name", "my_nets.halves", "is no Flax module with a method `stage`"),
    ("model.name", "no_nets.Small", "cannot import no_nets .*PYTHONPATH"),
    ("model.name", "small", "unknown model 'small'.*or MODULE.CLASS of your own"),
  ):
    with pytest.raises(ValueError, match=says) as error:
      l2w.load_config(str(my_nets), {key: value})
    assert "\n" not in str(error.value)


def test_a_run_of_ones_own_is_loaded_from_its_workdir(
  my_nets, monkeypatch, tmp_path
):
  """Trained by a rule and with a backbone that no table has."""
  workdir, overrides = tmp_path / "run", {"evaluate.batch": 360}
  config = l2w.load_config(f"{my_nets}:my_nets.halves", overrides)
  l2w.train(workdir, config)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  weights = [json.loads(x) for x in lines if '"weights"' in x]
  assert all(
    w == 0.5 for x in weights for row in x["mean_weight"] for w in row if w
  )
  monkeypatch.delitem(sys.modules, "my_nets")
  results = l2w.evaluate(workdir, l2w.load_config(str(workdir / "config.json")))
  assert results["method"] == "my_nets.halves" and len(results["macs"]) == 2
  assert early_exit.load(workdir) is not None
  # Elsewhere the module is not found, and that is said.
  my_nets.unlink()
  monkeypatch.delitem(sys.modules, "my_nets")
  with pytest.raises(ValueError) as error:
    early_exit.load(workdir)
  assert str(error.value) == (
    "'my_nets.Small': cannot import my_nets (No module named 'my_nets'); start in "
    "the folder that my_nets lies in, or put that folder on PYTHONPATH"
  )


def test_a_rule_that_is_not_there_is_told_before_anything_else(
  my_nets, tmp_path, compilations
):
  for name, says in (
    ("no_rules.focal", "cannot import no_rules"),
    ("my_nets.focal", "has no 'focal'"),
    ("my_nets.OWN_CHANNELS", "has no 'OWN_CHANNELS'"),
    ("my_nets.__name__", "is no function"),
  ):
    config = l2w.load_config("digits", TINY | {"method": name})
    with pytest.raises(ValueError, match=says):
      main.run("train", tmp_path / "run", config)
  with pytest.raises(
    ValueError, match=r"weights of the shape of the losses, \(64, 2\)"
  ):
    l2w.train(
      tmp_path / "run",
      l2w.load_config("digits", TINY | {"method": "my_nets.wrong"}),
    )


def copy_of_sources(tmp_path):
  ignored = shutil.ignore_patterns(
    ".git", "__pycache__", ".pytest_cache", "build", "runs", "*.egg-info"
  )
  return shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)


@pytest.mark.slow
def test_the_tests_run_from_the_sdist(tmp_path):
  pytest.importorskip("setuptools")
  build = "from setuptools import build_meta; build_meta.build_sdist('..')"
  subprocess.run(
    [sys.executable, "-c", build],
    cwd=copy_of_sources(tmp_path),
    check=True,
    capture_output=True,
    timeout=300,
  )
  (archive,) = tmp_path.glob("l2w_jax-*.tar.gz")
  shutil.unpack_archive(archive, tmp_path, filter="data")
  (unpacked,) = tmp_path.glob("l2w_jax-*/")
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    + ["tests/test_readme.py::test_links_lead_somewhere"]
    + ["tests/test_notebook.py::test_its_address_is_one"]
    + ["tests/test_experiments.py", "tests/test_imports.py"],
    cwd=unpacked,
    env=os.environ | {"PYTHONPATH": str(unpacked)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_what_is_needed(tmp_path):
  pytest.importorskip("setuptools")
  source = copy_of_sources(tmp_path)
  subprocess.run(
    [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    + ["--quiet", "--no-index", "--wheel-dir", tmp_path, source],
    check=True,
    timeout=300,
  )
  (wheel,) = tmp_path.glob("l2w_jax-*.whl")
  with zipfile.ZipFile(wheel) as archive:
    found = set(archive.namelist())
    archive.extractall(tmp_path / "installed")
  assert f"l2w_jax-{l2w.__version__}-" in wheel.name
  assert found >= {
    *(f"l2w_jax/configs/{name}.py" for name in NAMES),
    "l2w_jax/experiments/benchmark.py",
    "l2w_jax/py.typed",
    "l2w_jax/__main__.py",
    "l2w_jax/data/digits.npz",
    "l2w_jax/results/templates/report.html",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "l2w_jax").rglob("*.py")),
  }
  assert not any(name.startswith(("tests", "configs")) for name in found)

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "l2w_jax", *arguments],
      cwd=tmp_path / "installed",
      capture_output=True,
      text=True,
      timeout=120,
    )

  refused = run("--config=digits:lw2", "--workdir=none")
  assert "config.method must be one of" in refused.stderr
  helped = run("benchmark", "--help")
  assert helped.stdout.startswith("usage: ") and "--topology" in helped.stdout
