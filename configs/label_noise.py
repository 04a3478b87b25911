"""Setting C of experiments/protocol.md: 40 % wrong labels and clean meta images.

CIFAR-100 at 16×16, weights centred over batch and exits together, so that a sample
can be weighted down as a whole; experiments/make_sets.py writes the set.
"""

from l2w_jax import config as l2w_config


def get_config(method="l2w"):
  """`method` is l2w or uniform."""
  config = l2w_config.load_config(
    str(__file__).replace("label_noise", "starved_exits") + f":{method}"
  )
  config.data.label_noise = 0.4
  config.data.meta = 2_000
  config.meta.center_over = "all"
  return config
