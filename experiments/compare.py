"""`l2w-jax compare`, from a checkout: see l2w_jax/compare.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("l2w_jax.compare", run_name="__main__", alter_sys=True)
