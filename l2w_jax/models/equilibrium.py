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

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import PyTree


def factors(module: nn.Module, image_shape: tuple[int, int, int]) -> PyTree:
  """One number for each parameter, in the structure of the parameters.

  1 / (exits behind it, its own included) for what stage k is the first to run,
  and 1 for the classifiers.
  """
  first_stage = {}
  stage = 0

  def watch(call, args, kwargs, context):
    first_stage.setdefault(context.module.path, stage)
    return call(*args, **kwargs)

  def forward(module, carry):
    nonlocal stage
    for stage in range(module.num_exits):
      carry, _ = module.stage(stage, carry)

  images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
  with nn.intercept_methods(watch):
    variables = jax.eval_shape(
      lambda images: module.init(jax.random.key(0), images, method=forward), images
    )

  def factor(path: tuple[str, ...]) -> float:
    if path[0].startswith("classifier"):
      return 1.0
    return 1 / (module.num_exits - first_stage[path[:-1]])

  params = traverse_util.flatten_dict(variables["params"])
  return traverse_util.unflatten_dict({path: factor(path) for path in params})
