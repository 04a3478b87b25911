"""Released PyTorch weights in, and back.

The names of the released MSDNet and RANet follow from ours: `torch_names` is the
whole correspondence. PyTorch itself is needed only to read and write its files.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from l2w_jax.models.backbone import Backbone, Variables

_RENAMED = {"convs": "m", "flows": "scale_flows", "first_layer": "FirstLayer",
            "transition": "trans"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias",
           "mean": "running_mean", "var": "running_var"}
# Order of the parts of a module in a released state_dict; numbers count up.
_ORDER = ("blocks", "scale_flows", "classifier", "FirstLayer",
          "layers", "conv_last", "trans", "m", "linear",
          "conv_down", "conv_up", "conv_normal", "net",
          "weight", "bias", "running_mean", "running_var")

Path = tuple[str, ...]


def torch_names(variables: PyTree) -> dict[Path, str]:
  """Path in the variables -> name in the released state_dict, in its order.

  A ConvBNReLU is a Sequential `net` there, and a bottleneck and the convolution
  behind it share one: convolution, BatchNorm and ReLU are 0, 1, 2 and then 3, 4,
  5. Only the biased first convolution of an ImageNet network is in a bare
  Sequential.
  """
  paths = list(traverse_util.flatten_dict(variables))
  present = {path[1:] for path in paths}
  names = {path: _torch_name(path[1:], present) for path in paths}
  return dict(sorted(names.items(), key=lambda item: _position(item[1])))


def _torch_name(path: Path, present: set[Path]) -> str:
  *modules, leaf = path
  if modules[-1] not in ("conv", "bn"):
    return ".".join([*map(_rename, modules), _LEAVES[leaf]])
  *modules, part = modules
  index = 0 if part == "conv" else 1
  prefix = tuple(modules)
  if modules[-1] in ("reduce", "spatial"):
    modules.pop()
    if (prefix[-1] == "spatial"
        and (*modules, "reduce", "conv", "kernel") in present):
      index += 3
  sequential = [] if (*prefix, "conv", "bias") in present else ["net"]
  return ".".join(
      [*map(_rename, modules), *sequential, str(index), _LEAVES[leaf]])


def _rename(module: str) -> str:
  """Ours -> released, such as layers_0_conv_down -> layers.0.conv_down."""
  stem, *rest = re.split(r"_(?=\d)|(?<=\d)_", module)
  return ".".join([_RENAMED.get(stem, stem), *rest])


def _position(name: str) -> list[int]:
  return [int(part) if part.isdigit() else _ORDER.index(part)
          for part in name.split(".")]


def _to_torch(array: np.ndarray) -> np.ndarray:
  """HWIO -> OIHW, [in out] -> [out in]."""
  return array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim))


def _from_torch(array: np.ndarray) -> np.ndarray:
  return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim))
