"""Released PyTorch weights in, and back.

    python -m l2w_jax.convert RELEASED.pth.tar --config=FILE.py --workdir=DIR
    python -m l2w_jax.convert --export=OUT.pth --workdir=DIR

The first makes a run directory that `--mode=evaluate` accepts, the second a
state_dict that PyTorch loads. Names in a released state_dict follow from ours;
`torch_names` is the whole correspondence. PyTorch is needed only to read and
write its files.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import traverse_util
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.models.backbone import Backbone, Variables
from l2w_jax.run import command, directory

# Ours -> released; what is not here keeps its name.
_MODULES = dict(
  convs="m", flows="scale_flows", first_layer="FirstLayer", transition="trans"
)
_LEAVES = dict(
  kernel="weight", scale="weight", mean="running_mean", var="running_var"
)
# Where a part comes in a released state_dict; numbers count up.
_ORDER = (
  "blocks scale_flows classifier FirstLayer layers conv_last trans m linear"
  " conv_down conv_up conv_normal net weight bias running_mean running_var"
).split()
_COUNTER = "num_batches_tracked"  # BatchNorm's; only momentum=None reads it

Path = tuple[str, ...]
StateDict = dict[str, np.ndarray]


def torch_names(variables: PyTree) -> dict[Path, str]:
  """Path in the variables -> name in the released state_dict, in its order.

  A ConvBNReLU is a Sequential called net there, with convolution, BatchNorm and
  ReLU as 0, 1, 2; a bottleneck and the convolution behind it share one, 0 to 5.
  Only the first convolution of an ImageNet network, which has a bias, is in a
  Sequential without that name.
  """
  paths = list(traverse_util.flatten_dict(variables))
  modules = {path[1:-1] for path in paths}
  biased = {path[1:-2] for path in paths if path[-2:] == ("conv", "bias")}
  names = {path: _torch_name(path[1:], modules, biased) for path in paths}
  return dict(sorted(names.items(), key=lambda item: _position(item[1])))


def _torch_name(path: Path, modules: set[Path], biased: set[Path]) -> str:
  *owner, leaf = path
  sequence = []
  if owner[-1] in ("conv", "bn"):
    index = ("conv", "bn").index(owner.pop())
    sequence = [] if tuple(owner) in biased else ["net"]
    if owner[-1] in ("reduce", "spatial"):
      last = owner.pop()
      if last == "spatial" and (*owner, "reduce", "conv") in modules:
        index += 3
    sequence.append(str(index))
  return ".".join([*map(_rename, owner), *sequence, _LEAVES.get(leaf, leaf)])


def _rename(module: str) -> str:
  """Ours -> released, such as layers_0_conv_down -> layers.0.conv_down."""
  name, *rest = re.split(r"_(?=\d)|(?<=\d)_", module)
  return ".".join([_MODULES.get(name, name), *rest])


def _position(name: str) -> list[int]:
  return [
    int(part) if part.isdigit() else _ORDER.index(part) for part in name.split(".")
  ]


def _to_torch(array: np.ndarray) -> np.ndarray:
  """HWIO -> OIHW, [in out] -> [out in]."""
  return np.ascontiguousarray(
    array.transpose((3, 2, 0, 1) if array.ndim == 4 else None)
  )


def _from_torch(array: Any) -> jax.Array:
  """The way back, in float32 or wider: half precision is only for storage."""
  array = np.asarray(array)
  array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else None)
  return jnp.asarray(array.astype(np.promote_types(array.dtype, np.float32)))


def import_released(state_dict: Mapping[str, Any], backbone: Backbone) -> Variables:
  """Variables of a backbone from a released state_dict.

  Args:
    state_dict: torch name -> anything `np.asarray` takes; may be nested under
      "state_dict" or "model", and names may start with "module.".
    backbone: the network the weights are for.

  Returns:
    {"params", "batch_stats"}, in float32, or float64 if given and enabled.

  Raises:
    ValueError: names are missing or unknown, or shapes differ.
  """
  weights = {
    name: array
    for name, array in _weights(state_dict).items()
    if not name.endswith(_COUNTER)
  }
  template = traverse_util.flatten_dict(
    jax.eval_shape(backbone.init, jax.random.key(0))
  )
  names = torch_names(traverse_util.unflatten_dict(template))
  shapes = {
    name: _to_torch(np.empty(template[path].shape, bool)).shape
    for path, name in names.items()
  }
  _check(weights, shapes)
  return traverse_util.unflatten_dict(
    {path: _from_torch(weights[name]) for path, name in names.items()}
  )


def export_released(variables: Variables, backbone: Backbone) -> StateDict:
  """The released state_dict, as NumPy arrays in the released order.

  Raises:
    ValueError: the variables are not those of the backbone.
  """
  template = jax.eval_shape(backbone.init, jax.random.key(0))
  leaves = traverse_util.flatten_dict(variables)
  for path, leaf in traverse_util.flatten_dict(template).items():
    if path not in leaves or leaves[path].shape != leaf.shape:
      found = leaves[path].shape if path in leaves else "missing"
      raise ValueError(
        f"the variables do not fit the backbone: {'/'.join(path)} is {found} "
        f"and should be {leaf.shape}; build the backbone they were made with"
      )
  state_dict = {}
  for path, name in torch_names(template).items():
    state_dict[name] = _to_torch(np.asarray(leaves[path]))
    if path[-1] == "var":
      owner = name.rpartition(".")[0]
      state_dict[f"{owner}.{_COUNTER}"] = np.zeros((), np.int64)
  return state_dict


def import_released_wpn(state_dict: Mapping[str, Any]) -> PyTree:
  """WPN parameters {"hidden_0", …, "output"} from the released MLP_tanh's.

  Raises:
    ValueError: names are missing or unknown, or shapes do not chain.
  """
  weights = _weights(state_dict)
  hidden = sum(name.endswith(".fc.weight") for name in weights)
  names = _wpn_names(hidden)
  shapes, fan_in = {}, None
  for layer in names.values():
    weight = np.asarray(weights.get(f"{layer}.weight", np.empty((0, 0))))
    fan_out, given = weight.shape if weight.ndim == 2 else (0, 0)
    shapes[f"{layer}.weight"] = (fan_out, given if fan_in is None else fan_in)
    shapes[f"{layer}.bias"] = (fan_out,)
    fan_in = fan_out
  _check(weights, shapes)
  return {
    ours: {
      "kernel": _from_torch(weights[f"{layer}.weight"]),
      "bias": _from_torch(weights[f"{layer}.bias"]),
    }
    for ours, layer in names.items()
  }


def export_released_wpn(wpn_params: PyTree) -> StateDict:
  """The released MLP_tanh's state_dict, as NumPy arrays."""
  return {
    f"{layer}.{_LEAVES.get(leaf, leaf)}": _to_torch(
      np.asarray(wpn_params[ours][leaf])
    )
    for ours, layer in _wpn_names(len(wpn_params) - 1).items()
    for leaf in ("kernel", "bias")
  }


def _wpn_names(hidden: int) -> dict[str, str]:
  """Layer of ours -> of the released WPN, with `hidden` hidden layers."""
  return {
    "hidden_0": "first_hidden_layer.fc",
    **{f"hidden_{i}": f"rest_hidden_layers.{i - 1}.fc" for i in range(1, hidden)},
    "output": "output_layer",
  }


def _weights(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
  """Names to weights, out of the nesting and prefixes of a training script."""
  for key in ("state_dict", "model"):
    if isinstance(state_dict.get(key), Mapping):
      return _weights(state_dict[key])
  return {
    name.removeprefix("module."): weight for name, weight in state_dict.items()
  }


def _check(weights: Mapping[str, Any], shapes: dict[str, tuple]) -> None:
  """Raises ValueError unless names and shapes are as they should be."""
  missing = [name for name in shapes if name not in weights]
  unknown = [name for name in weights if name not in shapes]
  differing = [
    name
    for name, shape in shapes.items()
    if name in weights and np.shape(weights[name]) != shape
  ]
  faults = [
    f"{len(names)} name(s) {fault}, first {names[0]}"
    for fault, names in (("missing", missing), ("unknown", unknown))
    if names
  ]
  if differing:
    name = differing[0]
    faults.append(
      f"{len(differing)} shape(s) differ, first {name}: "
      f"{np.shape(weights[name])} in the checkpoint, {shapes[name]} expected"
    )
  if faults:
    raise ValueError(
      f"the checkpoint does not fit: {'; '.join(faults)}; "
      f"{_advice((missing or unknown or differing)[0])}"
    )


def _advice(name: str) -> str:
  """What to look at when a name is absent or its shape differs."""
  if re.search(r"linear\.(weight|bias)$", name):
    return "check num_classes, that is config.data, and model.classifier_width"
  if re.match(r"(first_hidden|rest_hidden|output)_", name):
    return "check that it is a weight prediction network (MLP_tanh)"
  if re.match(r"(FirstLayer|blocks\.0\.0)\.", name):
    return "check model.name, model.stem, model.channels and growth_factors"
  return (
    "check model.name, the number and length of the blocks, model.growth, "
    "growth_factors and bottleneck_factors"
  )


def load_torch(path: pathlib.Path) -> Mapping[str, Any]:
  """Content of a PyTorch file, without running any code in it.

  Raises:
    ValueError: PyTorch is not installed, or the file cannot be read safely.
  """
  torch = _torch()
  scalar = np.float64(0).__reduce__()[0]  # best accuracies
  harmless = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype]
  harmless += [
    type(np.dtype(name))
    for name in ("float32", "float64", "int32", "int64", "bool")
  ]
  try:
    with torch.serialization.safe_globals(harmless):
      content = torch.load(path, map_location="cpu", weights_only=True)
  except FileNotFoundError as error:
    raise ValueError(f"no file {path}") from error
  except Exception as error:  # damaged files raise anything
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
      raise ValueError(
        f"{path} holds a {refused[1]}, which is not loaded because it could "
        "run code; if you trust the file, write its weights alone to another: "
        f"torch.save(torch.load({str(path)!r}, weights_only=False)"
        "['state_dict'], 'weights.pth')"
      ) from error
    raise ValueError(
      f"{path} is not a PyTorch checkpoint, or damaged ({type(error).__name__})"
    ) from error
  if not isinstance(content, Mapping):
    raise ValueError(f"{path} holds a {type(content).__name__} and no state_dict")
  return content


def save_torch(path: pathlib.Path, state_dict: StateDict) -> None:
  """Writes a state_dict that `torch.load` and `load_state_dict` take.

  Raises:
    ValueError: PyTorch is not installed.
  """
  torch = _torch()
  torch.save(
    {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()},
    path,
  )


def _torch():
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      "reading and writing PyTorch files needs PyTorch: pip install "
      "'l2w_jax[torch]'"
    ) from error
  return torch


def write_workdir(
  variables: Variables,
  config: ConfigDict,
  backbone: Backbone,
  workdir: pathlib.Path,
) -> None:
  """A run directory with these variables at step 0, for --mode=evaluate.

  Raises:
    ValueError: the directory holds a run already.
  """
  from l2w_jax.training import checkpoint
  from l2w_jax.training import state as train_state

  if (workdir / "config.json").exists():
    raise ValueError(f"workdir {workdir} holds a run already; name another")
  state = train_state.init_state(
    jax.random.key(config.seed), backbone, config
  ).replace(**variables)
  workdir.mkdir(parents=True, exist_ok=True)
  with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0, state, {"seconds": {"train": 0.0, "compile": 0.0}, "complete": True}
    )
  directory.write_config(workdir, config)


def build_backbone(config: ConfigDict) -> Backbone:
  """The backbone of a config, for its own data."""
  from l2w_jax import models
  from l2w_jax.data import sources

  dataset = sources.load(config.data)
  return models.build_backbone(
    config.model, dataset.num_classes, dataset.image_shape
  )


def convert(
  released: pathlib.Path, config: ConfigDict, workdir: pathlib.Path
) -> None:
  """Makes a run directory of a released checkpoint."""
  backbone = build_backbone(config_lib.validate(config))
  variables = import_released(load_torch(released), backbone)
  write_workdir(variables, config, backbone, workdir)


def export(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the weights of a run directory as a released state_dict."""
  from l2w_jax.training import checkpoint

  config = directory.read_config(workdir)
  backbone = build_backbone(config)
  state, _ = checkpoint.restore(workdir, config, backbone)
  save_torch(path, export_released(state.variables, backbone))


FLAGS = flags.FLAGS


def _define_flags() -> None:
  command.define_config("That of the released model.")
  flags.DEFINE_string("workdir", None, "Run directory to make, or to export.")
  flags.DEFINE_string("export", None, "PyTorch file to write.")


def _main(arguments: list[str]) -> None:
  if FLAGS.workdir is None:
    raise ValueError("name the run directory with --workdir=DIR")
  workdir = pathlib.Path(FLAGS.workdir)
  match arguments, FLAGS.export, FLAGS.config:
    case [released], None, config if config is not None:
      convert(pathlib.Path(released), config, workdir)
    case [], path, None if path is not None:
      export(workdir, pathlib.Path(path))
    case _:
      raise ValueError(
        "give RELEASED.pth.tar with --config to import, or --export=OUT.pth "
        "alone to export"
      )


if __name__ == "__main__":
  _define_flags()
  command.run(_main)
