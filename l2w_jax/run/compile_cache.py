"""Compiled programs are kept between runs, so only the first one waits for XLA.

Only the command line calls this: a library leaves the settings of the process
it is imported into alone.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
import warnings

import jax


def user_folder() -> pathlib.Path:
  """Where this package keeps what it can make again: below XDG_CACHE_HOME."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "l2w_jax"


def enable() -> pathlib.Path | None:
  """Folder where JAX keeps compiled programs from now on.

  JAX_COMPILATION_CACHE_DIR and a folder set through jax.config stay in force;
  an empty JAX_COMPILATION_CACHE_DIR keeps nothing. Otherwise it is
  l2w_jax/jax under XDG_CACHE_HOME or ~/.cache. Programs that compile in less than
  a second are kept, too, unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says
  otherwise: a new target is a dozen of them, and takes 2 s instead of 4.

  Returns:
    the folder; None if nothing is kept, also where it cannot be created.
  """
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  chosen = jax.config.jax_compilation_cache_dir  # ty: ignore[missing-attribute]
  if "JAX_COMPILATION_CACHE_DIR" in os.environ or chosen:
    if not chosen:
      return None
    replace_damaged(pathlib.Path(chosen))
    return pathlib.Path(chosen)
  try:
    folder = user_folder() / "jax"
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # the latter of a user without a home
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  replace_damaged(folder)
  return folder


def replace_damaged(folder: pathlib.Path) -> None:
  """From now on an entry that JAX cannot read is deleted, and written again.

  JAX only warns of one, compiles, and leaves the file as it is for ever. It names
  the program, so all entries of that name go.
  """
  damaged = "Error reading persistent compilation cache entry for '(.+?)'"
  warnings.filterwarnings("always", damaged)
  show = warnings.showwarning

  def delete(message, *others, **more):
    found = re.match(damaged, str(message))
    if found is None:
      return show(message, *others, **more)
    for path in folder.glob(f"{glob.escape(found[1])}-*"):
      path.unlink(missing_ok=True)

  warnings.showwarning = delete  # ty: ignore[invalid-assignment]
