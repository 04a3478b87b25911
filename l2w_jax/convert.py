"""Released PyTorch weights in, and back.

    l2w-jax convert RELEASED.pth.tar --config=NAME --workdir=DIR
    l2w-jax convert --export=OUT.pth --workdir=DIR

The first makes a run directory that `--mode=evaluate` accepts, the second a
state_dict that PyTorch loads. Names in a released state_dict follow from ours;
`torch_names` is the whole correspondence. Classes and channels are those of the
weights, so the images are not needed. PyTorch is needed only to read and write its
files.
"""

from __future__ import annotations

from l2w_jax.run import stopping

if __name__ == "__main__":
  stopping.install()  # before the imports that take long

import collections
import io
import pathlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import traverse_util
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.models.backbone import Backbone, Variables
from l2w_jax.run import backend, command, directory, files, lock

# Ours -> released; what is not here keeps its name.
_MODULES = dict(
  convs="m", flows="scale_flows", first_layer="FirstLayer", transition="trans"
)
_LEAVES = dict(
  kernel="weight", scale="weight", mean="running_mean", var="running_var"
)
# Where a part comes in a released state_dict; numbers count up.
_ORDER: Sequence[str] = (
  "blocks scale_flows classifier FirstLayer layers conv_last trans m linear"
  " conv_down conv_up conv_normal net weight bias running_mean running_var"
).split()
# Parts of a name that tell only that a module was wrapped.
_WRAPPERS = (
  "module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module".split()
)
STEM = r"(^|\.)(blocks\.0\.0|FirstLayer)\.layers\.0\.(net\.)?0\.weight$"
IMAGE_SIZE = 512  # of images that no weight depends on; enough for 8 scales
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


def _from_torch(name: str, weight: Any) -> jax.Array:
  """The way back, in float32 or wider: half precision is only for storage."""
  try:
    array = _to_numpy(weight)
    real = array.dtype.kind == "f"
    array = array.astype(np.promote_types(array.dtype, np.float32))
  except (TypeError, ValueError, RuntimeError):
    real = False
  if not real:
    raise ValueError(
      f"{name}, a weight of shape {tuple(np.shape(weight))}, is {weight.dtype}, "
      "sparse, quantised or without data; save the network's state_dict in float32 "
      "or half precision"
    )
  array = jnp.asarray(array.transpose((2, 3, 1, 0) if array.ndim == 4 else None))
  least = 0 if name.endswith("running_var") else -np.inf
  if not (np.isfinite(array) & (np.asarray(array) >= least)).all():
    raise ValueError(
      f"{name} holds NaN, infinite or, of a variance, negative values, and so "
      "answers nothing; take another checkpoint of the training"
    )
  return array


def _to_numpy(weight: Any) -> np.ndarray:
  if not hasattr(weight, "detach"):
    return np.asarray(weight)
  size = weight.numel() * weight.element_size()
  if size > weight.untyped_storage().nbytes():
    raise ValueError("a small file that says it is an enormous array")
  # NumPy has no bfloat16.
  half = weight.is_floating_point() and weight.element_size() < 4
  return (weight.float() if half else weight).detach().numpy()


def import_released(state_dict: Mapping[Any, Any], backbone: Backbone) -> Variables:
  """Variables of a backbone from a released state_dict.

  Args:
    state_dict: torch name -> tensor or array, in any dictionaries that a training
      script nests it in, and with any prefix before its names.
    backbone: the network the weights are for.

  Returns:
    {"params", "batch_stats"}, in float32, or float64 if given and enabled.

  Raises:
    ValueError: names are missing or unknown, or shapes differ.
  """
  template = traverse_util.flatten_dict(
    jax.eval_shape(backbone.init, jax.random.key(0))
  )
  names = torch_names(traverse_util.unflatten_dict(template))
  shapes = {
    name: _to_torch(np.empty(template[path].shape, bool)).shape
    for path, name in names.items()
  }
  weights = _named(_arrays(state_dict), shapes)
  _check(weights, shapes)
  return traverse_util.unflatten_dict(
    {path: _from_torch(name, weights[name]) for path, name in names.items()}
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


def import_released_wpn(state_dict: Mapping[Any, Any]) -> PyTree:
  """WPN parameters {"hidden_0", …, "output"} from the released MLP_tanh's.

  Raises:
    ValueError: names are missing or unknown, or shapes do not chain.
  """
  arrays = _arrays(state_dict)
  names = _wpn_names(sum(name.endswith(".fc.weight") for name in arrays))
  weights = _named(
    arrays,
    [f"{layer}.{leaf}" for layer in names.values() for leaf in ("weight", "bias")],
  )
  shapes, fan_in = {}, None
  for layer in names.values():
    weight = weights.get(f"{layer}.weight", np.empty((0, 0)))
    fan_out, given = weight.shape if weight.ndim == 2 else (0, 0)
    shapes[f"{layer}.weight"] = (fan_out, given if fan_in is None else fan_in)
    shapes[f"{layer}.bias"] = (fan_out,)
    fan_in = fan_out
  _check(weights, shapes)
  return {
    ours: {
      "kernel": _from_torch(f"{layer}.weight", weights[f"{layer}.weight"]),
      "bias": _from_torch(f"{layer}.bias", weights[f"{layer}.bias"]),
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


def _arrays(content: Mapping[Any, Any]) -> dict[str, Any]:
  """All weights in nested dictionaries, by the keys that lead there, with dots."""
  seen = set()  # a dictionary may lie in itself

  def walk(inside, before) -> Iterator[tuple[str, Any]]:
    seen.add(id(inside))
    for key, value in inside.items():
      if isinstance(value, Mapping) and id(value) not in seen:
        yield from walk(value, f"{before}{key}.")
      elif getattr(value, "ndim", 0):  # counters have no dimension
        yield f"{before}{key}", value

  return dict(walk(content, ""))


def _named(arrays: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
  """The weights behind the prefix with which most names are `wanted`, less it."""
  prefixes = collections.Counter()
  for name in arrays:
    parts = name.split(".")
    for start in reversed(range(len(parts))):
      if _unwrapped(parts[start:]) in wanted:
        prefixes["".join(f"{part}." for part in parts[:start])] += 1
        break
  (prefix, most), *others = prefixes.most_common() or [("", 0)]
  if equal := [repr(other) for other, count in others if count == most]:
    logging.warning(
      "the checkpoint holds weights of the network behind %r and %s; the first are "
      "taken: save the others alone to import those",
      prefix,
      ", ".join(equal),
    )
  return {
    _unwrapped(name.removeprefix(prefix).split(".")): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }


def _unwrapped(parts: list[str]) -> str:
  return ".".join(part for part in parts if part not in _WRAPPERS)


def _check(weights: Mapping[str, Any], shapes: dict[str, tuple]) -> None:
  """Raises ValueError unless names and shapes are as they should be."""
  found = {name: tuple(np.shape(weight)) for name, weight in weights.items()}
  missing = [name for name in shapes if name not in found]
  unknown = [name for name in found if name not in shapes]
  differing = [
    name for name, shape in shapes.items() if found.get(name, shape) != shape
  ]
  faults = [
    f"{len(names)} name(s) {fault}, first {names[0]}"
    for fault, names in (("missing", missing), ("unknown", unknown))
    if names
  ]
  if differing:
    name = differing[0]
    faults.append(
      f"{len(differing)} shape(s) differ, first {name}: {found[name]} in the "
      f"checkpoint, {shapes[name]} expected"
    )
  if faults:
    raise ValueError(
      f"the checkpoint does not fit: {'; '.join(faults)}; "
      f"{_advice(missing, unknown, differing)}"
    )


def _advice(missing: list[str], unknown: list[str], differing: list[str]) -> str:
  """What to look at when names are absent or shapes differ."""
  name = (missing or unknown or differing)[0]
  if re.match(r"(first_hidden|rest_hidden|output)_", name):
    return "check that it is a weight prediction network (MLP_tanh)"
  if missing and all(re.search(r"\.running_(mean|var)$", x) for x in missing):
    return (
      "it lacks BatchNorm's running statistics, as dict(named_parameters()) does; "
      "save the state_dict() of the network"
    )
  fewer, more = (
    {x.split(".")[1] for x in names if re.match(r"classifier\.\d", x)}
    for names in (missing, unknown)
  )
  if bool(fewer) != bool(more):
    return (
      f"the config has {len(fewer or more)} exits {'more' if fewer else 'less'} "
      "than it: check model.name and the number of exits (msdnet: model.num_exits; "
      "ranet: model.blocks, block_step and scales)"
    )
  if re.search(r"linear\.(weight|bias)$", name):
    return "check num_classes, and model.classifier_width"
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
  if path.exists() and not (path.is_file() or path.is_dir()):
    raise ValueError(f"{path} is a pipe or a device; copy it to a file first")
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
    raise ValueError(_refusal(path, error)) from error
  if not isinstance(content, Mapping):
    raise ValueError(f"{path} holds a {type(content).__name__} and no state_dict")
  if not _arrays(content):
    raise ValueError(f"{path} holds no weights of a network; name its checkpoint")
  return content


def _refusal(path: pathlib.Path, error: Exception) -> str:
  """Why a file is not read, and what to do with it."""
  if isinstance(error, OSError) and error.strerror:
    return f"{path} cannot be read: {error.strerror.lower()}"
  if "TorchScript" in str(error):
    return (
      f"{path} is a TorchScript archive, which is not loaded because it could run "
      "code; if you trust it, write its weights alone to another file: "
      f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
    )
  refused = re.search(r"GLOBAL (\S+)", str(error))
  if refused:
    return (
      f"{path} holds a {refused[1]}, which is not loaded because it could run "
      "code; if you trust the file, write its weights alone to another, where that "
      f"can be imported: x = torch.load({str(path)!r}, weights_only=False), then, "
      "torch.save(x.state_dict(), 'weights.pth') if x is a whole module, or of "
      "x[KEY].state_dict() if it is a dictionary with a module, or of x[KEY] if it "
      "is one with weights, behind a KEY such as 'state_dict'"
    )
  return (
    f"{path} is not a PyTorch checkpoint, or damaged ({type(error).__name__}); "
    "only what torch.save writes is read, no .safetensors, .npz or others"
  )


def save_torch(path: files.Path, state_dict: StateDict) -> None:
  """Writes a state_dict that `torch.load` and `load_state_dict` take.

  Raises:
    ValueError: PyTorch is not installed.
  """
  torch, data = _torch(), io.BytesIO()
  torch.save(
    {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()},
    data,
  )
  files.write(path, data.getvalue())


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
  variables: Variables, config: ConfigDict, backbone: Backbone, workdir: files.Path
) -> None:
  """A run directory with these variables at step 0, for --mode=evaluate.

  Raises:
    ValueError: the directory holds a run already.
  """
  from l2w_jax.training import checkpoint
  from l2w_jax.training import state as train_state

  if (workdir / "config.json").exists():
    raise ValueError(f"workdir {workdir} holds a run already; name another")
  key = train_state.split_seed(config.seed).init
  state = train_state.init_state(key, backbone, config).replace(**variables)
  files.make_folder(workdir)
  with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      state,
      {
        "seconds": {"train": 0.0, "compile": 0.0},
        "complete": True,
        "identity": {"config": config.to_dict(), "data": None},
      },
    )
  directory.write_config(workdir, config)


def build_backbone(config: ConfigDict, num_classes: int, channels: int) -> Backbone:
  """The backbone of a config; its weights are the same for images of any size."""
  from l2w_jax import models

  size = config.data.image_size or IMAGE_SIZE
  return models.build_backbone(config.model, num_classes, (size, size, channels))


def convert(
  released: pathlib.Path, config: ConfigDict, workdir: files.Path
) -> None:
  """Makes a run directory of a released checkpoint; images are not needed."""
  config = config_lib.validate(config)
  state_dict = load_torch(released)
  num_classes, channels = 2, 3  # where it is of another network
  for name, weight in _arrays(state_dict).items():
    name = _unwrapped(name.split("."))
    if re.search(r"(^|\.)classifier\.0\.linear\.weight$", name):
      num_classes = weight.shape[0]
    if re.search(STEM, name) and weight.ndim == 4:
      channels = weight.shape[1]
  backbone = build_backbone(config, num_classes, channels)
  variables = import_released(state_dict, backbone)
  with lock.held(workdir):
    write_workdir(variables, config, backbone, workdir)


def export(workdir: files.Path, path: files.Path) -> None:
  """Writes the weights of a run directory as a released state_dict."""
  from l2w_jax.training import checkpoint, identity

  files.target(path)  # told before anything is read
  config = identity.read_config(workdir)
  backbone = build_backbone(config, *_sizes(workdir, config))
  state, _ = checkpoint.restore(workdir, config, backbone)
  save_torch(path, export_released(state.variables, backbone))


def _sizes(workdir: files.Path, config: ConfigDict) -> tuple[int, int]:
  """(classes, channels of an image) of a run, as its latest checkpoint has them."""
  from l2w_jax.training import checkpoint

  with checkpoint.Checkpoints(workdir) as checkpoints:
    arrays = (checkpoints.info() or {}).get("arrays")
  if arrays is None:  # an early version did not write them
    from l2w_jax.data import sources

    dataset = sources.load(config.data)
    return dataset.num_classes, dataset.image_shape[-1]
  shapes = {
    ".".join(re.findall(r"\w+", path)): list(
      map(int, re.findall(r"\d+(?=[],])", x))
    )
    for path, x in arrays.items()
  }
  first = "first_layer" if config.model.name == "ranet" else "blocks_0_0"
  return (
    shapes["params.classifier_0.linear.bias"][0],
    shapes[f"params.{first}.layers_0.conv.kernel"][2],
  )


FLAGS = flags.FLAGS


def _define_flags() -> None:
  command.define_config("That of the released model.")
  flags.DEFINE_string("workdir", None, "Run directory to make, or to export.")
  flags.DEFINE_string("export", None, "PyTorch file to write.")


def _main(arguments: list[str]) -> None:
  if FLAGS.workdir is None:
    raise ValueError("name the run directory with --workdir=DIR")
  workdir = files.path(FLAGS.workdir)
  backend.check()
  match arguments, FLAGS.export, FLAGS.config:
    case [released], None, config if config is not None:
      convert(pathlib.Path(released), config, workdir)
    case [], path, None if path is not None:
      export(workdir, files.path(path))
    case _:
      raise ValueError(
        "give RELEASED.pth.tar with --config to import, or --export=OUT.pth "
        "alone to export"
      )
  print(f"convert: {backend.describe()}", file=sys.stderr)


if __name__ == "__main__":
  _define_flags()
  command.run(_main)
