"""What N devices say to each other in a step, and what it costs.

    python experiments/scaling.py count configs/cifar100_msdnet.py --set batch=1024
    python experiments/scaling.py time configs/digits.py --devices 8

`count` compiles a half step for --devices virtual CPU devices and counts its
collectives and their bytes: as written, as compiled (XLA joins those that do not
depend on each other), and the longest chain of them in which each needs the one
before, which no program that computes the same can undercut. From that it predicts
how a step scales on machines whose numbers are in LINKS.

`time` runs whole steps, which are two half steps, on 1 and on --devices virtual
devices in turn, at the same total batch on the same cores, and says after how long
control returns.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time

from options import config_parser, shape_and_classes

from l2w_jax.run.command import one_line_errors

STEPS_PER_EPOCH = 1000
COLLECTIVES = ("psum", "psum_invariant", "all_gather", "all_gather_invariant")
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
# name: (assumed FLOP/s that a device reaches on these networks, [(devices up to
# which it holds, bytes/s per device and direction, seconds per collective)]).
# Bandwidths are the makers' figures for NVLink 4 and InfiniBand NDR (H100) and for
# the interconnect of TPU v5p; latencies and FLOP/s are assumptions.
LINKS = {
  "H100, 8 to a host": (20e12, [(8, 450e9, 15e-6), (512, 50e9, 40e-6)]),
  "TPU v5p slice": (
    20e12,
    [(8, 300e9, 10e-6), (64, 300e9, 20e-6), (512, 300e9, 40e-6)],
  ),
}


def build(config_file, overrides):
  """(config, backbone, image shape)."""
  import l2w_jax as l2w

  config = l2w.load_config(config_file, overrides)
  shape, classes = shape_and_classes(config)
  return config, l2w.build_backbone(config.model, classes, shape), shape


def chain(jaxpr) -> tuple[int, int]:
  """(collectives, the longest chain of dependent ones) of a traced function."""
  count = 0

  def walk(jaxpr, depths):
    nonlocal count
    depth = dict(zip(jaxpr.invars, depths, strict=True))
    for eqn in jaxpr.eqns:
      before = [0 if hasattr(x, "val") else depth.get(x, 0) for x in eqn.invars]
      deepest = max(before, default=0)
      inner = [
        x
        for value in eqn.params.values()
        for x in (value if isinstance(value, (tuple, list)) else [value])
      ]
      inner = [getattr(x, "jaxpr", x) for x in inner]
      inner = [x for x in inner if hasattr(x, "eqns")]
      if eqn.primitive.name in COLLECTIVES:
        count += 1
        after = [deepest + 1] * len(eqn.outvars)
      elif (
        len(inner) == 1
        and len(inner[0].invars) == len(before)
        and (len(inner[0].outvars) == len(eqn.outvars))
        and (eqn.primitive.name not in ("scan", "while", "cond"))
      ):
        after = walk(inner[0], before)
      else:
        for x in inner:
          found = count
          walk(x, [0] * len(x.invars))
          if count > found:
            raise ValueError(
              f"collectives inside {eqn.primitive.name} cannot be counted; set "
              "meta.interval=1, microbatches=1 and model.remat=False"
            )
        after = [deepest] * len(eqn.outvars)
      depth.update(zip(eqn.outvars, after, strict=True))
    return [0 if hasattr(x, "val") else depth.get(x, 0) for x in jaxpr.outvars]

  depths = walk(jaxpr, [0] * len(jaxpr.invars))
  return count, max(depths)


def compiled_collectives(text: str) -> list[int]:
  """Bytes of each all-reduce and all-gather of a compiled program."""
  found = []
  for line in text.splitlines():
    match = re.match(
      r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) "
      r"(?:all-reduce|all-gather)(?:-start)?\(",
      line,
    )
    if match:
      found.append(
        sum(
          BYTES[kind] * _product(dims)
          for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
      )
  return found


def _product(dims: str) -> int:
  size = 1
  for dim in filter(None, dims.split(",")):
    size *= int(dim)
  return size


def count(config_file, overrides, num_devices) -> dict:
  """What one half step communicates, with a WPN update."""
  import jax
  import jax.numpy as jnp

  import l2w_jax as l2w
  from l2w_jax.run import parallel
  from l2w_jax.training.step import make_half_step

  config, backbone, shape = build(
    config_file,
    {**overrides, "meta.interval": 1, "microbatches": 1, "model.remat": False},
  )
  parallel.check_batch(config.batch, num_devices)
  size = config.batch // (2 * num_devices)

  def of_each(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((num_devices, *x.shape), x.dtype), tree
    )

  state = jax.eval_shape(
    lambda: l2w.init_state(jax.random.key(0), backbone, config)
  )
  half = {
    "image": jax.ShapeDtypeStruct((size, *shape), jnp.float32),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32),
  }
  mapped = parallel.map_devices(
    make_half_step(
      backbone,
      config,
      steps_per_epoch=STEPS_PER_EPOCH,
      devices=parallel.collectives(num_devices, config.sync),
    ),
    num_devices,
  )
  arguments = tuple(
    map(of_each, (state, half, half, jax.ShapeDtypeStruct((2,), jnp.uint32)))
  )
  traced = jax.make_jaxpr(mapped)(*arguments)
  written, longest = chain(traced.jaxpr)
  lowered = mapped.lower(*arguments)
  compiled = lowered.compile()
  found = compiled_collectives(compiled.as_text())
  return {
    "config": config_file,
    "overrides": overrides,
    "method": config.method,
    "sync": config.sync,
    "devices": num_devices,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "arrays": len(jax.tree.leaves(state.params)),
    "batchnorms": len(jax.tree.leaves(state.batch_stats)) // 2,
    "written": written,
    "compiled": len(found),
    "chain": longest,
    "bytes": sum(found),
    "largest": max(found),
    "flops_per_device": compiled.cost_analysis()["flops"],
  }


def predict(facts: dict) -> list[dict]:
  """Efficiency of a step on 8, 64, 512 devices against one without collectives.

  "same_batch": the counted batch is spread over them; "growing_batch": each has as
  many images as a device of the count. Nothing overlaps. A ring moves 2 (D-1)/D of
  the bytes through each link; a collective takes its latency at least.
  """
  rows = []
  for machine, (flops, links) in LINKS.items():
    compute = facts["flops_per_device"] / flops
    for num_devices in (8, 64, 512):
      share = compute * facts["devices"] / num_devices
      _, bandwidth, latency = next(x for x in links if num_devices <= x[0])
      moved = 2 * (num_devices - 1) / num_devices * facts["bytes"] / bandwidth
      waited = facts["compiled"] * latency
      rows.append(
        {
          "machine": machine,
          "devices": num_devices,
          "compute_ms": 1e3 * compute,
          "bytes_ms": 1e3 * moved,
          "latency_ms": 1e3 * waited,
          "same_batch": share / (share + moved + waited),
          "growing_batch": compute / (compute + moved + waited),
        }
      )
  return rows


def measure(config_file, overrides, num_devices, rounds) -> dict:
  """Seconds of a step on one device and on many, and until the call returns."""
  import jax
  import numpy as np

  import l2w_jax as l2w
  from l2w_jax.run import parallel
  from l2w_jax.training.loop import Step

  config, backbone, shape = build(config_file, overrides)
  parallel.check_batch(config.batch, num_devices)
  rng = np.random.default_rng(0)
  size = config.batch // 2
  halves = [
    {
      "image": rng.standard_normal((size, *shape), np.float32),
      "label": rng.integers(0, backbone.num_classes, size, np.int32),
    }
    for _ in range(2)
  ]
  jobs, results = {}, {}
  for n in (1, num_devices):
    state = l2w.init_state(jax.random.key(0), backbone, config)
    jobs[n] = (
      Step(backbone, config, STEPS_PER_EPOCH, n),
      parallel.replicate(state, n),
      tuple(parallel.split_rows(half, n) for half in halves),
    )
    results[n] = {"seconds": [], "returned": []}
  for i in range(rounds + 2):
    for n, (step, state, rows) in jobs.items():
      jax.block_until_ready((state, rows))
      began = time.perf_counter()
      state, metrics = step(state, rows, i)
      returned = time.perf_counter() - began
      jax.block_until_ready((state, metrics))
      jobs[n] = step, state, rows
      if i >= 2:
        results[n]["seconds"].append(time.perf_counter() - began)
        results[n]["returned"].append(returned)
  return {"batch": config.batch, "devices": results}


def _show_count(facts):
  print(json.dumps(facts, indent=2))
  print(
    f"{'machine':20}{'devices':>8}{'compute ms':>12}{'bytes ms':>10}"
    f"{'latency ms':>12}{'same batch':>12}{'growing':>9}"
  )
  for row in predict(facts):
    print(
      f"{row['machine']:20}{row['devices']:8}{row['compute_ms']:12.2f}"
      f"{row['bytes_ms']:10.3f}{row['latency_ms']:12.2f}"
      f"{row['same_batch']:12.2f}{row['growing_batch']:9.2f}"
    )


def _show_times(result):
  best = {}
  for n, x in result["devices"].items():
    best[n] = min(x["seconds"])
    print(
      f"{n} device(s): {1e3 * best[n]:.1f} ms min, "
      f"{1e3 * statistics.median(x['seconds']):.1f} median of "
      f"{len(x['seconds'])}, {result['batch'] / best[n]:.0f} images/s; the "
      f"call returns after {1e3 * statistics.median(x['returned']):.2f} ms"
    )
  one, many = best.values()
  print(f"throughput of many over one: {one / many:.2f}")


def main(arguments=None) -> None:
  """The command line."""
  parser = config_parser(__doc__, ("count", "time"))
  parser.add_argument(
    "--devices",
    default=8,
    type=int,
    help="virtual CPU devices (default %(default)s)",
  )
  parser.add_argument(
    "--rounds",
    default=5,
    type=int,
    help="steps that are timed (default %(default)s)",
  )
  options = parser.parse_args(arguments)
  # Before JAX starts; only the structure of a counted program matters.
  flags = [f"--xla_force_host_platform_device_count={options.devices}"]
  if options.what == "count":
    flags += [
      "--xla_backend_optimization_level=0",
      "--xla_llvm_disable_expensive_passes=true",
    ]
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
  os.environ["JAX_PLATFORMS"] = "cpu"
  with one_line_errors():
    from l2w_jax.run import backend

    backend.check()
    if options.devices < 2 or options.rounds < 1:
      raise ValueError(
        "--devices must be at least 2 and --rounds at least 1, got "
        f"{options.devices} and {options.rounds}"
      )
    if options.what == "count":
      _show_count(count(options.config, dict(options.set), options.devices))
    else:
      _show_times(
        measure(options.config, dict(options.set), options.devices, options.rounds)
      )


if __name__ == "__main__":
  main()
