"""The files of a run directory, each with one reader.

config.json, metrics.jsonl, results.json, scores.npz, samples.npz, latency.json.
What cannot be read ends in one ValueError that names the file, what is wrong with
it, and the mode that writes it. Accuracy is a fraction in these files, cost in
multiply-accumulates (MACs), losses in nats.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.run import files

# Keys that may change when a run is resumed; all others shape its result (and the
# devices of sync="local", see `check_same_run`).
FREE_KEYS = (
  "evaluate",
  "log",
  "checkpoint",
  "diagnose",
  "num_devices",
  "data.data_dir",
  "model.remat",
)


def _keys(names: str) -> dict[str, None]:
  return dict.fromkeys(names.split())


# What the inputs must hold: {name: what is inside it, if that is looked at}; a
# list stands for any number of entries of one shape.
RESULTS_SHAPE = _keys(
  "method dataset num_classes image_shape class_names mean std params"
  " params_to_exit macs confidence step versions complete"
) | {
  "samples": _keys("train calibration test"),
  "seconds": _keys("train"),
  "device": _keys("platform kind count"),
  "anytime": [_keys("exit macs accuracy calibration_accuracy")],
  "budgeted": [_keys("q thresholds calibration_accuracy accuracy macs exits")],
  "chosen": _keys(
    "target thresholds calibration_accuracy calibration_macs accuracy macs exits"
    " exit_accuracy"
  )
  | {"classes": [_keys("class accuracy macs left")]},
  "temperatures": [_keys("exit temperature ece ece_scaled")],
}
LATENCY_SHAPE = {
  "step": None,
  "device": _keys("platform kind"),
  "rows": [
    _keys(
      "kind point batch calls macs p50_ms p95_ms images_per_second"
      " speedup speedup_by_macs"
    )
  ],
}
METRIC_SHAPES = {
  "train": _keys("step epoch"),
  "evaluate": _keys("step epoch accuracy"),
  "weights": _keys("step epoch loss_bins mean_weight"),
  "diagnose": _keys(
    "step epoch signal_to_noise_by_exit estimators easy_weight"
    " hard_weight confidence_bins weight_by_confidence"
  ),
}
PER_SAMPLE = ["images", "labels", "predictions", "exits", "confidence"]


def write_config(
  workdir: pathlib.Path, config: ConfigDict, num_devices: int | None = None
) -> None:
  """config.json: every key of the run.

  Args:
    workdir, config: of the run.
    num_devices: that train it, if anything does. With `sync="local"` they shape
      the result, and so stand in the place of a config.num_devices of 0.
  """
  values = config.to_dict()
  if config.sync == "local" and num_devices:
    values["num_devices"] = num_devices
  files.write(
    workdir / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n"
  )


def read_config(workdir: pathlib.Path) -> ConfigDict:
  """The config a run directory was made with, validated.

  Raises:
    ValueError: the directory is missing, holds no run, or a broken config.
  """
  if not workdir.is_dir():
    raise ValueError(
      f"workdir {workdir} does not exist; train one first with --mode=train"
    )
  if not (workdir / "config.json").is_file():
    raise ValueError(
      f"workdir {workdir} holds no run (no config.json); train "
      "one first with --mode=train"
    )
  return config_lib.validate(config_lib.from_dict(config_values(workdir)))


def config_values(workdir: pathlib.Path) -> dict[str, Any]:
  """What config.json holds, as it is.

  Raises:
    ValueError: it is missing or broken.
  """
  return _read(workdir, "config.json", "train", _parse_config)


def check_same_run(
  workdir: pathlib.Path, config: ConfigDict, num_devices: int | None = None
) -> None:
  """Raises ValueError if the run directory is of another run.

  Args:
    workdir: may hold no run yet.
    config: to go on with.
    num_devices: that are to train it; None where nothing is trained.
  """
  if not (workdir / "config.json").exists():
    return
  made_with = read_config(workdir)
  changed = config_lib.differences(config, made_with, FREE_KEYS)
  if changed:
    raise ValueError(
      f"workdir {workdir} was made with another config: config.{changed[0]}; "
      "use another workdir, or the same config to resume"
    )
  trained_on = made_with.num_devices  # 0: by nothing yet
  if config.sync == "local" and num_devices and trained_on not in (0, num_devices):
    raise ValueError(
      f"workdir {workdir} was trained on {trained_on} device(s), which shapes the "
      f"result where config.sync is local, and now there are {num_devices}; set "
      f"config.num_devices={trained_on} to resume, or use another workdir"
    )


def read_results(workdir: pathlib.Path) -> dict[str, Any]:
  """What results.json holds.

  Raises:
    ValueError: it is missing, broken or of an earlier version.
  """
  return _read(workdir, "results.json", "evaluate", _parse_results)


def read_metrics(workdir: pathlib.Path) -> dict[str, list[dict]]:
  """The lines of metrics.jsonl by kind and step; of a step, the last one.

  Raises:
    ValueError: it is missing, or has a line that is no metric.
  """
  return _read(workdir, "metrics.jsonl", "train", _parse_metrics)


def read_scores(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """What scores.npz holds.

  Raises:
    ValueError: it is missing or broken.
  """
  return _read(workdir, "scores.npz", "evaluate", _parse_scores)


def read_samples(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """What samples.npz holds.

  Raises:
    ValueError: it is missing or broken.
  """
  return _read(workdir, "samples.npz", "evaluate", _parse_samples)


def read_latency(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What latency.json holds; None if the run was not timed.

  Raises:
    ValueError: it is broken.
  """
  if not (workdir / "latency.json").exists():
    return None
  return _read(workdir, "latency.json", "latency", _parse_latency)


def is_finished(workdir: pathlib.Path, name: str) -> bool:
  """Whether results of the finished run and the file `name` are there."""
  try:
    return bool(read_results(workdir)["complete"]) and (workdir / name).exists()
  except ValueError:
    return False


def check_same_images(
  workdir: pathlib.Path, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
  """Raises ValueError if a run was evaluated on other classes or images.

  Its weights alone do not tell: they take images of another size.
  """
  try:
    results = read_results(workdir)
  except ValueError:
    return  # not evaluated yet
  made_for = (results["num_classes"], tuple(results["image_shape"]))
  if made_for != (num_classes, tuple(image_shape)):
    raise ValueError(
      f"workdir {workdir} was trained for {made_for[0]} classes and images of "
      f"{'×'.join(map(str, made_for[1]))}, but its data now has {num_classes} "
      f"and {'×'.join(map(str, image_shape))}; give it the data it was "
      "trained on, or train into another workdir"
    )


def _read(
  workdir: pathlib.Path, name: str, mode: str, parse: Callable[[bytes], Any]
) -> Any:
  path = workdir / name
  config = "--config=CONFIG " if mode == "train" else ""
  advice = (
    f"run `python -m l2w_jax.main {config}--workdir={workdir}"
    f" --mode={mode}` first, which writes it"
  )
  try:
    return parse(path.read_bytes())
  except FileNotFoundError:
    raise ValueError(f"{path} is missing; {advice}") from None
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
  ) as error:
    raise ValueError(f"cannot use {path}: {error}; {advice}") from error


def _require(shape: Any, found: Any, where: str) -> None:
  if isinstance(shape, list):
    for entry in found:
      _require(shape[0], entry, f"an entry of {where}")
  elif shape is not None:
    for name, inside in shape.items():
      if name not in found:
        raise ValueError(f"{where} lacks {name!r}")
      _require(inside, found[name], f"its {name!r}")


def _parse_config(data: bytes) -> dict[str, Any]:
  values = json.loads(data)
  if not isinstance(values, dict):
    raise ValueError("it holds no keys")
  return values


def _parse_results(data: bytes) -> dict:
  results = json.loads(data)
  _require(RESULTS_SHAPE, results, "it")
  num_exits = len(results["macs"])
  lengths = {
    len(results[name]) for name in ("anytime", "params_to_exit", "temperatures")
  }
  for entry in [*results["budgeted"], results["chosen"]]:
    lengths |= {len(entry["exits"]), len(entry["thresholds"])}
  if lengths != {num_exits} or not results["budgeted"]:
    raise ValueError(f"its curves are not all of its {num_exits} exits")
  return results


def _parse_latency(data: bytes) -> dict:
  latency = json.loads(data)
  _require(LATENCY_SHAPE, latency, "it")
  return latency


def _parse_metrics(data: bytes) -> dict[str, list[dict]]:
  """Groups the lines by kind; a step repeated after a resume counts once."""
  lines = {kind: {} for kind in METRIC_SHAPES}
  for number, line in enumerate(data.decode().splitlines(), 1):
    try:
      entry = json.loads(line)
      if entry["kind"] in METRIC_SHAPES:
        _require(METRIC_SHAPES[entry["kind"]], entry, "it")
        lines[entry["kind"]][entry["step"]] = entry
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"line {number} is not a metric ({error}) and may be deleted, or"
      ) from error
  return {
    kind: [steps[step] for step in sorted(steps)] for kind, steps in lines.items()
  }


def _parse_samples(data: bytes) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(data)) as arrays:
    samples = dict(arrays)
  _require(dict.fromkeys([*PER_SAMPLE, "q", "class_names"]), samples, "it")
  if len({len(samples[name]) for name in PER_SAMPLE}) != 1:
    raise ValueError(f"its {', '.join(PER_SAMPLE)} differ in length")
  return samples


def _parse_scores(data: bytes) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(data)) as arrays:
    scores = dict(arrays)
  _require(_keys("confidence correct"), scores, "it")
  return scores
