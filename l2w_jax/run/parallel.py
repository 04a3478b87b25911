"""The only file that knows devices and processes: pmap, collectives, batches.

A loader batch of 2B images is cut in two halves, and each device takes its share
of both, so that N devices see together what one device would see. A step body
that runs under pmap passes `AXIS` to BatchNorm and goes through the collectives
of a `Collectives`; without pmap these are identities.

A run of several processes (hosts) is one run over all of their devices:
`num_devices` counts them all, and each process brings the rows of its own ones.
Process 0, the writer, keeps the run directory.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

AXIS = "devices"
LANES = 128  # of a TPU's vector unit
MOST_PROCESSES = 1_000_000  # of a run; JAX counts them in 32 bits
JOIN_SECONDS = 300  # for all processes of a run to come
PATIENCE_SECONDS = 5  # of waiting in silence
SILENCE_SECONDS = 30  # after which a process counts as dead
Rows = Array | np.ndarray


def _identity(x):
  return x


class Collectives(NamedTuple):
  """What a step needs from its devices.

  Devices of one group compute as if they were one: all of a run together, or each
  by itself (`config.sync`).

  axis_name: pmap axis of the group, for BatchNorm; None for a group of one.
  num_devices: D, in the group.
  in_run: devices of the run.
  mean: mean of a pytree over the group.
  gather: [B …] of this device -> [D·B …] of the group, in device order.
  own: [D·B …] of the group -> the [B …] rows of this device.
  across: mean of a pytree over groups, where each holds one value.
  share: rows of the whole run, [in_run·B …] -> the [B …] of this device.
  """

  axis_name: str | None = None
  num_devices: int = 1
  in_run: int = 1
  mean: Callable[[PyTree], PyTree] = _identity
  gather: Callable[[Array], Array] = _identity
  own: Callable[[Array], Array] = _identity
  across: Callable[[PyTree], PyTree] = _identity
  share: Callable[[Array], Array] = _identity

  def mean_of_all(self, tree: PyTree) -> PyTree:
    """Mean of a pytree over all devices of the run."""
    return self.across(self.mean(tree))

  def own_halves(self, batch: PyTree) -> tuple[PyTree, PyTree]:
    """Arrays of the whole loader batch -> (half 1, half 2) of this device."""
    first = jax.tree.map(lambda x: self.share(x[: len(x) // 2]), batch)
    return first, jax.tree.map(lambda x: self.share(x[len(x) // 2 :]), batch)


ONE_DEVICE = Collectives()


def collectives(num_devices: int, sync: str = "global") -> Collectives:
  """Collectives over `num_devices` under pmap; identities for one device.

  Args:
    num_devices: of the run.
    sync: "global" for one group of all, "local" for groups of one.
  """
  if num_devices == 1:
    return ONE_DEVICE

  def share(x: Array) -> Array:
    size = x.shape[0] // num_devices
    start = jax.lax.axis_index(AXIS) * size
    return jax.lax.dynamic_slice_in_dim(x, start, size)

  def mean(tree: PyTree) -> PyTree:
    return jax.lax.pmean(tree, AXIS)

  if sync == "local":
    return Collectives(in_run=num_devices, across=mean, share=share)
  return Collectives(
    AXIS,
    num_devices,
    num_devices,
    mean=mean,
    gather=lambda x: jax.lax.all_gather(x, AXIS, tiled=True),
    own=share,
    share=share,
  )


def check_batch(batch: int, num_devices: int, num_parts: int = 1) -> None:
  """Raises ValueError unless `batch` splits into two halves on every device.

  And each half there into `num_parts`.
  """
  unit = 2 * num_devices * num_parts
  if batch % unit:
    parts = f" of {num_parts} parts each" if num_parts > 1 else ""
    raise ValueError(
      f"batch {batch} does not split into two halves{parts} on {num_devices} "
      f"device(s); use a multiple of {unit}, such as "
      f"{max(1, round(batch / unit)) * unit}"
    )


def fuller_batch(batch: int, num_devices: int, num_parts: int = 1) -> int | None:
  """The nearest loader batch that fills a TPU's lanes; None if this one does.

  Images lie in its 128 lanes, so each of `num_parts` parts of half a batch should
  be a multiple of that on each device: 64 images take it as long as 128.
  """
  unit = 2 * num_devices * num_parts * LANES
  return max(1, round(batch / unit)) * unit if batch % unit else None


def count_devices(wanted: int) -> int:
  """Devices to use: `wanted`, or all of the run for 0.

  Raises:
    ValueError: more are wanted than there are, or not all of several processes.
  """
  available = jax.device_count()
  if wanted > available:
    raise ValueError(
      f"config.num_devices is {wanted}, but this run has {available} "
      f"{jax.default_backend()} device(s); use {available} or 0 for all"
    )
  if jax.process_count() > 1 and wanted not in (0, available):
    raise ValueError(
      f"config.num_devices is {wanted}, but {jax.process_count()} processes "
      f"use all of their {available} devices; leave it at 0"
    )
  return wanted or available


def _place(x: np.ndarray, num_devices: int) -> Array:
  """[L …] of this process's L devices -> the mapped argument [D …] of all.

  Every row of the result lies on its own device, as a mapped function has it.
  """
  mesh = jax.sharding.Mesh(jax.devices()[:num_devices], AXIS)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.make_array_from_process_local_data(sharding, x)


def replicate(tree: PyTree, num_devices: int) -> PyTree:
  """The argument of a mapped function that is the same on every device."""
  if num_devices == 1:
    return jax.device_put(tree)
  local = num_devices // jax.process_count()
  return jax.tree.map(
    lambda x: _place(np.broadcast_to(x, (local, *np.shape(x))), num_devices), tree
  )


def split_rows(tree: PyTree, num_devices: int) -> PyTree:
  """The argument of a mapped function, from [L·B …] rows for the L devices here."""
  if num_devices == 1:
    return jax.device_put(tree)
  local = num_devices // jax.process_count()
  return jax.tree.map(
    lambda x: _place(np.reshape(x, (local, -1, *x.shape[1:])), num_devices), tree
  )


def first(tree: PyTree, num_devices: int) -> PyTree:
  """What the first device here holds of a result that all of them have."""
  if num_devices == 1:
    return tree
  return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)


def own_rows(batch: int) -> slice:
  """Which rows of a batch of all devices this process takes, in its order."""
  size = batch // jax.process_count()
  return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def rows_of_host(
  batch: int, num_devices: int, host: int, num_hosts: int
) -> np.ndarray:
  """The rows of a loader batch that the devices of a host take, in their order.

  Device d of all D takes rows [d·B/D, (d+1)·B/D) of either half, as
  `Collectives.own_halves` has it; a host is a process with `num_devices` /
  `num_hosts` of them.
  """
  check_batch(batch, num_devices)
  rows = np.arange(batch).reshape(2, num_hosts, num_devices // num_hosts, -1)
  return rows[:, host].swapaxes(0, 1).reshape(-1)


def own_rows_of_halves(batch: int, num_devices: int) -> np.ndarray:
  """`rows_of_host` of this process."""
  return rows_of_host(batch, num_devices, jax.process_index(), jax.process_count())


def map_devices(
  function: Callable,
  num_devices: int,
  donate_argnums: tuple[int, ...] = (),
  devices: Sequence[jax.Device] | None = None,
) -> Any:
  """Pmap of `function` over the first `num_devices` devices; jit for one.

  Under pmap every argument and result has a leading device axis.

  Args:
    function, num_devices, donate_argnums: see `jax.pmap`.
    devices: others than those of this run, such as described ones.
  """
  if num_devices == 1:
    place: dict[str, Any] = {}
    if devices is not None:
      only = jax.sharding.SingleDeviceSharding(devices[0])
      place = {"in_shardings": only, "out_shardings": only}
    return jax.jit(function, donate_argnums=donate_argnums, **place)
  mapped = jax.pmap(
    function,
    AXIS,
    devices=(jax.devices() if devices is None else devices)[:num_devices],
    donate_argnums=donate_argnums,
  )
  return mapped if jax.process_count() == 1 else _compiled_at_first(mapped)


def _compiled_at_first(mapped: Any) -> Callable:
  """`mapped`, compiled for arguments like those of its first call.

  Its results are then arrays of all processes, as those of `replicate` are. Those
  of pmap itself are of this process alone, which no compiled function takes.
  """
  compiled = []

  def call(*arguments):
    if not compiled:
      compiled.append(mapped.lower(*arguments).compile())
    return compiled[0](*arguments)

  call.lower = mapped.lower  # ty: ignore[missing-attribute]
  return call


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Makes this process one of a run of several; before JAX is used at all.

  Without arguments the cluster's environment (Cloud TPU, Slurm, Open MPI) says
  which processes there are. When one dies, the others stop within a minute.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which one this is, from 0.

  Raises:
    ValueError: arguments that do not fit, an environment that says nothing, or
      processes that do not come.
  """
  given = (coordinator, num_processes, process_id)
  if any(x is None for x in given) and any(x is not None for x in given):
    raise ValueError(
      "--coordinator=HOST:PORT, --num_processes and --process_id belong "
      f"together; got {coordinator}, {num_processes}, {process_id}"
    )
  counted = num_processes is not None and process_id is not None
  if counted and not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id={process_id} must be at least 0 and below "
      f"--num_processes={num_processes}"
    )
  if counted and num_processes > MOST_PROCESSES:
    raise ValueError(
      f"--num_processes={num_processes} is more than {MOST_PROCESSES:,}; give the "
      "number of processes that are started"
    )
  if coordinator is not None:
    _check_address(coordinator)
  # JAX would catch SIGTERM; a process that is asked to stop should.
  jax.config.update("jax_enable_preemption_service", False)
  waiting = threading.Timer(PATIENCE_SECONDS, _say_waiting, [coordinator])
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(
      *given,
      initialization_timeout=JOIN_SECONDS,
      heartbeat_timeout_seconds=SILENCE_SECONDS,
      shutdown_timeout_seconds=SILENCE_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      "the processes of this run did not find each other: "
      f"{str(error).splitlines()[0]}; start all of them within "
      f"{JOIN_SECONDS} s, each with the same --coordinator and "
      "--num_processes and its own --process_id"
    ) from error
  finally:
    waiting.cancel()


def _check_address(coordinator: str) -> None:
  """Raises ValueError unless it is HOST:PORT, an IPv6 address being in brackets.

  JAX would end with a segmentation fault, or wait for a host that cannot be.
  """
  host, _, port = coordinator.rpartition(":")
  try:
    known = 0 < int(port) < 2**16 and port.isdecimal()
    if host.startswith("[") and host.endswith("]"):
      ipaddress.IPv6Address(host[1:-1])
    else:
      known = known and re.fullmatch(r"[^\s:/\[\]@]+", host)
  except ValueError:
    known = False
  if not known:
    raise ValueError(
      f"--coordinator={coordinator} must be HOST:PORT of process 0, such as "
      "10.0.0.1:1234 or [::1]:1234, with a port from 1 to 65535"
    )


def _say_waiting(coordinator: str | None) -> None:
  """A line on standard error, where processes take long to find each other."""
  left = JOIN_SECONDS - PATIENCE_SECONDS
  until = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
  what = "the other processes of this run"
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    try:
      socket.getaddrinfo(host.strip("[]"), int(port))
      what += f" (--coordinator={coordinator})"
    except OSError:
      what = f"the name {host} of --coordinator={coordinator} to be known here"
  print(f"waiting until {until} for {what}", file=sys.stderr)


class Agreement:
  """Whole numbers that every process says: the largest of each, for all of them.

  With several processes a call gives what was said at the one before, 0 at first:
  their devices exchange it behind the step in flight, and nobody waits.
  """

  def __init__(self, num_devices: int):
    self._num_devices, self._before = num_devices, None
    self._largest = map_devices(lambda x: jax.lax.pmax(x, AXIS), num_devices)

  def __call__(self, *said: int) -> tuple[int, ...]:
    if jax.process_count() == 1:
      return said
    before = self._before
    self._before = self._largest(
      replicate(np.asarray(said, np.int32), self._num_devices)
    )
    if before is None:
      return (0,) * len(said)
    return tuple(map(int, first(before, self._num_devices)))


def largest(number: int) -> int:
  """The largest that any process gives; all wait for each other."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).max())


def is_writer() -> bool:
  """Whether this process keeps the run directory: process 0 does."""
  return jax.process_index() == 0


def from_writer(value: Any) -> Any:
  """What process 0 gives, which is plain JSON data; others' values are dropped."""
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(arrays_from_writer(np.int32(len(text))))
  text = text if is_writer() else np.zeros(size, np.uint8)
  return json.loads(arrays_from_writer(text).tobytes())


def arrays_from_writer(tree: PyTree) -> PyTree:
  """The arrays of process 0; others give a tree of the same shapes."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)
