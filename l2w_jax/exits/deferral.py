"""A function of two results, cut so that one need not wait for the other.

A stage computes what its exit needs and, on other scales, what only later stages
need. `split` cuts its equations in two: those that the exit's logits depend on
run now, and the rest can wait for the images that go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal
from jaxtyping import Array, PyTree


class Split(NamedTuple):
  """The two parts of a function x -> (later, now).

  now: x -> (now, rest), with rest a list of arrays, none of them constant.
  later: rest -> later; `later(now(x)[1])` is the function's first result.
  """

  now: Callable[[PyTree], tuple[PyTree, list[Array]]]
  later: Callable[[list[Array]], PyTree]


def split(function: Callable[[PyTree], tuple[PyTree, PyTree]], x: PyTree) -> Split:
  """Cuts x -> (later, now) for arguments of the shapes and dtypes of x."""
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(x)
  jaxpr = closed.jaxpr
  later_tree, now_tree = map(jax.tree.structure, shapes)
  later_out = jaxpr.outvars[: later_tree.num_leaves]
  now_out = jaxpr.outvars[later_tree.num_leaves :]
  varying = set(jaxpr.invars)
  for equation in jaxpr.eqns:
    if varying & _variables(equation.invars):
      varying |= set(equation.outvars)
  first = _needed(jaxpr.eqns, now_out)
  done = {v for i in first for v in jaxpr.eqns[i].outvars} & varying
  # Constants are cheap to compute twice, and have no rows to gather.
  second = [
    i
    for i in _needed(jaxpr.eqns, later_out)
    if not done & set(jaxpr.eqns[i].outvars)
  ]
  made = {v for i in second for v in jaxpr.eqns[i].outvars}
  used = set().union(
    _variables(later_out), *(_variables(jaxpr.eqns[i].invars) for i in second)
  )
  rest = [
    v
    for v in [*jaxpr.invars, *(v for i in first for v in jaxpr.eqns[i].outvars)]
    if v in used and v in varying and v not in made
  ]
  constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))

  def now(x):
    values = {
      **constants,
      **dict(zip(jaxpr.invars, jax.tree.leaves(x), strict=True)),
    }
    _evaluate([jaxpr.eqns[i] for i in first], values)
    return (now_tree.unflatten(_read(values, now_out)), _read(values, rest))

  def later(kept):
    values = {**constants, **dict(zip(rest, kept, strict=True))}
    _evaluate([jaxpr.eqns[i] for i in second], values)
    return later_tree.unflatten(_read(values, later_out))

  return Split(now, later)


def _variables(atoms) -> set[Any]:
  return {v for v in atoms if not isinstance(v, Literal)}


def _needed(equations, outputs) -> list[int]:
  """Indices, in order, of the equations that the outputs depend on."""
  wanted, found = _variables(outputs), []
  for i in reversed(range(len(equations))):
    if wanted & set(equations[i].outvars):
      wanted |= _variables(equations[i].invars)
      found.append(i)
  return found[::-1]


def _evaluate(equations, values: dict[Any, Any]) -> None:
  for equation in equations:
    bound = equation.primitive.get_bind_params(equation.params)
    # JAX before 0.10 has a list of functions in front of the parameters.
    functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(
      *functions, *_read(values, equation.invars), **parameters
    )
    if not equation.primitive.multiple_results:
      results = [results]
    values.update(zip(equation.outvars, results, strict=True))


def _read(values: dict[Any, Any], atoms) -> list[Any]:
  return [v.val if isinstance(v, Literal) else values[v] for v in atoms]
