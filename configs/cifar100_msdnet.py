"""CIFAR-100, MSDNet with 5 exits (7: --config.model.num_exits=7)."""
from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform. Everything else is at its default."""
  config = l2w_config.defaults("msdnet")
  config.method = method
  config.data.source = "tfds:cifar100"
  config.data.augment = "shift_flip"
  return config
