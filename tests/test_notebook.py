"""The notebook runs from top to bottom, as a reader would run it."""

import json
import os
import pathlib

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


def test_it_is_stored_with_the_outputs_of_a_run():
  cells = [cell for cell in load().cells if cell.cell_type == "code"]
  text = "".join(map(outputs, cells))
  assert "-0.471" in text and "image/png" in text and "unroll:2" in text
  assert "Traceback" not in text and str(pathlib.Path.home()) not in text
  # It calls the package: functions of its own are those of the toy.
  assert {cell.id for cell in cells if "def " in cell.source} == {"toy"}


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient")
  monkeypatch.setenv(
    "L2W_NOTEBOOK",
    json.dumps(
      TINY
      | {
        "diagnose.every": 8,
        "diagnose.half": 16,
        "diagnose.meta_halves": 2,
        "diagnose.estimators": ["jvp"],
      }
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
  toy, table, *pictures = (
    cells[name] for name in ("toy", "table", "diagnostics", "weights", "other")
  )
  assert toy.count("-0.471") == 3
  assert "jvp" in table and "finite_difference" not in table
  assert all("image/png" in picture for picture in pictures)
