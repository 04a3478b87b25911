"""The command `l2w-jax`, and `python -m l2w_jax`: all commands of the package.

`l2w-jax prepare …` is `python -m l2w_jax.data.prepare …`, and so on for `COMMANDS`;
`l2w-jax benchmark …` is `python experiments/benchmark.py …`; without the name of
one it is `python -m l2w_jax.main`.
"""

from __future__ import annotations

from l2w_jax.run import huge_pages, stopping

COMMANDS = {
  "compare": "l2w_jax.compare",
  "convert": "l2w_jax.convert",
  "prepare": "l2w_jax.data.prepare",
}


def main() -> None:
  """Runs the command that the arguments name."""
  stopping.install()  # before the imports that take long
  huge_pages.use()
  import os
  import runpy
  import sys

  # As `python -m` does: modules of one's own are found where it is started.
  if not sys.flags.safe_path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  if sys.argv[1:2] == ["benchmark"]:
    from l2w_jax import named

    script = str(named.EXPERIMENTS / f"{sys.argv.pop(1)}.py")
    sys.path.insert(0, os.path.dirname(script))  # as `python FILE` does
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
    return
  module = "l2w_jax.main"
  if sys.argv[1:] and sys.argv[1] in COMMANDS:
    module = COMMANDS[sys.argv.pop(1)]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
