"""UCI handwritten digits (embedded), as they are: MSDNet, 4 exits, 8×8 images.

Half a TPU's lanes stay empty; on one chip take batch=256 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.defaults("msdnet")
  config.method = method
  config.epochs = 60
  config.batch = 128
  config.data.source = "digits"
  config.data.augment = "shift"
  config.data.pad = 1
  config.model.num_exits = 4
  config.model.growth_factors = (1, 2)
  config.model.bottleneck_factors = (1, 2)
  config.model.channels = 8
  config.model.growth = 4
  config.model.classifier_width = 16
  config.optimizer.learning_rate = 0.2
  config.meta.hidden = 100
  config.meta.learning_rate = 1e-3
  return config
