r"""What the compiler of a TPU or a GPU says of a config's programs, without either.

    pip install "jax[tpu]"
    python experiments/topology.py configs/cifar100_msdnet.py --topology=v5e:2x4 \
        --out v5e.json --against earlier.json

compiles the resident feed, a forward pass in training, the half steps of uniform
and l2w, the scorer of the evaluation, and on one device the exported stages of an
early exit, for devices that are only described, and prints for each, per device:
temporary memory and, with arguments, its share of the device's, collectives and
their bytes as often as they run, the compiler's own estimate of cycles and where
they go (in loops: those that turn more than once), bytes of its arrays in memory
over those of their values (a TPU pads), and instructions it computes twice to save
memory.

Topologies: v5e:2x4 (one host), v5e:4x8 (eight hosts), v4:2x2x1, v5p:2x2x2, v6e:2x4,
and with the wheels of jax[cuda13] also a100:1x8, h100:1x8, h200:2x8 (two hosts of
eight). A GPU's compiler estimates no cycles, and without a GPU it tries no
algorithms of convolutions. A TPU's generates the code of a large step in
tens of minutes; --hlo-only stops before that, when memory, collectives and fusions
are known, and cycles are not.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from options import config_parser, shape_and_classes

import l2w_jax as l2w
from l2w_jax.data import augment, resident
from l2w_jax.exits import export
from l2w_jax.run import files, parallel
from l2w_jax.run.command import one_line_errors
from l2w_jax.training.step import make_half_step

NUM_TRAIN = {"tfds:imagenet2012": 1_231_167}  # images; of other sets 45,000
STEPS_PER_EPOCH = 1000
FLAT = ("v5e", "v6e")  # chips in a plane
SIDES = {True: r"[1-9]\d*x[1-9]\d*", False: r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?"}
CLOCK = {
  "v5e": 1.5e9,
  "v4": 1.05e9,
  "v5p": 1.75e9,
  "v6e": 1.75e9,
}  # cycles a second
HBM = {"v5e": 16, "v4": 32, "v5p": 95, "v6e": 32}  # GiB of a chip
DUMP = "L2W_TOPOLOGY_DUMP"  # where --hlo-only reads what a process of it writes
PROGRAMS = ("feed", "forward", "uniform", "l2w", "scorer", "stages")
EXAMPLES = {"tpu": "v5e:2x4, v4:2x2x1 or v5p:2x2x2", "cuda13": "h100:1x8"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")


class Gpu(NamedTuple):
  """What XLA asks of a GPU, from its maker's data sheet and occupancy table."""

  name: str
  capability: int  # major version of its instructions
  cores: int
  lanes: int  # float32 units of a core
  shared: int  # bytes of a core's shared memory, 1 KiB of which a block cannot take
  cache: int  # bytes of L2
  gigahertz: float
  memory: int  # bytes
  bandwidth: float  # bytes a second


GPUS = {
  "a100": Gpu(
    "A100-SXM4-80GB", 8, 108, 64, 164 << 10, 40 << 20, 1.41, 80 << 30, 2.039e12
  ),
  "h100": Gpu(
    "H100 80GB HBM3", 9, 132, 128, 228 << 10, 50 << 20, 1.98, 80 << 30, 3.352e12
  ),
  "h200": Gpu("H200", 9, 132, 128, 228 << 10, 50 << 20, 1.98, 141 * 10**9, 4.8e12),
}


def target_of(gpu: Gpu) -> str:
  """What XLA asks of a GPU that is not there, as the text of a protocol buffer."""
  return f"""
    platform_name: "CUDA"
    device_description_str: "NVIDIA {gpu.name}"
    runtime_version {{ major: 13 }}
    dnn_version_info {{ major: 9 minor: 12 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {gpu.capability} }}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.lanes}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      shared_memory_per_block: {48 << 10}
      shared_memory_per_block_optin: {gpu.shared - 1024}
      shared_memory_per_core: {gpu.shared}
      l2_cache_size: {gpu.cache}
      clock_rate_ghz: {gpu.gigahertz}
      device_memory_size: {gpu.memory}
      memory_bandwidth: {gpu.bandwidth:.0f}
    }}
  """


def describe(topology: str) -> list:
  """The devices of a topology such as v5e:2x4 or h100:1x8.

  Raises:
    ValueError: no such topology, or no compiler for it is installed.
  """
  chip, _, sizes = topology.partition(":")
  if chip in GPUS and re.fullmatch(r"[1-9]\d*x[1-9]\d*", sizes):
    wheels, plugin = "cuda13", "jax_cuda13_plugin"
    asked = {
      "platform": "cuda",
      "target_config": target_of(GPUS[chip]),
      "topology": f"1x{sizes}",
    }
  elif chip in CLOCK and re.fullmatch(SIDES[chip in FLAT], sizes):
    wheels, plugin = "tpu", "libtpu"
    asked = {"platform": "tpu", "topology_name": topology}
    os.environ.update(
      TPU_SKIP_MDS_QUERY="1",
      TPU_WORKER_HOSTNAMES="localhost",
      TPU_ACCELERATOR_TYPE="v5litepod-8",
      ALLOW_MULTIPLE_LIBTPU_LOAD="1",
      TPU_STDERR_LOG_LEVEL="3",
      TPU_MIN_LOG_LEVEL="3",
    )
    sides = [int(n) for n in sizes.split("x")]
    if chip == "v4":
      asked["chip_config_name"] = "megacore"
    if len(sides) == 2 and math.prod(sides) <= 8:  # one host
      asked["chips_per_host_bounds"] = [*sides, 1]
  else:
    raise ValueError(
      f"--topology={topology} must be CHIP:SIZES, such as v5e:2x4 or v4:2x2x1 with "
      f"one of the TPUs {', '.join(CLOCK)}, or h100:1x8, hosts and GPUs of each, "
      f"with one of {', '.join(GPUS)}"
    )
  try:
    return topologies.get_topology_desc(**asked).devices
  except Exception as error:  # libtpu raises anything
    missing = importlib.util.find_spec(plugin) is None
    raise ValueError(
      f"no devices of {topology} can be described "
      f"({str(error).splitlines()[0]}); "
      + (
        f"pip install 'jax[{wheels}]=={jax.__version__}'"
        if missing
        else f"choose sizes that {chip} is made in, such as {EXAMPLES[wheels]}"
      )
    ) from error


def lower_stages(config, device):
  """All exported stages, one after the other on one device."""
  shape, classes = shape_and_classes(config)
  backbone = l2w.build_backbone(config.model, classes, shape)
  network = l2w.early_exit.EarlyExit(
    backbone,
    backbone.init(jax.random.key(0)),
    thresholds=[0.5] * (backbone.num_exits - 1) + [-math.inf],
    mean=[127.0] * shape[-1],
    std=[70.0] * shape[-1],
  )
  exported = export.export_stages(network)

  def function(images):
    arrays = [images]
    for stage in exported:
      arrays = stage.call(arrays)
    return arrays

  images = jax.ShapeDtypeStruct(
    (config.evaluate.batch, *shape),
    jnp.uint8,
    sharding=jax.sharding.SingleDeviceSharding(device),
  )
  return jax.jit(function).lower(images)


def lower(name: str, config, devices: list):
  """A program of `PROGRAMS`, lowered for all devices; stages for the first."""
  if name == "stages":
    return lower_stages(config, devices[0])
  shape, classes = shape_and_classes(config)
  n, struct = len(devices), jax.ShapeDtypeStruct
  backbone = l2w.build_backbone(config.model, classes, shape)
  shared = parallel.collectives(n, config.sync)

  def half(size):
    return {
      "image": struct((size, *shape), jnp.float32),
      "label": struct((size,), jnp.int32),
    }

  own, donated = config.batch // (2 * n), ()
  key, step = struct((2,), jnp.uint32), struct((), jnp.int32)
  variables = jax.eval_shape(backbone.init, jax.random.key(0))
  if name == "feed":
    function = resident.make_halves_fn(config, shape, shared)
    count = NUM_TRAIN.get(config.data.source, 45_000)
    data = {
      "image": struct((count, math.prod(shape)), jnp.uint8),
      "label": struct((count,), jnp.int32),
      "mean": struct(shape[-1:], jnp.float32),
      "std": struct(shape[-1:], jnp.float32),
    }
    arguments = data, key, step
  elif name == "forward":
    function = functools.partial(
      backbone.apply, train=True, axis_name=shared.axis_name
    )
    arguments = variables, half(own)["image"]
  elif name == "scorer":

    def function(variables, images):
      zeros, ones = jnp.zeros(shape[-1]), jnp.ones(shape[-1])
      logits = backbone.apply(variables, augment.normalize(images, zeros, ones))
      return shared.gather(logits)

    images = struct((config.evaluate.batch, *shape), jnp.uint8)
    arguments = variables, images
  else:
    with config.unlocked():
      config.method = name
    function = functools.partial(
      make_half_step(
        backbone, config, steps_per_epoch=STEPS_PER_EPOCH, devices=shared
      ),
      update_wpn=True,
    )
    state = jax.eval_shape(
      lambda: l2w.init_state(jax.random.key(0), backbone, config)
    )
    arguments, donated = (state, half(own), half(own), key), (0,)
  if n > 1:
    arguments = jax.tree.map(lambda x: struct((n, *x.shape), x.dtype), arguments)
  return parallel.map_devices(function, n, donated, devices).lower(*arguments)


class Hlo:
  """What the text of an optimised module says."""

  def __init__(self, text: str):
    self.computations, self.entry = {}, None
    lines = None
    for line in text.splitlines():
      head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
      if head and not line.startswith(" "):
        lines = self.computations.setdefault(head[2], [])
        self.entry = head[2] if head[1] else self.entry
      elif lines is not None and (found := INSTRUCTION.match(line)):
        lines.append((*found.groups(), line))
    self.fusions = text.count(" fusion(")
    self.rematerialised = len(
      re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+\.remat", text, re.M)
    )
    self.text = text

  def cycles(self) -> tuple[dict[str, int], int]:
    """(estimated cycles by kind, those in loops), as often as loops turn."""
    found, in_loops = collections.Counter(), 0
    for times, opcode, _, line in self._executed(self.entry):
      if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
        found[self._kind(opcode, line)] += times * int(estimate[1])
        in_loops += times * int(estimate[1]) if times > 1 else 0
    return dict(found), in_loops

  def _kind(self, opcode, line):
    called = re.search(r"calls=%?([\w.\-]+)", line)
    inside = {opcode}
    if called:
      inside = {found[2] for found in self.computations.get(called[1], [])}
    for kind, opcodes in {
      "convolutions": {"convolution", "dot"},
      "reductions": {"reduce", "reduce-window"},
      "gathers": {"gather", "scatter", "sort"},
    }.items():
      if inside & opcodes:
        return kind
    moves = {"copy", "transpose", "bitcast", "parameter", "reshape", "tuple"}
    return "copies" if inside <= moves else "elementwise"

  def collectives(self) -> dict[str, dict[str, int]]:
    """{kind: number and bytes of a device} of what devices exchange."""
    found = {}
    for times, opcode, shape, _ in self._executed(self.entry):
      kind = opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        one = found.setdefault(kind, {"number": 0, "bytes": 0})
        one["number"] += times
        one["bytes"] += times * sum(logical for logical, _ in sizes(shape))
    return found

  def _turns(self, line):
    """How often a loop turns: known, or the one constant of its condition."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    lines = [known[0]] if known else [x[-1] for x in self.computations[condition]]
    limits = re.findall(r'(?: constant\(|"n":")(\d+)', "\n".join(lines))
    return int(limits[0]) if len(limits) == 1 else 1

  def _executed(self, name, times=1):
    """(times, opcode, shape, line) of what runs; loops count as they turn."""
    for _, shape, opcode, _, line in self.computations[name]:
      if opcode == "while":
        body = re.search(r"body=%?([\w.\-]+)", line)[1]
        yield from self._executed(body, times * self._turns(line))
      elif opcode == "conditional":
        for branch in re.findall(r"branch_computations=\{([^}]*)\}", line):
          yield from self._executed(branch.split(",")[0].strip(" %"), times)
      elif opcode == "call":
        called = re.search(r"to_apply=%?([\w.\-]+)", line)[1]
        yield from self._executed(called, times)
      else:
        yield times, opcode, shape, line

  def padding(self) -> float:
    """Bytes of the entry's arrays in memory, over those of their values."""
    pairs = [
      pair
      for _, shape, opcode, _, _ in self.computations[self.entry]
      if opcode not in ("tuple", "get-tuple-element", "bitcast")
      for pair in sizes(shape)
    ]
    return sum(padded for _, padded in pairs) / max(sum(x for x, _ in pairs), 1)


def sizes(shape: str) -> list[tuple[int, int]]:
  """(bytes of the values, bytes with padding to tiles) of each array in a shape."""
  found = []
  for kind, dims, layout in SHAPE.findall(shape):
    dims = [int(n) for n in dims.split(",") if n]
    width = BYTES.get(kind) or int(re.sub(r"\D", "", kind)) // 8
    order = re.match(r"\{([\d,]+)", layout or "")
    tile = re.search(r"T\((\d+),(\d+)\)", layout or "")
    padded = list(dims)
    if order and tile and len(dims) >= 2:
      minor = [int(n) for n in order[1].split(",")][:2]
      for axis, unit in zip(minor, (int(tile[2]), int(tile[1])), strict=True):
        padded[axis] = -(-dims[axis] // unit) * unit
    found.append((width * math.prod(dims), width * math.prod(padded)))
  return found


def facts_of(text: str, memory: dict[str, int], seconds: float) -> dict:
  """What is stored of a program."""
  hlo = Hlo(text)
  cycles, in_loops = hlo.cycles()
  return {
    "compile_seconds": seconds,
    **memory,
    "fusions": hlo.fusions,
    "rematerialised": hlo.rematerialised,
    "padded": hlo.padding(),
    "collectives": hlo.collectives(),
    "cycles": cycles,
    "cycles_in_loops": in_loops,
  }


def memory_of(folder: pathlib.Path) -> dict[str, int]:
  """Bytes in a chip's memory, from the assignment of buffers that XLA wrote."""
  (path,) = folder.glob("*after_optimizations-buffer-assignment.txt")
  # Other memories than the chip's have a colour.
  sizes = re.findall(r"^allocation \d+: size (\d+), (\w+)", path.read_text(), re.M)
  found = collections.Counter()
  for size, kind in sizes:
    found[kind] += int(size)
  return {
    "temporary_bytes": found["preallocated"],
    "argument_bytes": found["parameter"],
  }


def compiled(name: str, config, devices: list) -> dict:
  """Facts of a program, compiled to the end."""
  began = time.monotonic()
  lowered = lower(name, config, devices)
  with tempfile.TemporaryDirectory() as place:
    folder = os.environ.get(DUMP, place)
    # Its own `memory_analysis` says 0 of what a step keeps.
    options = {"xla_dump_to": folder}
    if devices[0].platform != "tpu":
      options["xla_gpu_autotune_level"] = 0  # there is no GPU to time it on
    program = lowered.compile(compiler_options=options)
    memory = memory_of(pathlib.Path(folder))
  return facts_of(program.as_text(), memory, time.monotonic() - began)


def hlo_only(arguments: list[str], name: str) -> dict:
  """Facts of a program, from what its compiler writes before it generates code."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as place:
    folder, said = pathlib.Path(place), pathlib.Path(place, "stderr")
    with said.open("w") as stderr:
      process = subprocess.Popen(
        [sys.executable, __file__, *arguments, f"--program={name}"],
        env=os.environ | {DUMP: place},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
      )
    try:
      while True:
        # The last file that is written before: the report of the memory.
        reports = list(folder.glob("*after_optimizations-memory-usage-report.txt"))
        ended = process.poll() is not None
        if reports and (ended or time.time() - reports[0].stat().st_mtime > 2):
          break
        if ended:
          lines = said.read_text().strip().splitlines() or ["it said nothing"]
          raise ValueError(f"{name} could not be compiled: {lines[-1][:500]}")
        time.sleep(0.5)
      (path,) = folder.glob("*after_optimizations.txt")
      return facts_of(path.read_text(), memory_of(folder), time.monotonic() - began)
    finally:
      process.kill()
      process.wait()


def seconds_of_a_step(results: dict) -> dict[str, float]:
  """{method: seconds a loader batch takes on one device, by the cycles}.

  Two half steps and the feed; what devices exchange is not in it.
  """
  programs, chip = results["programs"], results["about"]["chip"]

  def cycles(name):
    return sum(programs[name]["cycles"].values())

  return {
    name: (2 * cycles(name) + cycles("feed")) / CLOCK[chip]
    for name in ("uniform", "l2w")
    if {name, "feed"} <= programs.keys() and cycles(name)
  }


def messages(facts: dict) -> tuple[int, int]:
  """(number, bytes) of all collectives of a program."""
  found = facts["collectives"].values()
  return sum(x["number"] for x in found), sum(x["bytes"] for x in found)


def read_earlier(path: pathlib.Path) -> dict:
  """Results of --out.

  Raises:
    ValueError: another kind of file.
  """
  try:
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["about"]["topology"] and isinstance(results["programs"], dict):
      return results
  except (ValueError, TypeError, KeyError):
    pass
  raise ValueError(f"--against={path} is no result of --topology and --out")


def table(results: dict, earlier: dict | None = None) -> str:
  """The results as text; with earlier ones, as ratios to them too."""
  chip = results["about"]["chip"]
  memory = HBM[chip] if chip in HBM else GPUS[chip].memory / 2**30
  lines = [
    f"{'program':9}{'compile s':>10}{'temp MiB':>10}{'memory':>8}{'exchanged':>18}"
    f"{'M cycles':>10}"
    f"{'conv':>6}{'reduce':>7}{'elem.':>6}{'copies':>7}{'gather':>7}{'loops':>6}"
    f"{'padded':>8}{'again':>6}{'fusions':>9}"
  ]
  for name, facts in results["programs"].items():
    cycles = facts["cycles"]
    total = sum(cycles.values())
    number, exchanged = messages(facts)
    used = (facts["temporary_bytes"] + facts["argument_bytes"]) / (memory * 2**30)
    kinds = "convolutions", "reductions", "elementwise", "copies", "gathers"
    parts = [cycles.get(kind, 0) for kind in kinds] + [facts["cycles_in_loops"]]
    shares = [f"{part / total:.0%}" if total else "–" for part in parts]
    lines.append(
      f"{name:9}{facts['compile_seconds']:10.0f}"
      f"{facts['temporary_bytes'] / 2**20:10.1f}{used:>8.1%}"
      f"{f'{number}, {exchanged / 2**20:.2f} MiB':>18}"
      f"{f'{total / 1e6:.3f}' if total else '–':>10}"
      f"{shares[0]:>6}{shares[1]:>7}{shares[2]:>6}{shares[3]:>7}{shares[4]:>7}"
      f"{shares[5]:>6}"
      f"{facts['padded']:8.2f}{facts['rematerialised']:6}{facts['fusions']:9,}"
    )
    before = (earlier or {}).get("programs", {}).get(name)
    if before:
      pairs = {
        "temporary memory": (facts["temporary_bytes"], before["temporary_bytes"]),
        "cycles": (total, sum(before["cycles"].values())),
        "messages": (number, messages(before)[0]),
        "fusions": (facts["fusions"], before["fusions"]),
        "compile time": (facts["compile_seconds"], before["compile_seconds"]),
      }
      told = [f"{what} {a / b:.2f}" for what, (a, b) in pairs.items() if a and b]
      lines.append(f"{'':9}of the earlier: {', '.join(told)}")
  for name, seconds in seconds_of_a_step(results).items():
    rate = results["about"]["batch"] / seconds
    lines.append(
      f"{name}: {1e3 * seconds:.2f} ms a loader batch by the estimated cycles, "
      f"{rate:,.0f} images/s, without what is exchanged"
    )
  lines.append(f"memory: temporary and arguments, of {memory:.0f} GiB of a {chip}")
  return "\n".join(lines)


def main(arguments=None) -> None:
  """The command line."""
  arguments = sys.argv[1:] if arguments is None else arguments
  parser = config_parser(__doc__)
  parser.add_argument("--topology", default="v5e:2x4", help="default %(default)s")
  parser.add_argument("--program", choices=PROGRAMS, help="this one alone")
  parser.add_argument("--hlo-only", action="store_true", help="generate no code")
  parser.add_argument("--out", type=pathlib.Path, help="where results are stored")
  parser.add_argument(
    "--against", type=pathlib.Path, help="results of --out before"
  )
  options = parser.parse_args(arguments)
  # Nothing is run, and a TPU that is here would be taken.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  with one_line_errors():
    if options.out:
      files.make_folder(options.out.parent)  # told before anything compiles
    earlier = options.against and read_earlier(options.against)
    devices = describe(options.topology)
    chip = options.topology.partition(":")[0]

    def config():
      return l2w.load_config(options.config, dict(options.set))

    parallel.check_batch(config().batch, len(devices), config().microbatches)
    results = {
      "about": {
        "config": options.config,
        "overrides": dict(options.set),
        "topology": options.topology,
        "chip": chip,
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "batch": config().batch,
        "jax": jax.__version__,
      },
      "programs": {},
    }
    for name in [options.program] if options.program else PROGRAMS:
      print(f"compiling {name} ...", file=sys.stderr, flush=True)
      if options.hlo_only:
        own = [x for x in arguments if x != "--hlo-only"]
        results["programs"][name] = hlo_only(own, name)
      else:
        results["programs"][name] = compiled(name, config(), devices)
      if options.out:
        files.write(options.out, json.dumps(results, indent=2) + "\n")
    print(table(results, earlier))
    for key, given in results["about"].items():
      if earlier and earlier["about"].get(key) != given:
        print(f"{key}: {given}, earlier {earlier['about'].get(key)}")


if __name__ == "__main__":
  main()
