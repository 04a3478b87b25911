"""Setting A of experiments/protocol.md: two populations whose weights are known.

CIFAR images and digits in one set, and a first exit that can serve the digits
alone; experiments/make_sets.py writes the set.

It fills a TPU's lanes on 1 or 2 chips; on 8 take batch=2048 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.defaults("msdnet")
  config.method = method
  config.epochs = 25
  config.batch = 512
  config.data.source = "npz:sets/populations.npz"
  config.data.augment = "shift"
  config.data.pad = 2
  config.model.num_exits = 4
  config.model.growth_factors = (1, 2)
  config.model.bottleneck_factors = (1, 2)
  config.model.channels = 4
  config.model.growth = 2
  config.model.classifier_width = 8
  config.optimizer.learning_rate = 0.3
  config.meta.hidden = 100
  config.meta.learning_rate = 1e-3
  config.log.weights_every = 5
  return config
