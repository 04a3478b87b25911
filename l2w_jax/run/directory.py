"""The files of a run directory, each with one reader.

config.json, metrics.jsonl, results.json, scores.npz, samples.npz, latency.json.
What cannot be used ends in one ValueError that names the file, what is wrong with
it, and what writes it again, what the system does not let us read in an OSError; of
metrics.jsonl, which nothing writes again, damaged lines are left out with a
warning. Accuracy is a fraction in these files, cost in multiply-accumulates (MACs),
losses in nats.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax import named
from l2w_jax.run import files, os_errors, schema
from l2w_jax.run.schema import (
  COUNT,
  FLAG,
  KEYS,
  NUMBER,
  POSITIVE,
  TEXT,
  Array,
  Every,
  Is,
  Many,
  Maybe,
  Size,
)

REPORT = "report/index.html"

# What the files must hold, see `schema`; each may hold more.
_PER_EXIT = Many(NUMBER, "exits")
# An exit nobody is to leave at has no threshold or an infinite one.
_THRESHOLDS = Many(
  Maybe(
    Is(
      "a number, or inf in quotes",
      lambda x: NUMBER.test(x) or x in ("inf", "-inf", "nan"),
    )
  ),
  "exits",
)
RESULTS_SHAPE = {
  **dict.fromkeys(
    ("method", "dataset", "confidence", "calibration", "checkpoint", "digest"), TEXT
  ),
  **dict.fromkeys(("macs", "params_to_exit"), Many(POSITIVE, "exits")),
  "num_classes": Size("classes"),
  "class_names": Many(TEXT, "classes"),
  "image_shape": Is(
    "height, width and channels",
    lambda x: isinstance(x, list) and len(x) == 3 and all(map(COUNT.test, x)),
  ),
  "mean": Many(NUMBER, "channels"),
  "std": Many(POSITIVE, "channels"),
  "params": COUNT,
  "step": COUNT,
  "complete": FLAG,
  "versions": KEYS,
  "config": KEYS,
  "samples": dict.fromkeys(("train", "calibration", "test"), COUNT),
  "seconds": {"train": NUMBER},
  "device": {"platform": TEXT, "kind": TEXT, "count": COUNT},
  "anytime": Many(
    dict.fromkeys(("exit", "macs", "accuracy", "calibration_accuracy"), NUMBER),
    "exits",
  ),
  "budgeted": Many(
    dict.fromkeys(
      ("q?", "patience?", "top5_accuracy?", "calibration_accuracy")
      + ("calibration_macs", "accuracy", "macs"),
      NUMBER,
    )
    | {"thresholds": _THRESHOLDS, "exits": _PER_EXIT},
    "budgets",
  ),
  "chosen": {
    "target": TEXT,
    "note": TEXT,
    "top5_accuracy?": NUMBER,
    **dict.fromkeys(
      ("calibration_accuracy", "calibration_macs", "accuracy", "macs"), NUMBER
    ),
    "thresholds": _THRESHOLDS,
    "exits": _PER_EXIT,
    "exit_accuracy": Many(Maybe(NUMBER), "exits"),
    "classes": Many(
      {
        "class": TEXT,
        "accuracy": Maybe(NUMBER),
        "macs": Maybe(NUMBER),
        "left": Many(COUNT, "exits"),
      },
      "classes",
    ),
    "confused": Many({"class": TEXT, "as": TEXT, "images": COUNT}, ""),
  },
  "temperatures": Many(
    dict.fromkeys(("exit", "temperature", "ece", "ece_scaled"), NUMBER)
    | dict.fromkeys(("ece_calibrated", "ece_calibrated_high"), Maybe(NUMBER))
    | {
      "samples": COUNT,
      "reliability": Many(
        dict.fromkeys(("confidence", "accuracy", "samples"), NUMBER), ""
      ),
    },
    "exits",
  ),
}
RESULTS_SHAPE["weights?"] = {
  "step?": COUNT,  # early versions did not write it
  "kind": TEXT,
  "exit_share": NUMBER,
  "mean": _PER_EXIT,
  "std": _PER_EXIT,
  "rank_correlation": Many(Maybe(NUMBER), "exits"),
}
LATENCY_SHAPE = {
  "step": COUNT,
  **dict.fromkeys(("checkpoint", "target", "confidence"), TEXT),
  "device": {"platform": TEXT, "kind": TEXT},
  "rows": Many(
    {
      **dict.fromkeys(("kind", "point", "decides?"), TEXT),
      **dict.fromkeys(("batch", "calls", "rounds", "call?"), COUNT),
      "p95_ms": Maybe(NUMBER),
    }
    | dict.fromkeys(
      (
        *("macs", "ms", "ms_low", "ms_high", "images_per_second"),
        *("speedup", "speedup_low", "speedup_high", "speedup_by_macs"),
      ),
      POSITIVE,
    ),
    "rows",
  ),
}
_LINE = {"step": COUNT, "epoch": NUMBER}
_BY_BIN = Many(Many(Maybe(NUMBER), "bins"), "exits")
METRIC_SHAPES = {
  "train": _LINE | {"train_loss?": Maybe(NUMBER), "meta_loss?": Maybe(NUMBER)},
  "evaluate": _LINE | {"accuracy": _PER_EXIT},
  "weights": _LINE
  | {"loss_bins": Many(NUMBER, "bins+1"), "mean_weight": _BY_BIN}
  | {"std_weight?": _BY_BIN, "count?": Many(Many(COUNT, "bins"), "exits")},
  "diagnose": _LINE
  | {
    **dict.fromkeys(("meta_loss?", "variance?", "signal_to_noise?"), Maybe(NUMBER)),
    "signal_to_noise_by_exit": Many(Maybe(NUMBER), "exits"),
    "estimators": Every(
      dict.fromkeys(
        ("cosine", "relative_error", "ms", "flops", "temporary_bytes"),
        Maybe(NUMBER),
      )
    ),
    "easy_weight": Many(Maybe(NUMBER), "exits"),
    "hard_weight": Many(Maybe(NUMBER), "exits"),
    "confidence_bins": Many(NUMBER, "bins+1"),
    "weight_by_confidence": _BY_BIN,
  },
}
_KINDS = "one of " + ", ".join(METRIC_SHAPES)
SAMPLES_SHAPE = {
  "checkpoint?": Array("U", ""),  # early versions did not write it
  "class_names": Array("U", "classes"),
  "images": Array("u", "samples height width channels"),
  "labels": Array("iu", "samples", below="classes"),
  "predictions": Array("iu", "samples", below="classes"),
  "exits": Array("iu", "samples"),
  "confidence": Array("f", "samples"),
  "q": Array("f", ""),
}
SCORES_SHAPE = {"about": Array("U", "")} | {
  f"{split}_{name}": shape
  for split in ("calibration", "test")
  for name, shape in {
    "logits": Array("f", f"{split}_kept exits classes"),
    "label": Array("iu", f"{split}_images", below="classes"),
    "prediction": Array("iu", f"{split}_images exits", below="classes"),
    "confidence": Array("f", f"{split}_images exits"),
    "top5": Array("b", f"{split}_images exits"),
  }.items()
}
# What results.json says whatever the target, which scores.npz keeps.
ABOUT = (
  *(
    "method",
    "dataset",
    "num_classes",
    "image_shape",
    "class_names",
    "mean",
    "std",
  ),
  *("samples", "params", "params_to_exit", "macs", "confidence", "calibration"),
  *("temperatures", "step", "device", "versions", "complete", "checkpoint"),
)


def write_config(
  workdir: files.Path, config: ConfigDict, num_devices: int | None = None
) -> None:
  """config.json: every key of the run, `as_trained`."""
  values = as_trained(config, num_devices)
  files.write(
    workdir / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n"
  )


def as_trained(config: ConfigDict, num_devices: int | None) -> dict[str, Any]:
  """Every key, and the number of devices where it shapes the result.

  Args:
    config: of the run.
    num_devices: that train it, if anything does. With `sync="local"` they stand
      in the place of a config.num_devices of 0.
  """
  values = config.to_dict()
  if config.sync == "local" and num_devices:
    values["num_devices"] = num_devices
  return values


def read_config(workdir: files.Path) -> ConfigDict:
  """The config a run directory was made with, validated.

  Raises:
    ValueError: the directory is missing, holds no run, or a broken config.
  """
  if not workdir.is_dir():
    raise ValueError(
      f"workdir {workdir} does not exist; train one first with --mode=train"
    )
  if not (workdir / "config.json").exists():
    raise ValueError(
      f"workdir {workdir} holds no run (no config.json); train "
      "one first with --mode=train"
    )
  return _read(
    workdir,
    "config.json",
    lambda data: config_lib.validate(config_lib.from_dict(_parse_config(data))),
  )


def config_of_checkpoints(workdir: files.Path) -> dict[str, Any] | None:
  """The config that the latest checkpoint carries, read without JAX and Orbax.

  None if there is no sound one, or all are of early versions, which carry none.
  """
  folder = workdir / "checkpoints"
  steps = (
    [x for x in folder.iterdir() if x.name.isdecimal()] if folder.is_dir() else []
  )
  for step in sorted(steps, key=lambda x: int(x.name), reverse=True):
    try:
      info = _parse_config((step / "info" / "metadata").read_bytes())
      if info["digest"] == digest(info):
        return info["identity"]["config"]
    except (FileNotFoundError, KeyError, ValueError, RecursionError):
      continue
  return None


def config_values(workdir: files.Path) -> dict[str, Any]:
  """What config.json holds, as it is.

  Raises:
    ValueError: it is missing or broken.
  """
  return _read(workdir, "config.json", _parse_config)


def digest(values: dict[str, Any]) -> str:
  """SHA-256 of what JSON makes of `values`, less an entry "digest" of its own."""
  rest = {name: value for name, value in values.items() if name != "digest"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_results(workdir: files.Path, results: dict[str, Any]) -> None:
  """results.json, with a digest: a threshold edited by hand would go unseen."""
  results = results | {"digest": digest(results)}
  files.write(workdir / "results.json", json.dumps(results, indent=2) + "\n")


def read_results(workdir: files.Path) -> dict[str, Any]:
  """What results.json holds.

  Raises:
    ValueError: it is missing, broken, edited or of an earlier version.
  """
  return _read(workdir, "results.json", parse_results)


def is_reported(workdir: files.Path, results: dict[str, Any]) -> bool:
  """Whether the page of a run is there and of `results`, whose digest it holds."""
  try:
    page = (workdir / REPORT).read_bytes()
  except OSError:
    return False
  return f'<meta name="results" content="{results["digest"]}">'.encode() in page


def read_metrics(
  workdir: files.Path, num_exits: int | None = None
) -> dict[str, list[dict]]:
  """The lines of metrics.jsonl by kind and step; of a step, the last one.

  Nothing makes a lost or damaged line again, so what is left is used, and a
  warning says what is not.

  Args:
    workdir: of the run.
    num_exits: of its network, which each line must be of; None if not known.
  """
  by_kind = {kind: {} for kind in METRIC_SHAPES}
  for _, line in metric_lines(workdir / "metrics.jsonl", num_exits):
    by_kind[line["kind"]][line["step"]] = line
  return {
    kind: [steps[step] for step in sorted(steps)] for kind, steps in by_kind.items()
  }


def metric_lines(
  path: files.Path, num_exits: int | None = None
) -> list[tuple[str, dict]]:
  """(text, what it says) of every sound line of metrics.jsonl, as they stand."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    logging.warning(
      "%s is missing, so there are no curves of training: it is written while a "
      "run trains, and nothing makes it again but a copy",
      path,
    )
    return []
  lines, damaged, reason = [], [], ""
  for number, line in enumerate(data.split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      text = line.decode()
      lines.append((text, _parse_metric(text, num_exits)))
    except (ValueError, RecursionError) as error:
      damaged.append(number)
      reason = reason or _one_line(error)
  if damaged:
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    logging.warning(
      "%s: line %s%s left out, as damaged (%s)",
      path,
      ", ".join(map(str, damaged[:3])),
      more,
      reason,
    )
  elif not lines:
    logging.warning("%s is empty, so there are no curves of training", path)
  return lines


def read_scores(
  workdir: files.Path, results: dict[str, Any] | None = None
) -> dict[str, Any]:
  """What scores.npz holds; "about" as a dict.

  Args:
    workdir: of the run.
    results: what results.json holds, which it must be of; None if not known.

  Raises:
    ValueError: it is missing or broken, or of another network or checkpoint.
  """
  return _read(
    workdir, "scores.npz", functools.partial(_parse_scores, results=results)
  )


def read_samples(
  workdir: files.Path, results: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
  """What samples.npz holds; see `read_scores`."""
  return _read(
    workdir, "samples.npz", functools.partial(_parse_samples, results=results)
  )


def read_latency(workdir: files.Path) -> dict[str, Any] | None:
  """What latency.json holds; None if the run was not timed.

  Raises:
    ValueError: it is broken.
  """
  if not (workdir / "latency.json").exists():
    return None
  return _read(workdir, "latency.json", _parse_latency)


def read_manifest(folder: files.Path) -> dict[str, Any] | None:
  """What manifest.json of an export holds, {} if broken; None if there is none."""
  path = folder / "manifest.json"
  if not path.exists():
    return None
  try:
    return _parse_config(path.read_bytes())
  except (ValueError, RecursionError):
    return {}


def _read(workdir: files.Path, name: str, parse: Callable[[bytes], Any]) -> Any:
  path, command = workdir / name, f"python -m l2w_jax --workdir={workdir}"
  if name == "config.json":
    advice = (
      "delete it: it is restored from the checkpoints, or written again by "
      f"`{command} --config=CONFIG --mode=train`"
    )
  else:
    mode = "latency" if name == "latency.json" else "evaluate"
    advice = f"run `{command} --mode={mode}` first, which writes it"
  try:
    with os_errors.naming(path):
      data = path.read_bytes()
    return parse(data)
  except FileNotFoundError:
    raise ValueError(f"{path} is missing; {advice}") from None
  except (OSError, named.NotHere):  # the file may be sound, or is
    raise
  except Exception as error:  # damaged files raise anything
    raise ValueError(f"cannot use {path}: {_one_line(error)}; {advice}") from error


def _one_line(error: Exception) -> str:
  if isinstance(error, RecursionError):
    return "it is nested too deeply"
  return " ".join(str(error).split()) or type(error).__name__


def _parse_config(data: bytes) -> dict[str, Any]:
  values = json.loads(data)
  schema.check(KEYS, values)
  return values


def parse_results(data: bytes) -> dict[str, Any]:
  """What the bytes of a results.json say; ValueError if it is broken or edited."""
  results = json.loads(data)
  schema.check(RESULTS_SHAPE, results)
  if results["image_shape"][-1] != len(results["mean"]):
    raise ValueError("its 'mean' is not of the channels of its 'image_shape'")
  if results["digest"] != digest(results):
    raise ValueError("it is not what was written (its digest differs)")
  return results


def _parse_latency(data: bytes) -> dict[str, Any]:
  latency = json.loads(data)
  schema.check(LATENCY_SHAPE, latency)
  return latency


def _parse_metric(line: str, num_exits: int | None) -> dict[str, Any]:
  entry = json.loads(line)
  schema.check({"kind": Is(_KINDS, lambda x: x in tuple(METRIC_SHAPES))}, entry)
  sizes = {"exits": num_exits} if num_exits else {}
  schema.check(METRIC_SHAPES[entry["kind"]], entry, sizes)
  return entry


def _parse_scores(data: bytes, results: dict[str, Any] | None) -> dict[str, Any]:
  num_exits = len(results["macs"]) if results else None
  found = _parse_arrays(SCORES_SHAPE, data, num_exits)
  about = json.loads(str(found["about"]))
  schema.check({name: RESULTS_SHAPE[name] for name in ABOUT}, about)
  _check_checkpoint(about["checkpoint"], results)
  return found | {"about": about}


def _parse_samples(
  data: bytes, results: dict[str, Any] | None
) -> dict[str, np.ndarray]:
  found = _parse_arrays(SAMPLES_SHAPE, data)
  if "checkpoint" in found:
    _check_checkpoint(str(found["checkpoint"]), results)
  return found


def _check_checkpoint(found: str, results: dict[str, Any] | None) -> None:
  if results is not None and found != results["checkpoint"]:
    raise ValueError("it is of another checkpoint than results.json")


def _parse_arrays(
  shape: dict[str, Any], data: bytes, num_exits: int | None = None
) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(io.BytesIO(data)):
    pass  # NumPy takes other files, too
  with np.load(io.BytesIO(data)) as arrays:
    found = dict(arrays)
  schema.check(shape, found, {"exits": num_exits} if num_exits else {})
  return found
