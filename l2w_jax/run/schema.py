"""What a file must hold, written down as data, and a check that names what differs.

A shape is a tree of

    Is(words, test)        a value that passes a test
    Maybe(shape)           null, or that
    {name: shape, ...}     these names at least; one that ends in ? may be absent
    Every(shape)           any names, each of that shape
    Many(shape, "exits")   a list, not empty, of one length wherever exits are
                           listed; "bins+1" has one entry more than there are bins,
                           and "" is any length, 0 too
    Size("exits")          that length, as a number
    Array(kind, "N exits") an array: kinds of NumPy's dtypes, a name for each axis
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Is(NamedTuple):
  """A value for which `test` holds; words say what it is."""

  words: str
  test: Callable[[Any], bool]


class Maybe(NamedTuple):
  """Null, or of a shape."""

  shape: Any


class Every(NamedTuple):
  """A dict with any names."""

  shape: Any


class Many(NamedTuple):
  """A list of one shape; its length has a name."""

  shape: Any
  size: str


class Size(NamedTuple):
  """A length as a number."""

  size: str


class Array(NamedTuple):
  """An array; its whole numbers are below a length, if that is named."""

  kind: str
  axes: str
  below: str = ""


def _is_number(x: Any) -> bool:
  # Python's whole numbers have no end, and JSON's NaN is no number.
  return isinstance(x, int | float) and type(x) is not bool and -1e300 < x < 1e300


NUMBER = Is("a number", _is_number)
POSITIVE = Is("a number above 0", lambda x: _is_number(x) and x > 0)
COUNT = Is("a whole number from 0", lambda x: type(x) is int and 0 <= x < 2**63)
TEXT = Is("text", lambda x: isinstance(x, str))
FLAG = Is("true or false", lambda x: isinstance(x, bool))
_KINDS = {
  "u": "uint8",
  "iu": "whole numbers",
  "f": "numbers",
  "b": "true or false",
  "U": "text",
}
KEYS = Is("keys", lambda x: isinstance(x, dict))


def check(
  shape: Any, found: Any, sizes: dict[str, int] | None = None, where: str = "it"
) -> None:
  """Raises ValueError, which says where, unless something is of a shape.

  Args:
    shape: see the module.
    found: what a file holds.
    sizes: lengths that are known already; those that are found are added.
    where: what `found` is called.
  """
  sizes = {} if sizes is None else sizes
  match shape:
    case Is(words, test):
      _must(test(found), where, words, found)
    case Maybe(inside):
      if found is not None:
        check(inside, found, sizes, where)
    case Size(name):
      _must(COUNT.test(found), where, COUNT.words, found)
      _agree(name, found, sizes, where)
    case Array(kind, axes, below):
      _check_array(found, kind, axes.split(), below, sizes, where)
    case Many(inside, name):
      _must(isinstance(found, list) and (found or not name), where, "a list", found)
      if name:
        _agree(name, len(found), sizes, where)
      for entry in found:
        check(inside, entry, sizes, f"an entry of {where}")
    case Every(inside):
      _must(isinstance(found, dict), where, KEYS.words, found)
      for name, value in found.items():
        check(inside, value, sizes, _inside(name, where))
    case _:
      _must(isinstance(found, dict), where, KEYS.words, found)
      for name, inside in shape.items():
        name, may_be_absent = name.rstrip("?"), name.endswith("?")
        if name in found:
          check(inside, found[name], sizes, _inside(name, where))
        elif not may_be_absent:
          raise ValueError(f"{where} lacks {name!r}")


def _inside(name: str, where: str) -> str:
  return f"its {name!r}" if where == "it" else f"{name!r} of {where}"


def _must(holds: Any, where: str, words: str, found: Any) -> None:
  if not holds:
    raise ValueError(f"{where} must be {words}, got {reprlib.repr(found)}")


def _agree(name: str, length: int, sizes: dict[str, int], where: str) -> None:
  """Binds a length to a name, or raises where the name has another one."""
  name, _, more = name.partition("+")
  length -= int(more or 0)
  size = sizes.setdefault(name, length)
  if length != size:
    raise ValueError(
      f"{where} has {'not all of' if length < size else 'more than'} its {size} "
      f"{name}"
    )


def _check_array(found, kind, axes, below, sizes, where) -> None:
  if found.dtype.kind not in kind or found.ndim != len(axes):
    raise ValueError(
      f"{where} must be [{' '.join(axes)}] of {_KINDS[kind]}, got "
      f"{found.dtype} {list(found.shape)}"
    )
  for name, length in zip(axes, found.shape, strict=True):
    _agree(name, length, sizes, where)
  if found.dtype.kind == "f" and np.isnan(found).any():
    raise ValueError(f"{where} holds NaN")
  if below and found.size and not 0 <= found.min() <= found.max() < sizes[below]:
    raise ValueError(
      f"{where} holds a number that is none of {sizes[below]} {below}"
    )
