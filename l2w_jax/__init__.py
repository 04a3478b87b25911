"""L2W-DEN in JAX: learning to weight samples for dynamic early exiting."""
import importlib

from l2w_jax import allocation, exit_policy
from l2w_jax.config import load_config
from l2w_jax.models import build_backbone
from l2w_jax.train_state import init_state
from l2w_jax.train_step import make_train_step

__version__ = "0.1.0"

__all__ = [
    "allocation", "build_backbone", "convert", "exit_policy", "init_state",
    "load_config", "make_train_step",
]


def __getattr__(name: str):
  # On first use, because `python -m l2w_jax.convert` is also a command, and
  # Python warns when a module that it runs was imported before.
  if name == "convert":
    return importlib.import_module("l2w_jax.convert")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
