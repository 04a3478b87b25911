"""Compares a folder of golden fixtures with this code, in float64.

    python experiments/check_golden.py FOLDER [PATTERN]

Prints the largest relative error of each quantity per fixture and leaves with 1
if any is beyond its bound. Fixtures are forward_*, step_*, allocation_* and
threshold_*.npz, results of the released PyTorch code as arrays; tests/golden
holds the ones the test suite runs.
"""

import fnmatch
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import golden_fixtures  # noqa: E402

# The released code's own results move by up to 1e-12 when its initial weights
# are changed by 1e-14; float32 logits may differ by rounding.
FLOAT64_BOUND, FLOAT32_BOUND = 1e-9, 1e-3
NO_FIXTURES = "step_batches", "target_probs"  # what fixtures are made of


def check(path: pathlib.Path) -> dict[str, float]:
  """{quantity: largest relative error} of one fixture."""
  kind = path.name.partition("_")[0]
  with np.load(path) as fixture:
    if kind == "forward":
      golden_fixtures.compare_cost(fixture)
      return golden_fixtures.compare_forward(
        fixture
      ) | golden_fixtures.compare_forward_float32(fixture)
    if kind == "step":
      return golden_fixtures.compare_step(fixture, halves_alone=True)
    return {
      "allocation": golden_fixtures.compare_allocation,
      "threshold": golden_fixtures.compare_thresholds,
    }[kind](fixture)


def main(folder: str, pattern: str = "*") -> int:
  """Number of fixtures that failed.

  Raises:
    SystemExit: there is no such fixture.
  """
  jax.config.update("jax_enable_x64", True)
  failed = 0
  paths = [
    path
    for path in sorted(pathlib.Path(folder).glob("*.npz"))
    if fnmatch.fnmatch(path.stem, pattern) and path.stem not in NO_FIXTURES
  ]
  if not paths:
    sys.exit(f"no fixtures {pattern}.npz in {folder}")
  for path in paths:
    began = time.monotonic()
    try:
      errors = check(path)
    except AssertionError as error:
      errors = {" ".join(str(error).split())[:200]: np.inf}
    bad = any(
      not error <= (FLOAT32_BOUND if "float32" in name else FLOAT64_BOUND)
      for name, error in errors.items()
    )
    failed += bad
    print(
      f"{'FAIL' if bad else 'ok  '} {path.stem}: "
      + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
      + f" ({time.monotonic() - began:.0f} s)",
      flush=True,
    )
  print(f"{failed} of {len(paths)} failed")
  return failed


if __name__ == "__main__":
  if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
  sys.exit(1 if main(*sys.argv[1:]) else 0)
