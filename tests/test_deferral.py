"""The cut of a function: same results, and only what is needed now."""

import jax
import jax.numpy as jnp
import numpy as np

from l2w_jax.exits import deferral


def grid(x):
  """Two scales; the answer needs the coarse one only."""
  fine, coarse = x
  scale = jnp.exp(jnp.zeros(3))  # constant, used on both sides
  coarse = jnp.tanh(coarse) * scale
  finer = jnp.sin(fine) * scale
  return {"fine": finer, "coarse": coarse, "both": finer + coarse}, coarse.sum(-1)


X = (jnp.arange(6.0).reshape(2, 3), jnp.linspace(-1, 1, 6).reshape(2, 3))


def test_both_parts_give_what_the_whole_gives():
  parts = deferral.split(grid, X)
  answer, rest = jax.jit(parts.now)(X)
  later = jax.jit(parts.later)(rest)
  expected_later, expected = jax.jit(grid)(X)
  np.testing.assert_array_equal(answer, expected)
  assert later.keys() == expected_later.keys()
  for name, value in later.items():
    np.testing.assert_array_equal(value, expected_later[name])


def test_only_what_is_needed_runs_now():
  parts = deferral.split(grid, X)
  _, rest = parts.now(X)
  now = {e.primitive.name for e in jax.make_jaxpr(parts.now)(X).eqns}
  later = {e.primitive.name for e in jax.make_jaxpr(parts.later)(rest).eqns}
  assert "tanh" in now and "sin" not in now
  assert "sin" in later and "tanh" not in later
  # The constant of no rows is computed twice, not handed over.
  assert [leaf.shape for leaf in rest] == [(2, 3), (2, 3)]


def test_a_result_that_is_an_argument_passes_through():
  parts = deferral.split(lambda x: (x, x * 2), X[0])
  answer, rest = parts.now(X[0])
  np.testing.assert_array_equal(answer, 2 * X[0])
  np.testing.assert_array_equal(parts.later(rest), X[0])
