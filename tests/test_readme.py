"""The worked examples of the README and of docs/ run as they are printed there."""

import importlib
import re
import shlex
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_models
from conftest import ROOT

import l2w_jax
import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax.compare import literal
from l2w_jax.data import sources
from l2w_jax.models.backbone import Backbone
from l2w_jax.training import step as train_step

PAGES = {
  path.name: path.read_text(encoding="utf-8")
  for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
}


def section(page: str, title: str) -> list[str]:
  """The Python blocks under one heading of the second level."""
  found = re.search(
    rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[page], re.DOTALL | re.MULTILINE
  )
  return re.findall(r"```python\n(.*?)```", found[1], re.DOTALL)


def test_every_python_block_is_run_below_or_marked():
  blocks = {
    page: len(re.findall(r"^```python$", text, re.MULTILINE))
    for page, text in PAGES.items()
  }
  assert {page: n for page, n in blocks.items() if n} == {
    "README.md": 1,
    "early-exits.md": 1,
    "extend.md": 3,
    "run-directory.md": 1,
  }


def test_links_lead_somewhere():
  for page, text in PAGES.items():
    folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)[)#]", prose):
      assert (folder / target).exists(), f"{page}: {target}"


def commands(text: str) -> list[list[str]]:
  """The words of every command of the package, and of its scripts, on a page."""
  blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  found = []
  for line in "".join(blocks).replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    while "&&" in words:
      end = words.index("&&")
      found.append(words[:end])
      words = words[end + 1 :]
    found.append(words)
  return [words for words in found if words and words[0] in ("l2w-jax", "python")]


def test_every_command_has_flags_keys_and_files_that_there_are():
  source = (ROOT / "l2w_jax/main.py").read_text(encoding="utf-8")
  known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"config"}
  checked = 0
  for page, text in PAGES.items():
    for command, first, *words in commands(text):
      if command == "python" and first != "-m":
        assert (ROOT / first).is_file(), f"{page}: {first}"
      if command != "l2w-jax" or not first.startswith("--"):
        continue
      given = dict(word[2:].split("=", 1) for word in [first, *words])
      keys = {
        name.removeprefix("config."): literal(value)
        for name, value in given.items()
        if name.startswith("config.")
      }
      assert {name for name in given if "config." not in name} <= known, page
      config = given.get("config", "digits")
      if not re.search("plain.py|rules", config):  # of the reader's; run below
        l2w.load_config(config, keys)
        checked += 1
  assert checked > 10


def test_the_lines_from_python_run_as_printed(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (code,) = section("README.md", "From Python")
  exec(code, {})
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3 and lines[2].endswith("% of the cost of the whole network")
  assert (tmp_path / "runs/short/results.json").exists()


def test_the_lines_of_early_exits_run(finished, tiny_config):
  (code,) = re.findall(r"```python\n(.*?)```", PAGES["early-exits.md"], re.DOTALL)
  code = code.replace("runs/digits", str(finished.workdir))
  images = sources.load(tiny_config.data).test.images[:20]
  scope = {"images": images}
  exec(code.replace("accuracy:0.85", "accuracy:0.05"), scope)
  assert len(scope["answers"].exit) == 20 and min(scope["answers"].exit) >= 1


@pytest.fixture
def plain(tmp_path, monkeypatch):
  """The page's backbone, in a file where commands are started."""
  source, small = section("extend.md", "A backbone")
  (tmp_path / "plain.py").write_text(source, encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "plain", raising=False)
  for name, value in eval("{" + small + "}").items():
    monkeypatch.setitem(test_models.SMALL, name, value)
  return importlib.import_module("plain").Plain


def test_the_backbone_passes_what_every_backbone_passes(plain):
  backbone = test_models.build("plain")
  network = (
    backbone,
    backbone.init(jax.random.key(0)),
    jax.random.normal(jax.random.key(1), (8, 32, 32, 3)),
  )
  test_models.test_stages_give_what_apply_gives(network)
  test_models.test_exits_depend_on_nothing_behind_them_and_params_are_counted(
    network
  )
  test_models.test_training_updates_statistics_and_evaluation_does_not_need_to(
    network
  )
  with pytest.raises(ValueError, match="too small for 3 exits"):
    test_models.build("plain", image=(7, 8, 1))


def test_the_backbone_needs_no_config_to_be_trained(plain):
  backbone = Backbone(plain(10, "pytorch", 3, 16), 10, (8, 8, 1))
  config = config_lib.load_config(str(ROOT / "configs/digits.py"))
  step = train_step.make_train_step(backbone, config, steps_per_epoch=8)
  state = jax.eval_shape(
    lambda key: l2w_jax.init_state(key, backbone, config), jax.random.key(0)
  )
  _, metrics = jax.eval_shape(
    step, state, {"image": jnp.zeros((8, 8, 8, 1)), "label": jnp.zeros(8, int)}
  )
  assert metrics["weights"].shape == (2, 4, 3)


def test_the_weighting_rules_are_what_they_say():
  (source,) = section("extend.md", "A weighting rule")
  scope = {}
  exec(source, scope)
  # p = 1, ½, ½ and ¼: (1 - p)² is 0, ¼, ¼ and 9/16.
  losses = -jnp.log(jnp.array([[1.0, 0.5], [0.5, 0.25]]))
  np.testing.assert_allclose(
    scope["focal"](losses, lambda mean: mean),
    np.array([[0, 4], [4, 9]]) / 4.25,
    rtol=1e-6,
  )
  # Three of class 7 and one of class 2: together they weigh the same.
  weights = scope["balanced"](
    jnp.zeros((4, 2)), lambda mean: mean, jnp.array([7, 7, 2, 7])
  )
  np.testing.assert_allclose(
    weights, np.array([[2, 2], [2, 2], [6, 6], [2, 2]]) / 3, rtol=1e-6
  )


def test_the_lines_that_read_results_read_them(finished, monkeypatch, capsys):
  (code,) = section("run-directory.md", "results.json")
  code = code.replace("runs/digits", str(finished.workdir))
  exec(code, {})
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 1 + 39 and lines[1].startswith("0.05 ")


def test_the_lowest_versions_are_those_of_the_package():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
  needed = project["project"]["dependencies"]
  floors = re.findall(
    r"^([\w-]+)(?:\[.*\])?>=([\d.]+)", "\n".join(needed), re.MULTILINE
  )
  table = PAGES["verification.md"].split("## Versions")[1].split("\n## ")[0]
  rows = re.findall(r"^\| `([\w-]+)`[^|]*\| ([\d.]+) \|", table, re.MULTILINE)
  assert rows == floors and len(floors) > 10
  first = re.search(r"^\| lowest: (.*) \|$", PAGES["README.md"], re.MULTILINE)
  wanted = dict(floors)
  names = ("jax", "flax", "optax", "numpy", "orbax-checkpoint")
  assert first[1].split(" | ")[2:] == [wanted[name] for name in names]
  (excluded,) = re.findall(r"^jax>=[\d.]+,(.*)", needed[0])
  assert all(version[2:] in table for version in excluded.split(","))


def test_promises_are_held_by_tests_that_exist():
  page = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
  rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
  for row in rows:
    names = re.findall(r"`(test_\w+\.py)`", row.split("|")[-2])
    assert names, row
    assert all((ROOT / "tests" / name).is_file() for name in names), row
