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
  package_data={
    "l2w_jax.data": ["digits.npz", "DIGITS.md"],
    "l2w_jax.results": ["templates/*.html"],
  },
  # The lowest versions that pass the tests of .ci/run, which reads them here;
  # the README lists them too.
  install_requires=[
    # 0.10.2 computes wrong sums on CPUs (jax-ml/jax#39103), 0.11.0 crashes or
    # hangs (#39257), 0.11.1 copies a scan's outputs at every step (#40101).
    "jax>=0.6.2,!=0.10.2,!=0.11.0,!=0.11.1",
    "flax>=0.11.2",  # modules, parameter trees, the state dataclass
    "optax>=0.2.6",  # SGD with momentum, Adam, cosine schedules
    "numpy>=1.26",
    # CIFAR and ImageNet, read without TensorFlow.
    "tensorflow-datasets>=4.9.6",
    "pillow>=10.0",  # decodes and crops images
    "orbax-checkpoint>=0.11.28",  # checkpoints that survive being killed
    "etils[epath]>=1.9.1",  # run directories on gs:// as on a disk; Orbax has it
    "ml-collections>=1.1.0",  # configs and their command-line overrides
    # tensorflow-datasets imports it without declaring it (its #11212).
    "importlib_resources>=6.0",
    # Shapes are types here; tests run them as checks. Pure Python, small.
    "jaxtyping>=0.2.36",
    # Every run ends in pictures, so the first command needs it; imported
    # by the report only.
    "matplotlib>=3.8",
    "jinja2>=3.1",  # the pages; pure Python, escapes what it is given
    "flatbuffers>=24.3.25",  # serialised by --mode=export; pure Python, small
    # absl-py and tqdm, used too, are declared by those above.
  ],
  extras_require={
    # Only PyTorch checkpoints and experiments/benchmark.py --pytorch use it.
    "torch": ["torch"],
    # metrics.jsonl is always written; this adds TensorBoard events
    # without TensorFlow.
    "tensorboard": ["tensorboardX"],
    # Sets that do not fit into memory.
    "streaming": ["grain"],
    # Run directories on gs://; Orbax writes its arrays there without it.
    "gcs": ["gcsfs"],
    # --mode=export --format=onnx. It wants an Orbax before 0.11.37, which reads
    # the checkpoints of newer ones; to keep a newer one, install onnx-ir and
    # onnxruntime, and then jax2onnx with --no-deps.
    "onnx": ["jax2onnx>=0.17.1", "onnxruntime"],
    # Downloads and prepares sets, by TFDS's own builders. Reading what was
    # prepared never needs it.
    "prepare": ["tensorflow"],
    # The site: `mkdocs build --strict`.
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    "test": [
      "pytest",
      "grain",
      "html5lib",  # the pages are valid HTML
      "beartype",  # checks jaxtyping's shapes at run time
      "ruff",
      "gcsfs",
      "gcp-storage-emulator",  # a bucket of one's own, on this machine
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
