"""The only file that knows devices: pmap, collectives, and how a batch is split.

A loader batch of 2B images is cut in two halves, and each device takes its share
of both, so that N devices see together what one device would see. A step body
that runs under pmap passes `AXIS` to BatchNorm and goes through the collectives
of a `Collectives`; without pmap these are identities.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

AXIS = "devices"
Rows = Array | np.ndarray


def _identity(x):
  return x


class Collectives(NamedTuple):
  """What a step needs from its devices.

  axis_name: pmap axis, for BatchNorm; None on one device.
  num_devices: D.
  mean: mean of a pytree over devices.
  gather: [B …] of this device -> [D·B …] of all, in device order.
  own: [D·B …] -> the [B …] rows of this device.
  own_halves: [2·D·B …] -> its [2·B …]: rows of half 1, then rows of half 2.
  """
  axis_name: str | None = None
  num_devices: int = 1
  mean: Callable[[PyTree], PyTree] = _identity
  gather: Callable[[Array], Array] = _identity
  own: Callable[[Array], Array] = _identity
  own_halves: Callable[[Array], Array] = _identity


ONE_DEVICE = Collectives()


def collectives(num_devices: int) -> Collectives:
  """Collectives over `num_devices` under pmap; identities for one device."""
  if num_devices == 1:
    return ONE_DEVICE

  def own(x: Array) -> Array:
    size = x.shape[0] // num_devices
    start = jax.lax.axis_index(AXIS) * size
    return jax.lax.dynamic_slice_in_dim(x, start, size)

  def own_halves(x: Array) -> Array:
    first, second = jnp.split(x, 2)
    return jnp.concatenate([own(first), own(second)])

  return Collectives(
      AXIS, num_devices,
      mean=lambda tree: jax.lax.pmean(tree, AXIS),
      gather=lambda x: jax.lax.all_gather(x, AXIS, tiled=True),
      own=own, own_halves=own_halves)


def check_batch(batch: int, num_devices: int) -> None:
  """Raises ValueError unless `batch` splits into two halves on every device."""
  if batch % (2 * num_devices):
    nearest = max(1, round(batch / (2 * num_devices))) * 2 * num_devices
    raise ValueError(
        f"batch {batch} does not split into two halves on {num_devices} "
        f"device(s); use a multiple of {2 * num_devices}, such as {nearest}")


def num_local_devices(wanted: int) -> int:
  """Devices to use: `wanted`, or all of this process for 0.

  Raises:
    ValueError: more are wanted than there are.
  """
  available = jax.local_device_count()
  if wanted > available:
    raise ValueError(
        f"config.num_devices is {wanted}, but this process has {available} "
        f"{jax.default_backend()} device(s); use {available} or 0 for all")
  return wanted or available


def replicate(tree: PyTree, num_devices: int) -> PyTree:
  """The argument of a mapped function that is the same on every device."""
  if num_devices == 1:
    return jax.device_put(tree)
  return jax.tree.map(
      lambda x: jnp.broadcast_to(x, (num_devices, *jnp.shape(x))), tree)


def first(tree: PyTree, num_devices: int) -> PyTree:
  """What device 0 holds of a replicated result."""
  return tree if num_devices == 1 else jax.tree.map(lambda x: x[0], tree)


def split_rows(x: Rows, num_devices: int) -> Rows:
  """[D·B …] -> [D B …] for a mapped function; unchanged for one device."""
  if num_devices == 1:
    return x
  return x.reshape(num_devices, -1, *x.shape[1:])


def put_rows(x: np.ndarray, num_devices: int) -> Array:
  """`split_rows`, each row block on its own device already."""
  if num_devices == 1:
    return jax.device_put(x)
  mesh = jax.sharding.Mesh(jax.local_devices()[:num_devices], AXIS)
  return jax.device_put(split_rows(x, num_devices), jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(AXIS)))


def rows_of_host(
    batch: int, num_devices: int, host: int, num_hosts: int) -> np.ndarray:
  """The rows of a loader batch that a host's devices take, in their order.

  Device d of all D takes rows [d·B/D, (d+1)·B/D) of either half, as `own_halves`
  has it; hosts have `num_devices` devices each, in order.
  """
  check_batch(batch, num_devices * num_hosts)
  rows = np.arange(batch).reshape(2, num_hosts, num_devices, -1)[:, host]
  return rows.swapaxes(0, 1).reshape(-1)


def merge_rows(x: Rows, num_devices: int) -> Rows:
  """[D B …] -> [D·B …], undoing `split_rows`."""
  return x if num_devices == 1 else x.reshape(-1, *x.shape[2:])


def map_devices(
    function: Callable, num_devices: int, donate_argnums: tuple[int, ...] = (),
) -> Callable:
  """Pmap of `function` over the first `num_devices` devices; jit for one.

  Under pmap every argument and result has a leading device axis.
  """
  if num_devices == 1:
    return jax.jit(function, donate_argnums=donate_argnums)
  return jax.pmap(
      function, AXIS, devices=jax.local_devices()[:num_devices],
      donate_argnums=donate_argnums)
