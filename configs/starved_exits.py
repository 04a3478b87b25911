"""Setting B of experiments/protocol.md: CIFAR-100 at 16×16 with poor first exits.

experiments/make_sets.py writes the set.

It fills a TPU's lanes on 1, 2 or 4 chips; on 8 take batch=2048 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.defaults("msdnet")
  config.method = method
  config.epochs = 30
  config.batch = 1024
  config.data.source = "npz:sets/cifar16.npz"
  config.data.augment = "shift_flip"
  config.data.pad = 2
  config.model.num_exits = 4
  config.model.step = 2
  config.model.channels = 8
  config.model.growth = 4
  config.model.growth_factors = (1, 2)
  config.model.bottleneck_factors = (1, 2)
  config.model.classifier_width = 16
  config.optimizer.learning_rate = 0.8
  config.meta.hidden = 100
  config.meta.learning_rate = 1e-3
  config.log.weights_every = 5
  return config
