"""Checkpoints (Orbax) and the other files of a run directory.

Every write is atomic: Orbax commits a step by renaming it, other files are
written beside and renamed. A checkpoint carries a digest of every array, because
a flipped bit restores as a wrong number without an error. A damaged step is
stepped over, with a warning, in favour of the one before.
"""

from __future__ import annotations

import pathlib
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from l2w_jax.models.backbone import Backbone
from l2w_jax.run import directory, parallel
from l2w_jax.training.state import TrainState, abstract_state


def digests(state: PyTree) -> dict[str, int]:
  """CRC-32 of every array of a state, by its path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).tobytes())
    for path, leaf in leaves
  }


class Checkpoints:
  """The checkpoints of one run directory; a context manager.

  Args:
    workdir: the run directory; checkpoints go into its `checkpoints` folder.
    keep: how many of the latest to keep; None is for reading only.
  """

  def __init__(self, workdir: pathlib.Path, keep: int | None = None):
    self._folder = workdir.absolute() / "checkpoints"
    self._manager = None
    if not parallel.is_writer():
      return
    alone = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
      # Every process has the whole state; Orbax need not know of the others.
      alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="writer"
      )
      if keep is not None:
        self._folder.mkdir(parents=True, exist_ok=True)
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
      self._manager.close()

  def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
    """Commits a step in the background.

    Steps at or after it are deleted: they were damaged, or the run would not
    have gone back behind them, and Orbax would save nothing before the latest.
    """
    if self._manager is None:
      return
    for later in self._manager.all_steps():
      if later >= step:
        self._manager.delete(later)
    # A copy: the caller's next step may reuse the memory while this is written.
    state = jax.tree.map(np.array, state)
    info = {**info, "digests": digests(state)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
      ),
    )

  def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """(state, info) of the latest sound step; None if there is no step at all.

    Args:
      template: a state of the wanted structure, shapes and dtypes.

    Raises:
      ValueError: there are steps, but not one can be restored.
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

  def _latest(self, template):
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return self._restore(step, template)
      except Exception as error:  # damaged files raise anything
        reason = str(error).strip().split("\n")[0]
        logging.warning(
          "checkpoint %d in %s cannot be used (%s: %s)",
          step,
          self._folder,
          type(error).__name__,
          reason,
        )
    if steps:
      raise ValueError(
        f"no checkpoint in {self._folder} can be restored (tried "
        f"{', '.join(map(str, steps))}); it may belong to another model or "
        "be damaged. Use another workdir, or delete the folder to start over"
      )
    return None

  def _restore(self, step, template):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), info=ocp.args.JsonRestore()
      ),
    )
    info = restored.info
    expected = info.pop("digests")
    for path, digest in digests(restored.state).items():
      if digest != expected[path]:
        raise ValueError(f"{path} does not match its digest")
    # Orbax returns what it finds, whatever shape was asked for.
    for found, wanted in zip(
      jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True
    ):
      if found.shape != wanted.shape:
        raise ValueError(f"an array is {found.shape}, not {wanted.shape}")
    return restored.state, info


def restore(
  workdir: pathlib.Path, config: ConfigDict, backbone: Backbone
) -> tuple[TrainState, dict[str, Any]]:
  """(state, info) of the latest sound checkpoint of a run directory.

  Raises:
    ValueError: there is none, or the run was for other classes or images.
  """
  directory.check_same_images(workdir, backbone.num_classes, backbone.image_shape)
  with Checkpoints(workdir) as checkpoints:
    restored = checkpoints.restore(abstract_state(backbone, config))
  if restored is None:
    raise ValueError(
      f"workdir {workdir} has no checkpoint yet; train it first with --mode=train"
    )
  return restored
