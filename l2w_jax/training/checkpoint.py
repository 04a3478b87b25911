"""Checkpoints (Orbax) and the other files of a run directory.

Every write is atomic: Orbax commits a step by renaming it, other files are
written beside and renamed. A checkpoint carries a digest of every array, because
a flipped bit restores as a wrong number without an error. A damaged step is
stepped over, with a warning, in favour of the one before; one that the system does
not let us read is an OSError, as it may be sound.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax.models.backbone import Backbone
from l2w_jax.run import directory, files, os_errors, parallel
from l2w_jax.training.state import TrainState, abstract_state


def digests(state: PyTree) -> dict[str, int]:
  """CRC-32 of every array of a state, by its path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).tobytes())
    for path, leaf in leaves
  }


def shapes(state: PyTree) -> dict[str, str]:
  """Such as "float32[3,16]" of every array of a state or template, by its path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path): f"{x.dtype}[{','.join(map(str, x.shape))}]"
    for path, x in leaves
  }


class OtherArraysError(ValueError):
  """A checkpoint is sound, and of arrays other than those that are wanted."""


def not_finite(state: PyTree) -> str:
  """Path of the first array that holds NaN or infinity; "" if none does."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return next(
    (
      jax.tree_util.keystr(path)
      for path, leaf in leaves
      if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all()
    ),
    "",
  )


class Checkpoints:
  """The checkpoints of one run directory; a context manager.

  Args:
    workdir: the run directory; checkpoints go into its `checkpoints` folder.
    keep: how many of the latest to keep; None is for reading only.
  """

  def __init__(self, workdir: files.Path, keep: int | None = None):
    # Orbax takes absolute paths; of gs:// `absolute` would make a local one.
    absolute = workdir.absolute() if files.is_local(workdir) else workdir
    self._folder = absolute / "checkpoints"
    self._manager: Any = None
    if not parallel.is_writer():
      return
    alone = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
      # Every process has the whole state; Orbax need not know of the others.
      alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="writer"
      )
      if keep is not None:
        files.make_folder(self._folder)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        multiprocessing_options=alone,
        create=keep is not None and jax.process_count() == 1,
      ),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused_error) -> None:
    if self._manager is not None:
      with os_errors.naming(self._folder):
        self._manager.close()

  def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
    """Commits a step in the background.

    Steps at or after it are deleted: they were damaged, or the run would not
    have gone back behind them, and Orbax would save nothing before the latest.
    """
    if self._manager is None:
      return
    # A copy: the caller's next step may reuse the memory while this is written.
    state = jax.tree.map(np.array, state)
    info = {**info, "digests": digests(state), "arrays": shapes(state)}
    info["digest"] = directory.digest(info)
    with os_errors.naming(self._folder):
      for later in self._manager.all_steps():
        if later >= step:
          self._manager.delete(later)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
        ),
      )

  def info(self) -> dict[str, Any] | None:
    """What was saved beside the state of the latest step that tells."""
    for step in self.steps():
      try:
        return self._info(step)
      except Exception:  # `restore` will say so
        self._check_readable(step)
    return None

  def wait(self) -> None:
    """Until every step that was saved is committed."""
    if self._manager is not None:
      with os_errors.naming(self._folder):
        self._manager.wait_until_finished()

  def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """(state, info) of the latest sound step; None if there is no step at all.

    Args:
      template: a state of the wanted structure, shapes and dtypes.

    Raises:
      OSError: files of a step cannot be read.
      ValueError: there are steps, but not one can be restored, or they hold
        other arrays.
    """
    found = self._latest(template) if self._manager is not None else None
    if jax.process_count() == 1:
      return found
    # The files may be where process 0 alone can read them.
    info = parallel.from_writer(found and found[1])
    if info is None:
      return None
    state = (
      found[0]
      if found
      else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    )
    return parallel.arrays_from_writer(state), info

  def steps(self) -> list[int]:
    """Those that there are, from the latest on."""
    return sorted(self._manager.all_steps(), reverse=True) if self._manager else []

  def _latest(self, template):
    reason = ""
    for step in self.steps():
      try:
        return self._restore(step, template)
      except OtherArraysError:
        raise
      except Exception as error:  # damaged files raise anything
        self._check_readable(step)
        reason = str(error).strip().split("\n")[0]
        logging.warning(
          "checkpoint %d in %s cannot be used (%s: %s)",
          step,
          self._folder,
          type(error).__name__,
          reason,
        )
    if reason:
      raise ValueError(
        f"no checkpoint in {self._folder} can be restored (tried "
        f"{', '.join(map(str, self.steps()))}; of the last: {reason}); bring back "
        "a copy of the folder if there is one, or use another workdir to start over"
      )
    return None

  def _check_readable(self, step: int) -> None:
    """Raises OSError where files of a step cannot be read, damaged or not."""
    if not files.is_local(self._folder):
      return

    def refuse(error):
      if not isinstance(error, FileNotFoundError):
        raise error

    folder = self._folder / str(step)
    for where, _, names in os.walk(folder, onerror=refuse):
      for path in (os.path.join(where, name) for name in names):
        try:
          with os_errors.naming(path), open(path, "rb") as file:
            while file.read(2**20):
              pass
        except OSError as error:
          refuse(error)

  def _info(self, step: int) -> dict[str, Any]:
    info = self._manager.restore(
      step, args=ocp.args.Composite(info=ocp.args.JsonRestore())
    ).info
    # An early version wrote no digest.
    if "digest" in info and info.pop("digest") != directory.digest(info):
      raise ValueError("what was saved beside the state does not match its digest")
    return info | {"checkpoint": directory.digest(info["digests"])}

  def _restore(self, step, template):
    info = self._info(step)
    self._check_arrays(step, info.pop("arrays", None), shapes(template))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    restored = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    )
    expected = info.pop("digests")
    for path, digest in digests(restored.state).items():
      if digest != expected[path]:
        raise ValueError(f"{path} does not match its digest")
    path = not_finite(restored.state)
    if path:  # of a run that diverged
      raise ValueError(f"{path} is not finite")
    # Orbax returns what it finds, whatever shape was asked for.
    for found, wanted in zip(
      jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True
    ):
      if found.shape != wanted.shape:
        raise ValueError(f"an array is {found.shape}, not {wanted.shape}")
    return restored.state, info

  def _check_arrays(self, step, found, wanted) -> None:
    """Raises OtherArraysError unless the arrays of a step are those wanted."""
    if found in (None, wanted):  # an early version did not write them
      return
    path = next(x for x in {**wanted, **found} if found.get(x) != wanted.get(x))
    there, here = found.get(path, "absent"), wanted.get(path, "absent")
    fault = (
      f"checkpoint {step} in {self._folder} is sound, but {path} is {there} in it "
      f"and {here} here"
    )
    if there.replace("float64", "float32") == here.replace("float64", "float32"):
      raise OtherArraysError(
        f"{fault}: it was trained with"
        f"{'' if 'float64' in there else 'out'} JAX_ENABLE_X64=1; "
        f"{'' if 'float64' in there else 'un'}set that here, too"
      )
    raise OtherArraysError(
      f"{fault}: it is of another network; give the config and the data that it "
      "was trained with"
    )


def restore(
  workdir: files.Path, config: ConfigDict, backbone: Backbone
) -> tuple[TrainState, dict[str, Any]]:
  """(state, info) of the latest sound checkpoint of a run directory.

  Raises:
    ValueError: there is none, or not of this network.
  """
  with Checkpoints(workdir) as checkpoints:
    restored = checkpoints.restore(abstract_state(backbone, config))
  if restored is None:
    raise ValueError(
      f"workdir {workdir} has no checkpoint yet; train it first with --mode=train"
    )
  return restored
