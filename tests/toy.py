"""A two-line backbone for tests of the algorithm: every exit is linear."""
import jax
import jax.numpy as jnp

from l2w_jax.models.backbone import Backbone


class LinearExits(Backbone):
  """Logits x @ W[k]; its running statistic is a running mean of the logits."""

  num_exits = 3
  num_classes = 4

  def __init__(self):
    """No module stands behind it."""

  def apply(self, variables, images, train=False, axis_name=None):
    x = images.reshape(images.shape[0], -1)
    logits = jnp.einsum("bd,kdc->bkc", x, variables["params"]["weight"])
    mean = logits.mean(0)
    if axis_name is not None:
      mean = jax.lax.pmean(mean, axis_name)
    stats = {"mean": 0.9 * variables["batch_stats"]["mean"] + 0.1 * mean}
    return (logits, stats) if train else logits
