"""CIFAR-10, MSDNet with 5 exits; the argument is EXITS-METHOD, such as 7-l2w.

It fills a TPU's lanes on 1, 2 or 4 chips; on 8 take batch=2048 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(variant="5-l2w"):
  """`variant` is l2w or uniform (5 exits), or EXITS-METHOD."""
  exits, _, method = variant.rpartition("-")
  if exits not in ("", "5", "7"):
    raise ValueError(
      "the argument is EXITS-METHOD with 5 or 7 exits, such as "
      f"7-l2w; got {variant!r}"
    )
  config = l2w_config.defaults("msdnet")
  config.model.num_exits = int(exits or 5)
  config.method = method
  config.data.source = "tfds:cifar10"
  config.data.augment = "shift_flip"
  return config
