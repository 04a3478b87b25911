"""ImageNet, MSDNet with 5 exits; the argument is STEP-METHOD, such as 6-l2w.

Steps 4, 6 and 7 are the paper's three networks, for 100 epochs.

It fills a TPU's lanes on up to 16 chips; on 32 take batch=8192 (docs/tpu.md).
On a v5e-8, 16 GB a chip, take --config.model.dtype=bfloat16: by its compiler 4-l2w
then fits (11.3 GiB) without microbatches, remat or anything computed twice.
"""

from l2w_jax import config as l2w_config


def get_config(variant="4-l2w"):
  """`variant` is l2w or uniform (step 4), or STEP-METHOD."""
  step, _, method = variant.rpartition("-")
  if step not in ("", "4", "6", "7"):
    raise ValueError(
      f"the argument is STEP-METHOD with step 4, 6 or 7, such as "
      f"6-l2w; got {variant!r}"
    )
  config = l2w_config.defaults("msdnet")
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
    step=int(step or 4),
    base=int(step or 4),
    channels=32,
    growth=16,
    growth_factors=(1, 2, 4, 4),
    bottleneck_factors=(1, 2, 4, 4),
    classifier_width=0,
  )
  config.meta.update(epsilon=0.3, center_over="all", interval=100)
  return config
