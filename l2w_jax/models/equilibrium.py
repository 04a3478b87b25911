"""Gradient equilibrium (Li et al., ICCV 2019), as a factor for each parameter.

Of K exits, those from k on (1-based) send their gradients through the features
that exit k reads, so early blocks receive the sum of many. Li et al. balance
it by two scalings at every branch, which the forward pass does not see: what
exit k sends back is multiplied by 1 / (K - k + 1), and what comes back from the
later blocks by (K - k) / (K - k + 1). On its way from exit i to block j a gradient
is thus multiplied by

    1 / (K - i + 1) · Π_{m=j}^{i-1} (K - m) / (K - m + 1) = 1 / (K - j + 1)

whichever exit it comes from: block j takes the mean over the exits behind it in
the place of the sum. A classifier keeps its gradient, since the scaling is at its
input. So the method is one factor for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Var
from jaxtyping import PyTree

from l2w_jax.models.backbone import Backbone


def factors(backbone: Backbone) -> PyTree:
  """One number for each parameter, in the structure of the parameters.

  1 / (K - k) for what the carry of stage k is the first to depend on, k from 0: the
  exits from k on are behind it. What no carry depends on only serves the logits of
  one exit, whatever its name: it is of a classifier, and its factor is 1.
  """

  def carries(variables, carry):
    found = []
    for k in range(backbone.num_exits):
      carry, _ = backbone.stage(variables, k, carry)
      found.append(carry)
    return found

  variables = jax.eval_shape(backbone.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((1, *backbone.image_shape), np.float32)
  traced, shapes = jax.make_jaxpr(carries, return_shape=True)(variables, images)
  outputs = jax.tree.unflatten(jax.tree.structure(shapes), traced.jaxpr.outvars)
  found = {}
  for k in reversed(range(backbone.num_exits)):
    read = _read(traced, jax.tree.leaves(outputs[k]))
    found |= dict.fromkeys(read, 1 / (backbone.num_exits - k))
  *inputs, _ = traced.jaxpr.invars
  return jax.tree.unflatten(
    jax.tree.structure(variables), [found.get(x, 1.0) for x in inputs]
  )["params"]


def _read(traced: ClosedJaxpr, outputs: Iterable) -> set[Var]:
  """What some outputs of a traced function depend on, inputs included."""
  read = {x for x in outputs if isinstance(x, Var)}
  for eqn in reversed(traced.eqns):
    if not read.isdisjoint(eqn.outvars):
      read |= {x for x in eqn.invars if isinstance(x, Var)}
  return read
