"""L2W-DEN in JAX: learning to weight samples for dynamic early exiting."""

import importlib

__version__ = "0.1.0"

# Where each name lives. It is imported on first use, so that a command can speak
# of a mistyped flag, and set up its process, before JAX is there.
_HOME = {
  "allocation": "l2w_jax.method.allocation",
  "build_backbone": "l2w_jax.models:build_backbone",
  "config": "l2w_jax.config",
  "convert": "l2w_jax.convert",
  "early_exit": "l2w_jax.exits.early_exit",
  "evaluate": "l2w_jax.results.evaluate:evaluate",
  "exit_policy": "l2w_jax.exits.policy",
  "init_state": "l2w_jax.training.state:init_state",
  "load_config": "l2w_jax.config:load_config",
  "make_train_step": "l2w_jax.training.step:make_train_step",
  "train": "l2w_jax.training.loop:train",
}
__all__ = list(_HOME)


def __getattr__(name: str):
  if name in _HOME:
    module, _, attribute = _HOME[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*globals(), *__all__]
