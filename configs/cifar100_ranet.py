"""CIFAR-100, RANet with 6 exits, scales 1-2-3; L2W on RANet was never released.

It fills a TPU's lanes on 1, 2 or 4 chips; on 8 take batch=2048 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform. Everything else is at its default."""
  config = l2w_config.defaults("ranet")
  config.method = method
  config.data.source = "tfds:cifar100"
  config.data.augment = "shift_flip"
  return config
