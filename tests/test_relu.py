"""ReLU against jax.nn's: the same in every derivative, and what it remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2w_jax.models.relu import relu

X = jnp.asarray([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
W = jnp.asarray([1.0, -1.0, 2.0, 3.0, 0.5, -2.0])


def losses(relu, x):
  return relu(x * W) * relu(x) * x


def pulled(relu, w):
  """What the step does: differentiates a pull, which is linear, in its input."""
  _, pull = jax.vjp(lambda x: losses(relu, x), X)
  return (pull(w)[0] ** 2).sum()


@pytest.mark.parametrize(
  "result",
  [
    lambda relu: relu(X),
    lambda relu: jax.vmap(jax.grad(relu))(X),
    lambda relu: jax.grad(lambda x: losses(relu, x).sum())(X),
    lambda relu: jax.jvp(lambda x: losses(relu, x), (X,), (W,)),
    lambda relu: jax.grad(lambda w: pulled(relu, w))(W),
    lambda relu: jax.hessian(lambda x: losses(relu, x).sum())(X),
    lambda relu: jax.jacrev(lambda x: losses(relu, x))(X),
  ],
)
def test_every_derivative_is_that_of_jax(result):
  jax.tree.map(np.testing.assert_array_equal, result(relu), result(jax.nn.relu))


def test_a_derivative_remembers_the_output_and_no_mask():
  y, pull = jax.vjp(relu, X)
  kept = jax.tree.leaves(pull)
  assert [x.dtype for x in kept] == [X.dtype]
  np.testing.assert_array_equal(kept[0], y)
