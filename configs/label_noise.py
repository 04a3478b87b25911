"""Setting C of experiments/protocol.md: 40 % wrong labels and clean meta images.

The set of two populations, and weights centred over batch and exits together, so
that a sample can be weighted down as a whole.

It fills a TPU's lanes on 1 or 2 chips; on 8 take batch=2048 (docs/tpu.md).
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.load_config(f"populations:{method}")
  config.data.label_noise = 0.4
  config.data.meta = 2_000
  config.meta.center_over = "all"
  config.meta.epsilon = 0.5  # weights stay at 0 or above
  return config
