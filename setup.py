"""Which packages there are; pyproject.toml, which has all else, cannot say it."""

import setuptools

# Configs and scripts lie at the top of the repository, for all to see, and are
# installed inside of the package.
setuptools.setup(
  packages=[
    *setuptools.find_namespace_packages(include=["l2w_jax*"]),
    "l2w_jax.configs",
    "l2w_jax.experiments",
  ],
  package_dir={"l2w_jax.configs": "configs", "l2w_jax.experiments": "experiments"},
)
