"""Weight prediction network (WPN): a small tanh MLP, as a pure function pair.

Hidden layers are linear + ReLU, the output linear + tanh. All layers start from
PyTorch's default, uniform ±1/√fan_in, as the released one does.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def init(
  key: Array, num_features: int, hidden: tuple[int, ...], num_exits: int
) -> PyTree:
  """Parameters {"hidden_0": {"kernel", "bias"}, …, "output": …}.

  Args:
    key: PRNG key.
    num_features: width of the input (`weighting.num_features`).
    hidden: widths of the hidden layers, at least one.
    num_exits: K, width of the output.
  """
  widths = (num_features, *hidden, num_exits)
  names = [*(f"hidden_{i}" for i in range(len(hidden))), "output"]
  keys = jax.random.split(key, 2 * len(names))
  params = {}
  for i, (name, (fan_in, fan_out)) in enumerate(
    zip(names, itertools.pairwise(widths), strict=True)
  ):
    bound = fan_in**-0.5
    params[name] = {
      "kernel": jax.random.uniform(
        keys[2 * i], (fan_in, fan_out), minval=-bound, maxval=bound
      ),
      "bias": jax.random.uniform(
        keys[2 * i + 1], (fan_out,), minval=-bound, maxval=bound
      ),
    }
  return params


def apply(params: PyTree, features: Float[Array, "B F"]) -> Float[Array, "B K"]:
  """WPN output u in (-1, 1)."""
  x = features
  for i in range(len(params) - 1):
    layer = params[f"hidden_{i}"]
    x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
  return jnp.tanh(x @ params["output"]["kernel"] + params["output"]["bias"])
