"""Commands ask glibc for memory in pages of 2 MiB, where Linux has them."""

from __future__ import annotations

import contextlib
import os
import platform
import sys

from l2w_jax.run import stopping


def use() -> None:
  """Starts this command again where glibc is to be told of huge pages.

  XLA on CPUs allocates the temporary memory of a program at every call, and Linux
  faults it in page by page: with 2 MiB pages a plain step of a network for CIFAR
  takes a seventh less time (docs/speed.md). glibc reads the setting only when a
  process starts. A GLIBC_TUNABLES of one's own, also an empty one, is left alone.
  """
  if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    stopping.block()  # or they would come to a Python that only starts
    with contextlib.suppress(OSError):
      os.execv(sys.executable, sys.orig_argv)
