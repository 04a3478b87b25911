"""UCI handwritten digits (embedded), plain and made hard: MSDNet with 4 exits.

Small first exits and halves of 256 images, so that there is something to learn:
which images leave early, and which weights that asks for.

It fills a TPU's lanes on 1 or 2 chips; on 8 take batch=2048 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.defaults("msdnet")
  config.method = method
  config.epochs = 30
  config.batch = 512
  config.data.source = "digits:mixed"
  config.data.augment = "shift"
  config.data.pad = 1
  config.model.num_exits = 4
  config.model.growth_factors = (1, 2)
  config.model.bottleneck_factors = (1, 2)
  config.model.channels = 2
  config.model.growth = 2
  config.model.classifier_width = 4
  config.optimizer.learning_rate = 0.3
  config.meta.hidden = 100
  config.meta.learning_rate = 1e-3
  return config
