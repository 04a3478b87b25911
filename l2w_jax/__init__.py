"""L2W-DEN in JAX: learning to weight samples for dynamic early exiting."""
# convert
from l2w_jax import allocation, exit_policy
from l2w_jax.config import load_config
from l2w_jax.models import build_backbone
from l2w_jax.train_state import init_state
from l2w_jax.train_step import make_train_step

__version__ = "0.1.0"

__all__ = [
    "allocation", "build_backbone", "exit_policy", "init_state",
    "load_config", "make_train_step",
]
