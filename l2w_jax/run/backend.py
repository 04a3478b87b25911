"""What computes: started, tested and named at the start of a command.

Only commands call `check`: a library leaves that to whoever starts JAX.
"""

from __future__ import annotations

import os

import jax
import numpy as np

ROWS = 32_769  # the fewest for which jaxlib 0.10.2 gets the last sum wrong
# Settings of JAX, from its environment or jax.config, that end every run.
_GUARDED = ("disallow", "disallow_explicit")
UNWORKABLE = {
  "jax_disable_jit": (True,),
  "jax_no_tracing": (True,),
  "jax_numpy_rank_promotion": ("raise",),
  "jax_numpy_dtype_promotion": ("strict",),
  "jax_transfer_guard": _GUARDED,
  "jax_transfer_guard_host_to_device": _GUARDED,
  "jax_transfer_guard_device_to_host": _GUARDED,
  "jax_transfer_guard_device_to_device": _GUARDED,
}


def check() -> None:
  """Starts JAX's devices and has them compute one sum of products.

  Raises:
    ValueError: JAX is set to refuse what we do, there are no such devices, or the
      sum is wrong, as on CPUs with jaxlib 0.10.2 (jax-ml/jax#39103).
  """
  for name, values in UNWORKABLE.items():
    if (value := getattr(jax.config, name, None)) in values:
      raise ValueError(
        f"{name.upper()}={value}: l2w_jax cannot compute with it; unset it"
      )
  try:
    platform = jax.devices()[0].platform
  except (AssertionError, RuntimeError, ValueError) as error:
    raise ValueError(_cannot_start(error)) from error
  last = sum_of_products()
  if last != (ROWS - 1) ** 2:
    raise ValueError(_computes_wrong(platform, last))


def sum_of_products() -> float:
  """The last of `ROWS` sums, each of the squares of three products: (ROWS - 1)².

  A power of two, and so exact in every format that a device multiplies in.
  """
  rows = np.zeros((ROWS, 3), np.float32)
  rows[:, 0] = np.arange(ROWS)

  def sums(eye, rows):
    products = jax.lax.dot_general(eye, rows, (((1,), (1,)), ((), ())))
    return jax.lax.reduce(
      jax.lax.square(products), np.float32(0), jax.lax.add, (0,)
    )

  return float(np.asarray(jax.jit(sums)(np.eye(3, dtype=np.float32), rows))[-1])


def _computes_wrong(platform: str, last: float) -> str:
  version = jax.__version__
  advice = f'install another version with pip install "jax!={version}"'
  # Older ones end at a flag that they do not know.
  if platform == "cpu" and jax.__version_info__ >= (0, 10):
    ours = "--xla_cpu_experimental_ynn_fusion_type="
    flags = " ".join([*os.environ.get("XLA_FLAGS", "").split(), ours])
    advice += f', or keep it and set XLA_FLAGS="{flags}", which leaves the bug out'
  return (
    f"JAX {version} computes wrong sums of products on this {platform}, as in "
    f"jax-ml/jax#39103: {last:.0f} where {(ROWS - 1) ** 2} is right; {advice}"
  )


def _cannot_start(error: Exception) -> str:
  reason = (str(error).splitlines() or ["there is no such platform"])[0]
  names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
  given = [name for name in names if os.environ.get(name)]
  if not given:
    return f"JAX {jax.__version__} cannot start its devices: {reason}"
  return (
    f"JAX {jax.__version__} cannot start its devices with "
    f"{', '.join(f'{name}={os.environ[name]}' for name in given)}: {reason}; unset "
    f"{' and '.join(given)} to compute on what is here, or install JAX for what "
    "they name (docs.jax.dev/en/latest/installation.html)"
  )


def describe(num_devices: int | None = None) -> str:
  """Devices, JAX version and processes in words, for the first line of a run.

  Args:
    num_devices: that the run computes on; None for all.
  """
  available, processes = jax.device_count(), jax.process_count()
  used = available if num_devices is None else num_devices
  count = f"{used} of {available}" if used < available else f"{used}"
  device = jax.devices()[0]
  return (
    f"{count} {device.platform} device{'s' * (available > 1)} "
    f"({device.device_kind}), JAX {jax.__version__}, "
    f"{processes} process{'es' * (processes > 1)}"
  )
