"""Every hyperparameter once: default, range, unit and source.

A config file under configs/ starts from `defaults(model)` and sets only what
deviates. `validate` raises one ValueError that says which key, what was given
and what is allowed. Defaults are those of the published CIFAR-100 runs.

`model.name` and `method` may also be MODULE.NAME of a module of one's own: a Flax
module, whose fields with a default are the keys of `config.model`, or a function
that gives weights. docs/extend.md has an example of each.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from l2w_jax import named

# JAX makes the same key of 2**32 as of 0, and NumPy draws for (2**32, 0), which is
# what `splits` holds out, what it draws for (0, 1), which is another of its draws.
LAST_SEED = 2**32 - 1


class Key(NamedTuple):
  """One hyperparameter.

  allowed: value -> True if it may be used.
  says: what is allowed, in words.
  doc: meaning, unit, source.
  """

  default: Any
  allowed: Callable[[Any], bool]
  says: str
  doc: str


def _number(
  default, low, doc, high=math.inf, *, above=False, kinds=(int, float)
) -> Key:
  def allowed(value):
    return (
      isinstance(value, kinds)
      and not isinstance(value, bool)
      and math.isfinite(value)
      and (low < value <= high if above else low <= value <= high)
    )

  noun = "a whole number" if kinds is int else "a number"
  least = f"{'above' if above else 'at least'} {low}"
  most = "" if high == math.inf else f" and at most {high}"
  return Key(default, allowed, f"{noun} {least}{most}", doc)


def _integer(default, low, doc, high=math.inf) -> Key:
  return _number(default, low, doc, high, kinds=int)


def _positive(default, doc, high=math.inf) -> Key:
  return _number(default, 0, doc, high, above=True)


def _choice(default, choices, doc) -> Key:
  says = "one of " + ", ".join(map(repr, choices))
  return Key(default, lambda value: value in choices, says, doc)


def _choice_or_own(default, choices, own: str, doc) -> Key:
  return Key(
    default,
    lambda value: value in choices or named.is_own(value),
    f"one of {', '.join(map(repr, choices))}, or MODULE.{own} of your own",
    doc,
  )


def _text(default, doc) -> Key:
  return Key(
    default,
    lambda value: isinstance(value, str) and bool(value),
    "a non-empty string",
    doc,
  )


def _flag(default, doc) -> Key:
  return Key(default, lambda value: isinstance(value, bool), "True or False", doc)


def _tuple(default, item: Callable[[Any], bool], of: str, doc, least=0) -> Key:
  def allowed(value):
    return (
      isinstance(value, (tuple, list))
      and len(value) >= least
      and all(map(item, value))
    )

  return Key(default, allowed, f"a tuple of {of}", doc)


def _factors(default, doc) -> Key:
  whole = _integer(1, 1, doc).allowed
  return _tuple(default, whole, "whole numbers, at least 1 each", doc, least=1)


def _numbers(doc) -> Key:
  return _tuple((), _positive(1.0, doc).allowed, "numbers above 0", doc)


def estimator(value: Any) -> tuple[str, int]:
  """(name, T parts of a train half) of `meta.estimator`.

  T is 1 for all but "unroll:T". ("", 0) for what means nothing.
  """
  if value in ("grad", "jvp", "finite_difference", "first_order"):
    return value, 1
  unroll = re.fullmatch("unroll:([1-9][0-9]{0,3})", str(value))
  return ("unroll", int(unroll[1])) if unroll else ("", 0)


# Keys that are told from their default alone.
_KINDS = {
  bool: _flag,
  int: lambda default, doc: _integer(default, 0, doc),
  float: lambda default, doc: _number(default, -math.inf, doc),
  str: _text,
  tuple: lambda default, doc: _tuple(default, lambda _: True, "values", doc),
}

_EVERY_MODEL = {
  "stem": _choice(
    "cifar",
    ("cifar", "imagenet"),
    "first layer: 3×3 at full size, or 7×7 and pool to 1/4",
  ),
  "channels": _integer(16, 1, "channels of the first layer at scale 0"),
  "growth": _integer(6, 1, "channels a layer adds, times the growth factor"),
  "growth_factors": _factors((1, 2, 4), "width of each scale"),
  "bottleneck_factors": _factors(
    (1, 2, 4), "bottleneck width of each scale, times its growth"
  ),
  "reduction": _number(
    0.5, 0, "fraction of channels a transition keeps; 0: no transitions", 1
  ),
  "classifier_width": _integer(
    128, 0, "channels in the exit classifiers; 0: as wide as their input"
  ),
  "init": _choice(
    "pytorch",
    ("pytorch", "he"),
    "kernels: uniform ±1/√fan_in, or normal of variance 2/(k²·C_out)",
  ),
  "dtype": _choice(
    "float32",
    ("float32", "bfloat16"),
    "of images, convolutions and activations; all else is float32",
  ),
  "precision": _choice(
    "default",
    ("default", "high", "highest"),
    "of products and convolutions of float32; by default a TPU rounds what it "
    "multiplies to bfloat16, a GPU to TF32",
  ),
  "remat": _flag(
    False,
    "compute each stage anew in derivatives: less memory, slower; on a CPU no "
    "less, as XLA merges it with the first time",
  ),
}

MODEL_KEYS: dict[str, dict[str, Key]] = {
  "msdnet": {
    "num_exits": _integer(5, 1, "K; 5 or 7 in the paper"),
    "step": _integer(1, 1, "layers between exits"),
    "step_mode": _choice(
      "lin_grow", ("even", "lin_grow"), "block k has step layers, or step·k + 1"
    ),
    "base": _integer(1, 1, "layers before the first exit"),
    "bottleneck": _flag(True, "1×1 convolution in front of every 3×3"),
    "prune": _choice(
      "max", ("max", "min"), "drop scales evenly over the depth, or only at its end"
    ),
    **_EVERY_MODEL,
  },
  "ranet": {
    "blocks": _integer(2, 1, "blocks, and exits, of the coarsest flow"),
    "block_step": _integer(2, 1, "exits a flow adds to the one before"),
    "step": _integer(2, 1, "layers in a block"),
    "step_mode": _choice(
      "lg", ("even", "lg"), "block b has step layers, or step·b"
    ),
    "scales": _factors(
      (1, 2, 3), "scale of each flow, coarsest first; 1 is the coarsest"
    ),
    "compress": _positive(
      0.25, "share of a fused layer's growth from the flow before", 1
    ),
    **_EVERY_MODEL,
    "growth_factors": _factors((4, 2, 1), "width of each flow"),
    "bottleneck_factors": _factors(
      (4, 2, 1), "bottleneck width of each flow, times its growth"
    ),
    "init": _choice(
      "he",
      ("pytorch", "he"),
      "kernels behind the first layer: as released, or uniform ±1/√fan_in",
    ),
  },
}

_own_models: dict[str, dict[str, Key]] = {}  # that were asked for so far

_NAME = {
  "name": _choice_or_own("msdnet", tuple(MODEL_KEYS), "CLASS", "kind of backbone")
}
# Of a backbone of one's own, beside its fields; `init` is its field `initializer`.
_EVERY_OWN = {
  name: _EVERY_MODEL[name] for name in ("init", "dtype", "precision", "remat")
}

KEYS = {
  "seed": _integer(
    0, 0, "root of every random number of a run; 32 bits are told apart", LAST_SEED
  ),
  "method": _choice_or_own(
    "l2w",
    ("l2w", "uniform", "fixed", "random", "easy_early", "equilibrium", "distill"),
    "FUNCTION",
    "learned sample weights; the plain sum of exit losses; or with "
    "exit_weights, random weights, weights that favour easy samples early, "
    "gradient equilibrium, or self-distillation",
  ),
  "epochs": _integer(300, 1, "passes over the train split"),
  "batch": _integer(
    1024, 2, "loader batch 2B in images over all devices; two updates"
  ),
  "label_smoothing": _number(
    0.0, 0, "probability mass spread over classes in the training loss", 0.999
  ),
  "data": {
    "source": _text(
      "digits",
      "which images: digits, digits:mixed, npz:PATH, tfds:NAME, folder:PATH, "
      "synthetic:HEIGHTxWIDTHxCHANNELS",
    ),
    "data_dir": Key(
      "",
      lambda value: isinstance(value, str),
      "a string",
      "where prepared tfds sets lie; empty: where TFDS puts them",
    ),
    "seed": _integer(
      0,
      0,
      "draws what is held out, left out and mislabelled; does not "
      "follow config.seed, so that runs share their images; 32 bits as well",
      LAST_SEED,
    ),
    "calibration": _integer(
      5000,
      0,
      "images held out of train, the same number of each class; "
      "0: none. Sources with a calibration split (digits) keep theirs",
    ),
    "meta": _integer(
      0,
      0,
      "images held out of train, the same number of each class and before noise "
      "and imbalance, that meta halves are drawn from; copies of an image are "
      "images of their own, so one may stay in train; 0: halves serve each other, "
      "as published",
    ),
    "imbalance": _number(
      1.0,
      1,
      "first class over last class of a long-tailed train "
      "split (Cui et al., CVPR 2019); 1: as it is",
    ),
    "label_noise": _number(
      0.0, 0, "share of train labels changed to another class", 0.999
    ),
    "corrupt": _choice("fail", ("fail", "skip"), "what unreadable images lead to"),
    "max_pixels": _integer(
      89_478_485,
      1,
      "pixels that an image file may hold, or it counts as unreadable; Pillow's "
      "limit against files that unpack to fill the memory",
    ),
    "grey_range": _number(
      0.0,
      0,
      "the value that is white in grey files of more than 8 bits, such as 4095 for "
      "12 bits kept in 16; 0: the largest their bits can hold, 1 in floats",
    ),
    "image_size": _integer(
      0,
      0,
      "pixels of the square that images are resized and cropped to; 0: as they are",
    ),
    "feed": _choice(
      "auto",
      ("auto", "resident", "streaming"),
      "keep images on the devices, or decode them as they are needed; "
      "auto: resident up to 1 GiB of pixels",
    ),
    "augment": _choice(
      "none",
      ("none", "shift", "shift_flip", "crop_flip"),
      "random pad-and-crop by `pad`, and mirror; or RandomResizedCrop to "
      "`image_size`, and mirror",
    ),
    "pad": _integer(4, 0, "pixels of padding for the random shift"),
    "mean": _numbers("of pixels, per channel; (): of the train images"),
    "std": _numbers("of pixels, per channel; (): of the train images"),
  },
  "optimizer": {
    "learning_rate": _positive(0.8, "α of SGD, cosine to 0 per step"),
    "momentum": _number(0.9, 0, "of SGD, no dampening", 0.9999),
    "weight_decay": _number(1e-4, 0, "of SGD, coupled, on every parameter"),
  },
  "meta": {
    "epsilon": _number(0.8, 0, "ε, how far a weight may move from 1", 1),
    "q": _positive(0.75, "exit k gets p_k ∝ q^k; reference: target_p_index/20"),
    "center_over": _choice(
      "exits",
      ("exits", "batch", "all"),
      "weights average to 1 over it; reference: col, row, mat",
    ),
    "inputs": _choice(
      "loss", ("loss", "confidence", "both"), "what the WPN looks at"
    ),
    "estimator": Key(
      "grad",
      lambda value: bool(estimator(value)[0]),
      "one of 'grad', 'jvp', 'finite_difference', 'first_order' or "
      "'unroll:T' with a whole number T ≥ 1",
      "of the WPN gradient, Eq. 8; T: look-ahead of T steps on T parts of the half",
    ),
    "look_ahead": _choice(
      "network",
      ("network", "classifiers"),
      "what the SGD step of Eq. 7 moves: the network, as published, or its exit "
      "classifiers alone, at half the price",
    ),
    "objective": _choice(
      "allocated",
      ("allocated", "plain"),
      "meta samples count at the exit they would leave from, or, as an "
      "ablation, at every exit",
    ),
    "interval": _integer(
      1, 1, "loader batches between WPN updates, counted in an epoch"
    ),
    "hidden": _integer(500, 1, "units in a hidden layer of the WPN"),
    "layers": _integer(1, 1, "hidden layers of the WPN"),
    "learning_rate": _positive(1e-4, "β of Adam, cosine to 0 per step"),
    "weight_decay": _number(1e-4, 0, "of Adam, L2 in the gradient"),
  },
  "baseline": {
    "exit_weights": _numbers("method fixed: the weight of each exit's loss"),
    "distill": _number(
      0.5,
      0,
      "method distill: share of the last exit's soft labels in the "
      "loss of an earlier exit",
      1,
    ),
    "temperature": _positive(3.0, "method distill: softens both"),
  },
  "evaluate": {
    "batch": _integer(512, 1, "images per evaluation step on a device"),
    "every": _integer(10, 1, "epochs between calibration accuracies"),
    "calibration": _choice(
      "held_out",
      ("held_out", "released"),
      "search for thresholds: never beyond a budget, or as released, "
      "which may also search on the train split",
    ),
    "confidence": _choice(
      "probability",
      ("probability", "margin", "entropy", "patience"),
      "what an exit's threshold is compared with",
    ),
    "target": _text(
      "q:0.75",
      "thresholds to run and export with: q:Q, macs:M, accuracy:A or risk:R:DELTA",
    ),
  },
  "diagnose": {
    "every": _integer(
      0,
      0,
      "steps between diagnoses of the meta-gradient and the weights "
      "(diagnostics.py), the first before step 1; 0: none",
    ),
    "estimators": _tuple(
      ("jvp", "classifiers", "finite_difference", "first_order", "unroll:2"),
      lambda name: name == "classifiers" or bool(estimator(name)[0]),
      "values of config.meta.estimator, or 'classifiers'",
      "compared with the exact gradient; classifiers: the exact gradient of "
      "meta.look_ahead=classifiers",
    ),
    "half": _integer(64, 2, "images in a half, train and meta"),
    "meta_halves": _integer(8, 2, "M, meta halves for one train half"),
  },
  "log": {
    "every": _integer(1, 1, "steps per line of metrics.jsonl"),
    "weights_every": _integer(
      10, 1, "epochs between pictures of weights against loss"
    ),
    "seconds": _positive(10.0, "between progress lines in a log"),
  },
  "checkpoint": {
    "every": _integer(10, 1, "`unit`s between checkpoints; the last step has one"),
    "unit": _choice(
      "epochs", ("epochs", "steps", "minutes"), "what checkpoint.every counts"
    ),
    "keep": _integer(2, 1, "checkpoints kept"),
  },
  "num_devices": _integer(0, 0, "devices that share a batch; 0: all of the run"),
  "microbatches": _integer(
    1,
    1,
    "parts of a half that a device computes in turn: less memory, 1.4 "
    "times the operations; BatchNorm's statistics are then those of a part. For "
    "accelerators: convolutions in a loop are 25 times slower on a CPU",
  ),
  "sync": _choice(
    "global",
    ("global", "local"),
    "devices compute as one, or as released: BatchNorm, centring, ranking and "
    "pseudo step on each, only the gradients averaged",
  ),
}


def defaults(model: str = "msdnet") -> ConfigDict:
  """All keys at their defaults, for one kind of backbone; keys are locked.

  Raises:
    ValueError: unknown model.
  """
  config = ConfigDict(_default_values(KEYS))
  config.model = {"name": model, **_default_values(_model_keys(model))}
  return config.lock()


def differences(
  config: ConfigDict, other: ConfigDict, ignore: tuple[str, ...] = ()
) -> list[str]:
  """For every key that differs: "key is A here and B there".

  Args:
    config, other: validated configs.
    ignore: keys that may differ; one with keys of its own stands for all.
  """
  flat, other_flat = dict(_flat(config)), dict(_flat(other))
  return [
    f"{key} is {flat.get(key)!r} here and {other_flat.get(key)!r} there"
    for key in sorted(flat.keys() | other_flat.keys())
    if flat.get(key) != other_flat.get(key)
    and not {key, key.split(".")[0]} & set(ignore)
  ]


def _flat(config: ConfigDict, prefix: str = ""):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _default_values(keys: Mapping) -> dict[str, Any]:
  return {
    name: _default_values(key) if isinstance(key, Mapping) else key.default
    for name, key in keys.items()
  }


def _model_keys(model: Any) -> Mapping[str, Key]:
  if named.is_own(model):
    return _own_keys(model)
  if model not in tuple(MODEL_KEYS):  # a list has no hash
    raise ValueError(
      f"unknown model {model!r} in config.model.name; choose "
      f"one of {', '.join(map(repr, MODEL_KEYS))}, or MODULE.CLASS of your own"
    )
  return MODEL_KEYS[model]


def _own_keys(model: str) -> Mapping[str, Key]:
  """Keys of a backbone of one's own: its fields that have a default."""
  backbone = named.own(model)
  if not (dataclasses.is_dataclass(backbone) and hasattr(backbone, "stage")):
    raise ValueError(
      f"config.model.name={model!r} is no Flax module with a method `stage`; "
      "docs/extend.md has an example of one"
    )
  keys = {}
  for field in dataclasses.fields(backbone):
    default, doc = field.default, f"a field of {model}"
    # Every Flax module has these two.
    if field.name in ("parent", "name") or default is dataclasses.MISSING:
      continue
    if type(default) not in _KINDS:
      raise ValueError(
        f"the default of {field.name} of {model} must be a number, text, a flag or "
        f"a tuple, got {default!r}"
      )
    keys[field.name] = _KINDS[type(default)](default, doc)
  _own_models[model] = {**keys, **_EVERY_OWN}
  return _own_models[model]


def validate(config: ConfigDict) -> ConfigDict:
  """The config itself, if every key exists and holds an allowed value.

  What only another method or a switched-off part would read may be anything that
  is allowed by itself.

  Raises:
    ValueError: naming the first key that is missing, unknown or out of range.
  """
  _check_values(config)
  _check_estimator(config)
  if config.diagnose.every:
    _check_diagnose(config)
  check_held_out(config, holds_out(config))
  return config


def holds_out(config: ConfigDict) -> bool:
  """Whether there is a split to choose thresholds on that is not trained on.

  Digits bring one of their own; an .npz file may, which only who opens it knows.
  """
  own = config.data.source.startswith(("digits", "npz:"))
  return own or config.data.calibration > 0


def check_held_out(config: ConfigDict, is_held_out: bool) -> None:
  """Raises ValueError where thresholds are to be of a split that is not there."""
  if not is_held_out and config.evaluate.calibration == "held_out":
    raise ValueError(
      "config.data.calibration=0 holds nothing out to choose thresholds on; set "
      "config.evaluate.calibration=released to choose them on the train split"
    )


def check_method(config: ConfigDict, num_exits: int) -> None:
  """Raises ValueError unless a step can be made of the config for K exits.

  It may have been changed since it was validated, and only who knows the backbone
  knows K. Data, evaluation and diagnosis are not asked what suits them.
  """
  _check_values(config)
  _check_estimator(config)
  check_rule(config)
  exit_weights = config.baseline.exit_weights
  if config.method == "fixed" and len(exit_weights) != num_exits:
    raise ValueError(
      "method fixed needs config.baseline.exit_weights with one weight for "
      f"each of the {num_exits} exits; got {tuple(exit_weights)}"
    )


def check_rule(config: ConfigDict) -> None:
  """Raises ValueError unless a rule of one's own, if `method` is one, is there.

  Who trains needs it; a finished run is evaluated without it.
  """
  if named.is_own(config.method) and not callable(named.own(config.method)):
    raise ValueError(
      f"config.method={config.method!r} is no function; docs/extend.md has an "
      "example of one"
    )


def _check_values(config: ConfigDict) -> None:
  """Raises ValueError unless every key exists and holds an allowed value."""
  model = config.get("model")
  # Without a name, any table serves to say that the name is missing.
  name = model.get("name", "msdnet") if isinstance(model, ConfigDict) else "msdnet"
  _validate(config, _all_keys(_model_keys(name)), "config")


def _check_estimator(config: ConfigDict) -> None:
  name = config.meta.estimator
  if config.method != "l2w":
    return
  _check_first_order("meta.estimator", (name,), config)
  if estimator(name)[0] == "unroll" and config.meta.look_ahead != "network":
    raise ValueError(
      f"config.meta.estimator={name!r} takes steps of the whole network; set "
      f"config.meta.look_ahead to network (it is {config.meta.look_ahead}), or "
      "take another estimator"
    )
  if config.microbatches > 1 and estimator(name)[0] == "unroll":
    raise ValueError(
      f"config.meta.estimator={name!r} cuts a half by itself; set "
      f"config.microbatches to 1 (it is {config.microbatches}), or take another "
      "estimator"
    )


def _check_diagnose(config: ConfigDict) -> None:
  if config.method != "l2w":
    raise ValueError(
      f"config.diagnose.every={config.diagnose.every} looks at meta-gradients, "
      f"which method {config.method!r} does not have; set it to 0"
    )
  _check_first_order("diagnose.estimators", config.diagnose.estimators, config)
  for name in config.diagnose.estimators:
    if config.diagnose.half % max(1, estimator(name)[1]):
      raise ValueError(
        f"config.diagnose.half={config.diagnose.half} does not split into the "
        f"equal parts of {name!r}; use a multiple of {estimator(name)[1]}"
      )


def _check_first_order(key: str, names: Sequence[str], config: ConfigDict) -> None:
  if "first_order" in names and config.meta.center_over == "batch":
    raise ValueError(
      f"config.{key} has 'first_order', which treats the samples of an exit "
      "alike, so weights centred over the batch cancel its gradient; set "
      "config.meta.center_over to exits or all, or leave it out"
    )


def model_config(values: Mapping[str, Any] | ConfigDict) -> ConfigDict:
  """All keys of `config.model`: those given, validated, the others at defaults.

  Raises:
    ValueError: naming the key that is unknown or out of range.
  """
  keys = {**_NAME, **_model_keys(values.get("name", "msdnet"))}
  model = {**_default_values(keys), **values}
  _validate(model, keys, "config.model")
  return from_dict(model)


def check_key(key: str) -> None:
  """Raises ValueError unless a config, of whichever model so far, has this key.

  Args:
    key: dotted, such as "model.num_exits".
  """
  _holder(_all_keys(ChainMap(*MODEL_KEYS.values(), *_own_models.values())), key)


def _all_keys(model_keys: Mapping[str, Key]) -> Mapping:
  return {**KEYS, "model": {**_NAME, **model_keys}}


def _holder(node: Any, key: str) -> Any:
  """What holds the last name of a dotted key; ValueError unless it is there."""
  path = "config"
  for name in key.split("."):
    if not isinstance(node, Mapping | ConfigDict):
      raise ValueError(
        f"{path} is a value and has no keys, so {path}.{name} does not exist"
      )
    if name not in node:
      raise ValueError(_unknown_key(f"{path}.{name}", node))
    holder, node, path = node, node[name], f"{path}.{name}"
  return holder


def _validate(values: Any, keys: Mapping, path: str) -> None:
  if not isinstance(values, Mapping | ConfigDict):
    raise ValueError(f"{path} must hold the keys {', '.join(keys)}, got {values!r}")
  for name in values:
    if name not in keys:
      raise ValueError(_unknown_key(f"{path}.{name}", keys))
  for name, key in keys.items():
    full = f"{path}.{name}"
    if name not in values:
      raise ValueError(f"{full} is missing; start from config.defaults()")
    if isinstance(key, Mapping):
      _validate(values[name], key, full)
    elif not key.allowed(values[name]):
      raise ValueError(
        f"{full} must be {key.says}, got {values[name]!r} ({key.doc})"
      )


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
  """A locked ConfigDict from plain values, such as those of a config.json."""

  def tuples(value):
    if isinstance(value, Mapping):
      return {name: tuples(v) for name, v in value.items()}
    return tuple(value) if isinstance(value, list) else value

  return ConfigDict(tuples(values)).lock()


def _unknown_key(path: str, keys) -> str:
  """One line that says a key does not exist and which ones do."""
  parent, _, name = path.rpartition(".")
  close = difflib.get_close_matches(name, keys, n=1)
  hint = f"did you mean {parent}.{close[0]}? " if close else ""
  return f"{path} does not exist; {hint}keys of {parent}: {', '.join(sorted(keys))}"


def load_config(
  name: str, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
  """The ConfigDict that a name stands for, with overrides, validated.

  Args:
    name: "digits", "digits:uniform" or another config of the package, "FILE.py" or
      "FILE.py:ARGUMENT", or the config.json of a run.
    overrides: dotted key -> value, such as {"model.num_exits": 7}.

  Raises:
    ValueError: no such config, an unknown key, or a value out of range.
  """
  return with_overrides(read_config(name), overrides or {})


def read_config(name: str) -> ConfigDict:
  """`load_config` before overrides, as it is.

  Raises:
    ValueError: no such config, or a file that holds none or fails, and where.
  """
  file, argument = named.config_file(str(name))
  if file.suffix == ".json":
    try:
      return from_dict(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError) as error:
      raise ValueError(f"{file} is no config of a run: {error}") from error
  spec = importlib.util.spec_from_file_location("_l2w_jax_config", file)
  assert spec is not None and spec.loader is not None  # it is a file
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses in it look there for themselves
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
  except (Exception, SystemExit) as error:  # it may raise anything
    if isinstance(error, ValueError) and file.resolve().parent == named.CONFIGS:
      raise  # of its argument: the file is ours
    raise ValueError(_failure(file, error)) from error
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"{file}: get_config returns {config!r}, no ConfigDict; start from "
      "l2w_jax.config.defaults()"
    )
  return config


def _failure(file: pathlib.Path, error: BaseException) -> str:
  """FILE, line N: what it raised there; one line."""
  path = os.path.abspath(file)
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == path
  ]
  words = str(error)
  if isinstance(error, SyntaxError):
    lines = [error.lineno] if error.filename == path else lines
    words = error.msg
  # ConfigDict quotes its words, and adds every other key, with its value.
  if isinstance(error, AttributeError | KeyError) and words[:1] in ("'", '"'):
    words = words.strip(words[0])
  words = re.sub(
    "Other fields present: .*?(?=Did you mean|$)", "", words, flags=re.S
  )
  place = f"{file}, line {lines[-1]}" if lines else f"{file}"
  return " ".join(f"{place}: {type(error).__name__}: {words}".split())


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """The config itself with dotted key -> value set, validated.

  Raises:
    ValueError: an unknown key, or a value out of range.
  """
  for key, value in overrides.items():
    holder, name = _holder(config, key), key.split(".")[-1]
    if isinstance(holder[name], ConfigDict) and not isinstance(
      value, (Mapping, ConfigDict)
    ):
      raise ValueError(
        f"config.{key} holds keys of its own; set one of them, such as "
        f"config.{key}.{next(iter(holder[name]))}"
      )
    error = ValueError(
      f"config.{key} must be of the type of {holder[name]!r}, got {value!r}"
    )
    # ConfigDict would make 1.0 of a True.
    if isinstance(value, bool) and not isinstance(holder[name], bool):
      raise error
    try:
      holder[name] = value
    except TypeError as cause:
      raise error from cause
  return validate(config)
