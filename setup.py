"""Packaging of l2w_jax. Tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (HERE / "l2w_jax/__init__.py").read_text()
)[1]

setuptools.setup(
  name="l2w_jax",
  version=VERSION,
  description=(
    "L2W-DEN in JAX: learning to weight samples for dynamic early-exiting "
    "networks (Han et al., ECCV 2022)"
  ),
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_namespace_packages(include=["l2w_jax*"]),
  package_data={"l2w_jax.data": ["digits.npz", "DIGITS.md"]},
  install_requires=[
    "jax",
    "flax",  # modules, parameter trees, the state dataclass
    "optax",  # SGD with momentum, Adam, cosine schedules
    "tensorflow-datasets",  # CIFAR and ImageNet, read without TensorFlow
    "pillow",  # decodes and crops images
    "orbax-checkpoint",  # checkpoints that survive being killed
    "ml-collections",  # configs and their command-line overrides
    # tensorflow-datasets imports it without declaring it (its #11212).
    "importlib_resources",
    # Shapes are types here; tests run them as checks. Pure Python, small.
    "jaxtyping",
    # Every run ends in pictures, so the first command needs it; imported
    # by the report only.
    "matplotlib",
    "flatbuffers",  # serialised by --mode=export; pure Python, small
    # numpy, absl-py and tqdm, used too, are declared by those above.
  ],
  extras_require={
    # Only PyTorch checkpoints and experiments/benchmark.py --pytorch use it.
    "torch": ["torch"],
    # metrics.jsonl is always written; this adds TensorBoard events
    # without TensorFlow.
    "tensorboard": ["tensorboardX"],
    # Sets that do not fit into memory.
    "streaming": ["grain"],
    # Downloads and prepares sets, by TFDS's own builders. Reading what was
    # prepared never needs it.
    "prepare": ["tensorflow"],
    "test": [
      "pytest",
      "grain",
      "beartype",  # checks jaxtyping's shapes at run time
      "ruff",
      "tensorboardX",
      "nbclient",  # runs the notebook
      "ipykernel",
    ],
  },
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
