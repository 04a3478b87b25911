"""What importing the package pulls in, and that imports point down."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / "l2w_jax"
HEAVY = (
  "tensorflow",
  "tensorflow_datasets",
  "grain",
  "matplotlib",
  "torch",
  "tensorboardX",
  "cv2",
)
# From the bottom up. A room imports rooms below it; files of one room import each
# other as they like, but not in a circle, or Python would say so.
ROOMS = (
  "named",
  "config",
  "run",
  "method",
  "models",
  "data",
  "training",
  "exits",
  "results",
  "convert",
  "compare",
  "main",
  "__main__",
)
RANK = {name: rank for rank, name in enumerate(ROOMS)}


def python(code: str) -> str:
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=PACKAGE.parent,
    check=True,
    capture_output=True,
    text=True,
  ).stdout


def test_importing_pulls_in_nothing_heavy():
  # The command line needs as little as the package until it knows what to do.
  loaded = python(
    "import sys, l2w_jax, l2w_jax.main, l2w_jax.training.loop;print(*sys.modules)"
  ).split()
  assert "jax" in loaded
  assert {name.split(".")[0] for name in loaded}.isdisjoint(HEAVY)


def test_flags_are_read_before_jax_is_there():
  loaded = python("import sys, l2w_jax, l2w_jax.main; print(*sys.modules)").split()
  assert "l2w_jax.run.command" in loaded and "jax" not in loaded


def imported(path: pathlib.Path) -> set[str]:
  """Modules and folders directly under the package that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    found |= {name.split(".")[1] for name in names if name.startswith("l2w_jax.")}
  return found


def test_imports_point_down():
  files = sorted(PACKAGE.rglob("*.py"))
  assert len(files) > 20
  for path in files:
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if name == "__init__":  # the surface, above everything
      continue
    assert name in RANK, f"{name} has no place in the order"
    upward = {
      other for other in imported(path) - {name} if RANK[other] >= RANK[name]
    }
    assert not upward, (
      f"{path.relative_to(PACKAGE)} is in room {name!r} and imports "
      f"{', '.join(sorted(upward))} from above it; rooms from the bottom up: "
      f"{', '.join(ROOMS)}"
    )


def test_an_upward_import_would_be_seen(tmp_path):
  source = tmp_path / "losses.py"
  source.write_text(
    "def f():\n  from l2w_jax.training.step import step_body\n"
    "  import l2w_jax.data.sources\n"
  )
  assert imported(source) == {"training", "data"}
  assert RANK["training"] > RANK["method"] < RANK["data"]
