"""Which run a directory holds: the config and the data of its checkpoints.

    identity = {"config": every key, "data": `fingerprint` of the images,
                "jax": what its random numbers follow from}

Every checkpoint carries it, under a digest. Whoever goes on with a run is compared
with it and refused in one line that says what differs, before anything compiles.
Images may move: what they are counts, not where they lie. Weights from elsewhere
have "data": None, and checkpoints of early versions no "jax" or no identity at all;
then that much is not compared, and a warning says so of the data.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.data import sources
from l2w_jax.run import directory, files, parallel
from l2w_jax.training import checkpoint

# Keys that may change when a run is resumed; all others shape its result (and so
# do the devices of sync="local", see `check_config`).
FREE_KEYS = (
  "evaluate",
  "log",
  "checkpoint",
  "diagnose",
  "num_devices",
  "data.data_dir",
  "model.remat",
)

# Keys of config.evaluate that results.json does not follow from.
NOT_IN_RESULTS = ("batch", "every")

# Settings of JAX that decide what a seed stands for.
RANDOM = (
  "jax_default_prng_impl",
  "jax_threefry_partitionable",
  "jax_random_seed_offset",
)

Identity = dict[str, Any]


def fingerprint(dataset: sources.Dataset) -> dict[str, Any]:
  """What tells a data set from another: classes, counts, labels and pixels.

  It is that of the splits as they are used: after calibration images are held
  out, and with the labels that noise has changed. For images that stay on disk
  the digests of their pixels are hashed, which reading through them has found.
  """
  return {
    "class_names": list(dataset.class_names),
    "image_shape": list(dataset.image_shape),
    "splits": {
      name: {
        "images": len(split.labels),
        "pixels": _sha256(getattr(split.images, "digests", split.images)),
        "labels": _sha256(split.labels),
      }
      for name, split in dataset.splits.items()
    },
  }


def _sha256(array: Any) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def read(workdir: files.Path) -> Identity | None:
  """The identity of a run; None if there is none yet.

  That of the latest checkpoint, else config.json alone, which must be sound.
  """
  there = (workdir / "config.json").exists()
  values = directory.config_values(workdir) if there else None
  with checkpoint.Checkpoints(workdir) as checkpoints:
    info = checkpoints.info()
  if info and "identity" in info:
    return info["identity"]
  if info:
    logging.warning(
      "checkpoints in %s do not say what they were trained on (an early version "
      "wrote them), so the data is not compared",
      workdir,
    )
  return {"config": values} if there else None


def read_config(workdir: files.Path) -> ConfigDict:
  """The config of a run; a lost config.json is restored from its checkpoint.

  Raises:
    ValueError: there is no run, or config.json is broken or of another run.
  """
  path, made_with = workdir / "config.json", read(workdir)
  if made_with and not path.exists():
    directory.write_config(workdir, config_lib.from_dict(made_with["config"]))
    logging.warning("%s was missing; restored from the checkpoint", path)
  config = directory.read_config(workdir)
  changed = _changed(config, made_with)
  if changed:
    raise ValueError(
      f"{path} is not the config of the checkpoints beside it: config.{changed[0]} "
      f"(here: {path.name}); delete it, and it is restored from them"
    )
  return config


def check_config(
  workdir: files.Path,
  config: ConfigDict,
  num_devices: int | None = None,
  free: tuple[str, ...] = (),
) -> None:
  """Raises ValueError if the run directory is of another config.

  Args:
    workdir: may hold no run yet.
    config: to go on with.
    num_devices: that are to train it; None where nothing is trained.
    free: keys that may differ, beside `FREE_KEYS`.
  """
  _check_config(workdir, read(workdir), config, num_devices, free)


def open_data(
  workdir: files.Path, config: ConfigDict, num_devices: int | None = None
) -> tuple[sources.Dataset, Identity]:
  """(images of a run, its identity), config and images compared with the run's.

  Args:
    workdir, config, num_devices: see `check_config`.

  Raises:
    ValueError: one line that says what differs.
  """
  made_with = parallel.from_writer(read(workdir) if parallel.is_writer() else None)
  _check_config(workdir, made_with, config, num_devices)
  settings = _random_settings()
  if made_with and num_devices is not None:
    _check_random(workdir, made_with.get("jax", settings), settings)
  dataset = sources.load(config.data)
  config_lib.check_held_out(config, len(dataset.calibration.labels) > 0)
  data = fingerprint(dataset)
  of_first = parallel.from_writer(data)
  if data != of_first:
    raise ValueError(
      f"process {jax.process_index()} sees other data than process 0: "
      f"{_differences(data, of_first)}; give all processes the same images"
    )
  if made_with and made_with.get("data") not in (None, data):
    raise ValueError(
      f"workdir {workdir} was trained on other data than {config.data.source} is "
      f"now: {_differences(data, made_with['data'])}; give it the data it was "
      "trained on (config.data.source may name another place), or use another "
      "workdir"
    )
  values = directory.as_trained(config, num_devices)
  return dataset, {"config": values, "data": data, "jax": settings}


def draws_alike(workdir: files.Path) -> bool:
  """Whether the seed of a run stands for the same random numbers here as there."""
  settings = _random_settings()
  return (read(workdir) or {}).get("jax", settings) == settings


def _random_settings() -> dict[str, Any]:
  return {name: getattr(jax.config, name, None) for name in RANDOM}


def check_not_lost(workdir: files.Path) -> None:
  """Raises ValueError if a run has results, which are of a checkpoint, and none.

  A run that lost its checkpoints before it was evaluated is not told from one
  that was killed before its first: lines of metrics.jsonl may come before that.
  """
  if (workdir / "results.json").exists():
    with checkpoint.Checkpoints(workdir) as checkpoints:
      if not checkpoints.steps():
        raise ValueError(
          f"workdir {workdir} holds results.json but no checkpoint; bring back "
          f"{workdir / 'checkpoints'}, or use another workdir to start over"
        )


def remember(workdir: files.Path, config: ConfigDict) -> dict[str, Any]:
  """Puts what a run is evaluated with, and on, into its config.json; all keys."""
  values = (read(workdir) or {"config": config.to_dict()})["config"]
  values |= {"evaluate": config.evaluate.to_dict()}
  values["data"] |= {name: config.data[name] for name in ("source", "data_dir")}
  directory.write_config(workdir, config_lib.from_dict(values))
  return values


def is_evaluated(workdir: files.Path, config: ConfigDict, name: str) -> bool:
  """Whether results of the finished run, and the file `name`, are there.

  A page of other results, as `directory.REPORT` may be, counts as missing.
  """
  try:
    results = directory.read_results(workdir)
  except ValueError:
    return False
  with checkpoint.Checkpoints(workdir) as checkpoints:
    info = checkpoints.info() or {}
  return (
    bool(results["complete"])
    and (workdir / name).exists()
    and (name != directory.REPORT or directory.is_reported(workdir, results))
    and results["checkpoint"] == info.get("checkpoint")
    and not _chosen_otherwise(config, results)
  )


def check_choice(
  workdir: files.Path, config: ConfigDict | None, free: tuple[str, ...] = ()
) -> None:
  """Raises ValueError if a run was evaluated with another config.evaluate.

  Args:
    workdir: of the run.
    config: its config; None for that of its config.json.
    free: keys of it that may differ.
  """
  results = directory.read_results(workdir)
  changed = _chosen_otherwise(
    config or directory.read_config(workdir), results, free
  )
  if changed:
    of, advice = (
      ("config", "with it first, or leave out --config")
      if config
      else ("config than that of config.json", "again")
    )
    raise ValueError(
      f"{workdir / 'results.json'} was made with another {of}: "
      f"config.{changed[0]}; run --mode=evaluate {advice}"
    )


def _chosen_otherwise(
  config: ConfigDict, results: dict[str, Any], free: tuple[str, ...] = ()
) -> list[str]:
  made_with = config_lib.from_dict({"evaluate": results["config"].get("evaluate")})
  return config_lib.differences(
    ConfigDict({"evaluate": config.evaluate}),
    made_with,
    tuple(f"evaluate.{name}" for name in (*NOT_IN_RESULTS, *free)),
  )


def _check_config(workdir, made_with, config, num_devices, more_free=()) -> None:
  if made_with is None:
    return
  changed = _changed(config, made_with, more_free)
  if changed:
    advice = "use another workdir, or the same config to resume"
    if parallel.is_writer() and not (workdir / "results.json").exists():
      with checkpoint.Checkpoints(workdir) as checkpoints:
        if not checkpoints.steps():
          advice += ", or delete this one, which has no checkpoint"
    raise ValueError(
      f"workdir {workdir} was made with another config: config.{changed[0]}; "
      + advice
    )
  trained_on = made_with["config"].get("num_devices", 0)  # 0: by nothing yet
  if config.sync == "local" and num_devices and trained_on not in (0, num_devices):
    raise ValueError(
      f"workdir {workdir} was trained on {trained_on} device(s), which shapes the "
      f"result where config.sync is local, and now there are {num_devices}; set "
      f"config.num_devices={trained_on} to resume, or use another workdir"
    )


def _check_random(workdir, trained_with, settings) -> None:
  """Raises ValueError where the same seed would draw other numbers than before."""
  other = [name for name in trained_with if settings[name] != trained_with[name]]
  if other:
    then, now = (
      ", ".join(f"{name.upper()}={_in_shell(x[name])}" for name in other)
      for x in (trained_with, settings)
    )
    raise ValueError(
      f"workdir {workdir} was trained with {then}, and here it is {now}: its seed "
      "would draw other numbers; set what it was trained with to resume, or use "
      "another workdir"
    )


def _in_shell(value: Any) -> Any:
  return int(value) if isinstance(value, bool) else value


def _changed(
  config: ConfigDict, made_with: Identity | None, more_free: tuple[str, ...] = ()
) -> list[str]:
  if made_with is None:
    return []
  # Where a fingerprint tells the images, their place need not.
  free = (*FREE_KEYS, "data.source") if "data" in made_with else FREE_KEYS
  return config_lib.differences(
    config, config_lib.from_dict(made_with["config"]), (*free, *more_free)
  )


def _differences(data: dict[str, Any], other: dict[str, Any]) -> str:
  """In what two fingerprints differ, `data` being that of now."""
  found = _renamed(data["class_names"], other["class_names"])
  if data["image_shape"] != other["image_shape"]:
    now, then = ("×".join(map(str, x["image_shape"])) for x in (data, other))
    found.append(f"images are {now}, were {then}")
  for name, split in data["splits"].items():
    was = other["splits"][name]
    if split["images"] != was["images"]:
      found.append(f"{name} has {split['images']} images, was {was['images']}")
    else:
      found += [
        f"{what} of {name} differ"
        for what in ("pixels", "labels")
        if split[what] != was[what]
      ][:1]
  return ", ".join(found)


def _renamed(now: list[str], then: list[str]) -> list[str]:
  new = [repr(name) for name in now if name not in then]
  gone = [repr(name) for name in then if name not in now]
  if len(new) == len(gone):
    renamed = [f"class {a} is now {b}" for a, b in zip(gone, new, strict=True)]
    return renamed or ([] if now == then else ["classes are in another order"])
  changes = [f"new: {', '.join(new[:3])}"] if new else []
  changes += [f"gone: {', '.join(gone[:3])}"] if gone else []
  return [f"there are {len(now)} classes, were {len(then)} ({'; '.join(changes)})"]
