"""CIFAR-100, an MSDNet with 3 exits that two CPU cores train in minutes.

The stem that reduces images to a quarter makes it 23 times as cheap as the
published network; 10 epochs instead of 300.

Half a TPU's lanes stay empty; on one chip take batch=256 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.defaults("msdnet")
  config.method = method
  config.epochs = 10
  config.batch = 128
  config.data.source = "tfds:cifar100"
  config.data.augment = "shift_flip"
  config.model.update(
    stem="imagenet",
    num_exits=3,
    step=2,
    growth=8,
    growth_factors=(1, 2),
    bottleneck_factors=(1, 2),
    classifier_width=64,
  )
  config.optimizer.learning_rate = 0.1  # the published 0.8 per 1024 images
  config.meta.hidden = 100
  config.meta.learning_rate = 1e-3
  config.evaluate.every = 1
  config.log.weights_every = 1
  config.checkpoint.every = 1
  return config
