r"""Fixed weights for setting A, whose labels tell its two populations apart.

    python experiments/compare.py --config=configs/populations.py \
        --methods=uniform,known_weights.expected,known_weights.learned …

What a WPN could reach that knew the population of every image: weighting rules
(docs/extend.md) that look at the label alone. With l2w-jax, have this folder on
PYTHONPATH.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from make_sets import COARSE

from l2w_jax.method.baselines import fixed

# Weights of the four exits for digits, then for CIFAR images; of mean 1, as in L2W.
# By hand: the digits leave at exit 1, so it is theirs, within 1 ± ε for ε = 0.8.
EXPECTED = [1.8] + 3 * [1 - 4 / 15], [0.2] + 3 * [1 + 4 / 15]
# As l2w weighted them at the end of seeds 10 to 12 (findings.md).
LEARNED = [1.79, 1.23, 0.51, 0.47], [0.74, 1.48, 1.04, 0.74]


def expected(losses: jax.Array, average, labels: jax.Array) -> jax.Array:
  """The weights [B K] that setting A was made for."""
  return _of_populations(losses, labels, *EXPECTED)


def learned(losses: jax.Array, average, labels: jax.Array) -> jax.Array:
  """The mean weights [B K] of each population that l2w learned."""
  return _of_populations(losses, labels, *LEARNED)


def _of_populations(losses, labels, digits, cifar):
  is_digit = labels[:, None] >= len(COARSE)
  return jnp.where(is_digit, fixed(losses, digits), fixed(losses, cifar))
