"""L2W-DEN in JAX: learning to weight samples for dynamic early exiting."""

import importlib

from l2w_jax.config import load_config
from l2w_jax.exits import policy as exit_policy
from l2w_jax.method import allocation
from l2w_jax.models import build_backbone
from l2w_jax.training.state import init_state
from l2w_jax.training.step import make_train_step

__version__ = "0.1.0"

__all__ = [
  "allocation",
  "build_backbone",
  "convert",
  "early_exit",
  "exit_policy",
  "init_state",
  "load_config",
  "make_train_step",
]

# Loaded on first use: heavy, or commands that Python warns about when a module
# that it runs was imported before.
_LAZY = {"convert": "l2w_jax.convert", "early_exit": "l2w_jax.exits.early_exit"}


def __getattr__(name: str):
  if name in _LAZY:
    return importlib.import_module(_LAZY[name])
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
