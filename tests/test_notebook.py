"""The notebook runs from top to bottom, as a reader would run it."""

import importlib.util
import json
import os
import pathlib
import re

import pytest
from conftest import ROOT, TINY

NOTEBOOK = ROOT / "experiments/meta_gradients.ipynb"


def load():
  nbformat = pytest.importorskip("nbformat")
  return nbformat.read(NOTEBOOK, as_version=4)


def outputs(cell) -> str:
  """What a cell printed and displayed, as text."""
  return "".join(
    out.get("text", "") or json.dumps(out.get("data", {}))
    for out in cell.get("outputs", [])
  )


def source(name: str) -> str:
  """The text of a cell, by its id."""
  (cell,) = [cell for cell in load().cells if cell.id == name]
  return cell.source


def test_it_is_stored_with_the_outputs_of_a_run():
  cells = [cell for cell in load().cells if cell.cell_type == "code"]
  text = "".join(map(outputs, cells))
  assert "-0.471" in text and "image/png" in text and "first_order" in text
  assert "Traceback" not in text and str(pathlib.Path.home()) not in text


def test_no_answer_follows_its_question():
  cells = load().cells
  text = "".join(cell.source for cell in cells)
  questions = [c for c in cells if "**Exercise" in c.source]
  assert len(questions) == text.count("<summary>Exercise") > 3
  for question in questions:
    after = cells[cells.index(question) + 1]
    assert after.id.startswith("exercise") or after.cell_type == "markdown"
    assert not after.get("outputs")
  assert all(c.id == "answers" for c in cells if "<summary>" in c.source)


def test_its_address_is_one():
  (address,) = re.findall('^REPOSITORY = "(.+?)"', source("install"), re.MULTILINE)
  for page in ("mkdocs.yml", "CONTRIBUTING.md", "pyproject.toml"):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"https://github\.com/[^/]+/l2w_jax\b", text) == [address]
  badges = re.findall(
    r"github(?:\.com)?/([^/]+/[^/]+)/blob/\S+?/(\S+)\)", source("title")
  )
  name = address.removeprefix("https://github.com/")
  assert badges == [(name, str(NOTEBOOK.relative_to(ROOT)))] * 2


def test_without_an_address_the_install_cell_says_so(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = source("install").replace(
    "https://github.com/", "https://github.com/OWNER/"
  )
  exec(code, {})  # the package is installed: nothing to do
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="^Set REPOSITORY .*[.]$"):
    exec(code, {})


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient")
  monkeypatch.setenv(
    "L2W_NOTEBOOK",
    json.dumps(
      TINY | {"model.num_exits": 3, "diagnose.half": 64, "diagnose.meta_halves": 2}
    ),
  )
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  )
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
  notebook = load()
  nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
  ).execute()
  cells = {
    cell.id: outputs(cell) for cell in notebook.cells if cell.cell_type == "code"
  }
  assert cells["toy"].count("-0.471") == 3
  assert "image/png" in cells["learned"]
  assert "by the package" in cells["package"]
  assert "jvp" in cells["estimators"] and "classifiers" in cells["estimators"]
  assert "worst exit" in cells["objectives"]
