"""ReLU whose derivative remembers its output and nothing else.

The usual derivative keeps the mask x > 0 beside the output, which the next layer
keeps anyway. Inside one computation XLA finds out; but where a derivative is used
on both sides of a conditional, as at `meta.interval` > 1, each mask is computed and
kept in a pass of its own. With y = relu(x), the mask is y > 0, so

    ẏ = `_gate`(ẋ, y) = ẋ where y > 0, else 0

which is linear in ẋ and its own transpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


@jax.custom_jvp
def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """max(x, 0); its derivative at 0 is 0."""
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  y = relu(*primals)
  return y, _gate.bind(*tangents, y)


def _gate_value(t, y):
  return jnp.where(y > 0, t, 0)


def _gate_transpose(g, t, y):
  del t
  return [_gate.bind(g, y), None]


def _gate_batched(operands, axes):
  return jax.vmap(_gate_value, axes)(*operands), 0


_gate = Primitive("relu_gate")
_gate.def_abstract_eval(lambda t, y: t.update(weak_type=False))
_gate.def_impl(jax.jit(_gate_value))
mlir.register_lowering(_gate, mlir.lower_fun(_gate_value, multiple_results=False))
batching.primitive_batchers[_gate] = _gate_batched
ad.deflinear2(_gate, _gate_transpose)
# Not linear in y, but constant wherever y is not 0.
ad.defjvp(_gate, lambda t_dot, t, y: _gate.bind(t_dot, y), None)
