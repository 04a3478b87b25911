"""ImageNet, RANet with 8 exits, scales 1-2-3-4; L2W on it was never released.

It fills a TPU's lanes on up to 16 chips; on 32 take batch=8192 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.defaults("ranet")
  config.method = method
  config.epochs = 100
  config.batch = 4096
  config.data.update(
    source="tfds:imagenet2012",
    calibration=50_000,
    image_size=224,
    augment="crop_flip",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
  )
  config.model.update(
    stem="imagenet",
    step_mode="even",
    step=8,
    channels=32,
    growth=16,
    scales=(1, 2, 3, 4),
    growth_factors=(4, 2, 2, 1),
    bottleneck_factors=(4, 2, 2, 1),
    classifier_width=0,
  )
  config.meta.update(epsilon=0.3, center_over="all", interval=100)
  return config
