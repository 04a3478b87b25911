"""A two-line backbone for tests of the algorithm: every exit is linear."""

import jax
import jax.numpy as jnp

from l2w_jax.models import layers
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


class NormalizedExits(LinearExits):
  """Its logits are normalised over the batch, on all devices."""

  def apply(self, variables, images, train=False, axis_name=None):
    logits, stats = super().apply(variables, images, True, axis_name)
    if not train:
      return logits
    rows = logits.reshape(len(logits), 1, 1, -1)
    scale, bias = jnp.ones(rows.shape[-1]), jnp.zeros(rows.shape[-1])
    (y,), _, _ = layers._normalize(axis_name, [rows], [scale], [bias], [bias])
    return y.reshape(logits.shape), stats
