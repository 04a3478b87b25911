r"""Speed, operations, memory and compile time of the step, for one config.

    python experiments/benchmark.py configs/cifar100_msdnet.py \
        --set batch=128 --out cifar100.json

compiles a forward pass and the half steps of uniform, of l2w, of l2w with a
look-ahead of the classifiers, and of l2w between two updates of its WPN. It times
them in turn on the same random images, and prints and stores a table. Each piece is
stored when it is done, and compiled programs in a folder beside the file; the same
command again does only what is missing. --remat adds both steps with model.remat,
--pytorch the same forward pass and steps in plain PyTorch (pytorch_step.py, pip
install "l2w_jax[torch]"), run in turn with ours, and --compile-only times nothing:
it needs no memory for the images, so any size can be asked. --topology=v5e:2x4
(or h100:1x8) asks the compiler of a TPU (or GPU) that need not be there, with the
options of topology.py.

A step is two calls of one program, its half step. Milliseconds and operations,
which are XLA's own count, are those of both; memory is what the program needs
beside its arguments, and differs from one kind of device to another. Fusions are
the pieces of machine code that XLA makes beside convolutions and products, and most
of the time of compiling. The device's peak is that of a large matrix product and of
a large convolution, in the same run.
"""

from __future__ import annotations

import json
import operator
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from options import config_parser, shape_and_classes

import l2w_jax as l2w
from l2w_jax.method import allocation
from l2w_jax.run import backend, files, parallel
from l2w_jax.run.command import one_line_errors
from l2w_jax.training.step import make_half_step

STEPS_PER_EPOCH = 1000
INTERVAL = 100
WITHOUT = "l2w, no WPN update"
STEPS = {  # program: what it changes in the config
  "uniform": {"method": "uniform", "model.remat": False},
  "l2w": {"method": "l2w", "model.remat": False},
  "l2w, classifiers": {
    "method": "l2w",
    "model.remat": False,
    "meta.look_ahead": "classifiers",
  },
  WITHOUT: {"method": "l2w", "model.remat": False},
}
REMAT = {
  f"{name}, remat": STEPS[name] | {"model.remat": True}
  for name in ("uniform", "l2w")
}
PYTORCH = {f"{name}, PyTorch": name for name in ("forward", "uniform", "l2w")}


class Program:
  """A forward pass or a half step, compiled, with what it needs to be timed."""

  def __init__(self, config, name="l2w"):
    self.config = config
    shape, classes = shape_and_classes(self.config)
    self.backbone = l2w.build_backbone(self.config.model, classes, shape)
    half_step = make_half_step(
      self.backbone, self.config, steps_per_epoch=STEPS_PER_EPOCH
    )

    def forward(state, batch):
      return state, self.backbone.apply(state.variables, batch["image"])

    def step(state, train_half, meta_half):
      key = jnp.zeros(2, jnp.uint32)  # of methods that draw weights
      return half_step(state, train_half, meta_half, key, name != WITHOUT)

    self.calls = 1 if name == "forward" else 2
    size = self.config.batch // self.calls
    inputs = {
      "image": jax.ShapeDtypeStruct((size, *shape), jnp.result_type(float)),
      "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    began = time.perf_counter()
    lowered = jax.jit(
      forward if name == "forward" else step, donate_argnums=0
    ).lower(jax.eval_shape(self.fresh_state), *self.calls * [inputs])
    traced = time.perf_counter()
    self.compiled = lowered.compile()
    ended = time.perf_counter()
    memory = self.compiled.memory_analysis()
    self.facts = {
      "trace_seconds": traced - began,
      "compile_seconds": ended - traced,
      "flops": self.calls * self.compiled.cost_analysis()["flops"],
      "fusions": self.compiled.as_text().count(" fusion("),
      "temporary_bytes": memory.temp_size_in_bytes,
      "argument_bytes": memory.argument_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }

  def fresh_state(self):
    """The state before the first step."""
    return l2w.init_state(jax.random.key(0), self.backbone, self.config)

  def start(self, batch):
    """Makes the program ready to be run on a batch, from the first state."""
    middle = self.config.batch // 2
    first, second = (
      jax.tree.map(lambda x, rows=rows: x[rows], batch)
      for rows in (slice(middle), slice(middle, None))
    )
    self.inputs = (
      [(batch,)] if self.calls == 1 else [(first, second), (second, first)]
    )
    self.state = self.fresh_state()

  def __call__(self):
    """One step, or one forward pass: what each call returned beside the state."""
    results = []
    for inputs in self.inputs:
      self.state, result = self.compiled(self.state, *inputs)
      results.append(result)
    return results

  def run(self):
    """(seconds until a step has run, seconds until its calls returned)."""
    jax.block_until_ready((self.state, self.inputs))
    began = time.perf_counter()
    results = self()
    returned = time.perf_counter()
    jax.block_until_ready((self.state, results))
    return time.perf_counter() - began, returned - began


class PyTorch:
  """pytorch_step.py in a process of its own, with the weights of a program."""

  def __init__(self, program: Program, batch):
    check_pytorch(program.config)
    self._folder = tempfile.TemporaryDirectory()
    self._path = pathlib.Path(self._folder.name)
    self._program, self._batch = program, batch
    config, state = program.config, program.fresh_state()
    self._save(
      "batch",
      {
        "image": np.asarray(batch["image"]).transpose(0, 3, 1, 2),
        "label": np.asarray(batch["label"], np.int64),
      },
    )
    self._save("weights", torch_state(state.variables))
    self._save("wpn", torch_state({"params": state.wpn_params}))
    (self._path / "settings.json").write_text(
      json.dumps(
        {
          **config.optimizer,
          "meta": dict(config.meta),
          "device": {"gpu": "cuda"}.get(jax.default_backend(), "cpu"),
          "proportions": np.asarray(
            allocation.proportions(config.meta.q, program.backbone.num_exits)
          ).tolist(),
        }
      )
    )
    script = pathlib.Path(__file__).with_name("pytorch_step.py")
    self._process = subprocess.Popen(
      [sys.executable, script, self._path],
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    self.about = self._answer()

  def _save(self, name, arrays):
    np.savez(self._path / f"{name}.npz", **arrays)

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      raise ValueError("the PyTorch process died; its own message is above")
    return json.loads(line)

  def _ask(self, word):
    self._process.stdin.write(f"{word}\n")
    self._process.stdin.flush()
    return self._answer()

  def run(self, name):
    """Seconds of `name` (forward, uniform or l2w) in PyTorch."""
    seconds = self._ask(name)["seconds"]
    time.sleep(0.3)  # its threads spin for a while when they have nothing to do
    return seconds

  def differences(self) -> dict[str, float]:
    """Largest difference of one l2w step, over the largest entry.

    Of the losses, weights, meta loss and meta-gradient of each half, and of the
    new parameters and running statistics; from the same weights.
    """
    self._ask("l2w?")
    with np.load(self._path / "l2w.npz") as arrays:
      theirs = dict(arrays)
    self._program.start(self._batch)
    pairs = {}
    for half, metrics in enumerate(self._program()):
      for name in ("losses", "weights", "meta_loss"):
        pairs[f"{name} of half {half + 1}"] = [(metrics[name], theirs[name][half])]
      pairs[f"meta-gradient of half {half + 1}"] = [
        (x, theirs[f"gradient.{key}"][half])
        for key, x in torch_state({"params": metrics["wpn_gradient"]}).items()
      ]
    state = self._program.state
    pairs["backbone"] = [
      (x, theirs[f"network.{key}"])
      for key, x in torch_state(state.variables).items()
      if not key.endswith("num_batches_tracked")
    ]
    pairs["WPN"] = [
      (x, theirs[f"wpn.{key}"])
      for key, x in torch_state({"params": state.wpn_params}).items()
    ]

    def largest(arrays):
      return max(float(np.max(np.abs(x))) for x in arrays)

    return {
      name: largest(a - b for a, b in arrays) / largest(a for a, _ in arrays)
      for name, arrays in pairs.items()
    }

  def close(self):
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()
    self._folder.cleanup()


def check_pytorch(config) -> None:
  """Raises ValueError for a config that pytorch_step.py does not cover."""
  wanted = {
    "model.name": "msdnet",
    "method": "l2w",
    "meta.inputs": "loss",
    "label_smoothing": 0,
  }
  for key, value in wanted.items():
    given = operator.attrgetter(key)(config)
    if given != value:
      raise ValueError(
        f"--pytorch is written for {key}={value!r}, not "
        f"{given!r}; leave it out or change the key"
      )


def torch_state(variables) -> dict[str, np.ndarray]:
  """The state_dict of pytorch_step.py's modules, which are named as ours."""
  leaves = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
  }
  axes = {4: (3, 2, 0, 1), 2: (1, 0)}
  state = {}
  for (_, *owner, leaf), x in traverse_util.flatten_dict(variables).items():
    name = ".".join([*owner, leaves[leaf]])
    state[name] = np.asarray(x).transpose(axes.get(x.ndim))
    if leaf == "var":
      state[".".join([*owner, "num_batches_tracked"])] = np.zeros((), np.int64)
  return state


def peaks() -> dict[str, float]:
  """FLOP/s of a large matrix product and a large convolution, best of five."""
  large = jax.default_backend() != "cpu"
  n, b = (8192, 256) if large else (2048, 16)
  matrix = jax.random.normal(jax.random.key(0), (n, n))
  images = jax.random.normal(jax.random.key(1), (b, 56, 56, 128))
  kernel = jax.random.normal(jax.random.key(2), (3, 3, 128, 128))

  def convolve(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def best(function, *arguments):
    function = jax.jit(function).lower(*arguments).compile()
    function(*arguments).block_until_ready()
    seconds = []
    for _ in range(5):
      began = time.perf_counter()
      function(*arguments).block_until_ready()
      seconds.append(time.perf_counter() - began)
    return min(seconds)

  return {
    "matrix_product": 2 * n**3 / best(jnp.matmul, matrix, matrix),
    "convolution": 2 * b * 56**2 * 9 * 128**2 / best(convolve, images, kernel),
  }


def random_batch(config) -> dict[str, jax.Array]:
  """Images and labels of a loader batch, always the same."""
  shape, classes = shape_and_classes(config)
  rng = np.random.default_rng(0)
  return {
    "image": jnp.asarray(
      rng.standard_normal((config.batch, *shape), np.float32),
      jnp.result_type(float),
    ),
    "label": jnp.asarray(rng.integers(0, classes, config.batch), jnp.int32),
  }


def times(
  programs: dict[str, Program], batch, rounds: int, pytorch: PyTorch | None = None
) -> dict[str, dict]:
  """Seconds of each program, run in turn `rounds` times after two warm-ups."""
  for program in programs.values():
    program.start(batch)
  jobs = {name: program.run for name, program in programs.items()}
  if pytorch is not None:
    jobs |= {
      name: lambda word=word: (pytorch.run(word), None)
      for name, word in PYTORCH.items()
    }
  measured = {name: [] for name in jobs}
  for i in range(rounds + 2):
    for name, job in jobs.items():
      result = job()
      if i >= 2:
        measured[name].append(result)
  return {
    name: {"seconds": [s for s, _ in runs], "host_seconds": [h for _, h in runs]}
    for name, runs in measured.items()
  }


def run(
  config_file,
  overrides,
  path,
  *,
  remat=False,
  compile_only=False,
  pytorch=False,
  rounds=5,
):
  """The stored results, after doing what they lack."""
  wanted = {"forward": STEPS["uniform"]} | STEPS | (REMAT if remat else {})
  configs = {  # a wrong one is refused before anything compiles
    name: l2w.load_config(config_file, overrides | changes)
    for name, changes in wanted.items()
  }
  for config in configs.values():
    parallel.check_batch(config.batch, 1, config.microbatches)
  if pytorch:
    check_pytorch(configs["l2w"])
  # Compilation is to be timed, not read; what has been timed may be read.
  cache = path.with_suffix(".cache")
  if not path.exists():
    shutil.rmtree(cache, ignore_errors=True)
  jax.config.update("jax_compilation_cache_dir", str(cache.resolve()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  device = jax.devices()[0]
  about = {
    "config": config_file,
    "overrides": overrides,
    "device": f"{device.platform} {device.device_kind}",
    "jax": jax.__version__,
  }
  results = {"about": about, "compiled": {}}
  if path.exists():
    results = json.loads(path.read_text())
    if results["about"] != about:
      raise ValueError(
        f"{path} holds results of {results['about']}, not of "
        f"{about}; name another file with --out"
      )

  def store():
    files.write(path, json.dumps(results, indent=2) + "\n")

  programs = {}
  timed = [] if compile_only else [*wanted, *(PYTORCH if pytorch else ())]
  missing = [name for name in timed if name not in results.get("programs", [])]
  for name, config in configs.items():
    if missing or name not in results["compiled"]:
      print(f"compiling {name} ...", file=sys.stderr, flush=True)
      program = Program(config, name)
      results["compiled"].setdefault(name, program.facts)
      store()
      if missing:
        programs[name] = program
  if missing:
    print(f"timing {rounds} rounds ...", file=sys.stderr, flush=True)
    batch = random_batch(programs["l2w"].config)
    other = PyTorch(programs["l2w"], batch) if pytorch else None
    results |= {
      "peak": peaks(),
      "times": times(programs, batch, rounds, other),
      "batch": programs["l2w"].config.batch,
      "programs": timed,
    }
    if other is not None:
      results["pytorch"] = other.about | {"differences": other.differences()}
      other.close()
    store()
  return results


def table(results) -> str:
  """The results as text: minimum over the rounds, then the median."""
  compiled, lines = results["compiled"], []
  base = compiled["uniform"]
  lines.append(
    f"{'program':32}{'GFLOP':>10}{'ratio':>7}{'temp MiB':>10}"
    f"{'ratio':>7}{'trace s':>9}{'compile s':>10}"
    f"{'fusions':>9}"
  )
  for name, facts in compiled.items():
    lines.append(
      f"{name:32}{facts['flops'] / 1e9:10.1f}"
      f"{facts['flops'] / base['flops']:7.2f}"
      f"{facts['temporary_bytes'] / 2**20:10.0f}"
      f"{facts['temporary_bytes'] / base['temporary_bytes']:7.2f}"
      f"{facts['trace_seconds']:9.1f}{facts['compile_seconds']:10.1f}"
      f"{facts['fusions']:9}"
    )
  if "times" not in results:
    return "\n".join(lines)
  measured, batch = results["times"], results["batch"]
  best = {name: min(x["seconds"]) for name, x in measured.items()}
  lines.append("")
  lines.append(
    f"{'program':32}{'ms min':>10}{'median':>8}{'images/s':>10}"
    f"{'/uniform':>9}{'/forward':>9}{'GFLOP/s':>9}{'of conv':>8}"
    f"{'host %':>8}"
  )
  for name, x in measured.items():
    facts = compiled.get(name)
    speed = f"{'':17}"
    if facts:
      rate = facts["flops"] / best[name]
      share = rate / results["peak"]["convolution"]
      speed = f"{rate / 1e9:9.1f}{100 * share:7.0f}%"
    host = ""
    if name not in PYTORCH:
      host = statistics.median(x["host_seconds"]) / statistics.median(x["seconds"])
      host = f"{100 * host:7.2f}%"
    lines.append(
      f"{name:32}{1e3 * best[name]:10.1f}"
      f"{1e3 * statistics.median(x['seconds']):8.1f}"
      f"{batch / best[name]:10.0f}{best[name] / best['uniform']:9.2f}"
      f"{best[name] / best['forward']:9.2f}{speed}{host}".rstrip()
    )
  mean = (best["l2w"] + (INTERVAL - 1) * best[WITHOUT]) / INTERVAL
  lines.append(
    f"l2w, meta.interval={INTERVAL}: {mean / best['uniform']:.3f} of uniform on "
    "average"
  )
  lines.append(
    "peak GFLOP/s: "
    + ", ".join(
      f"{kind} {rate / 1e9:.0f}" for kind, rate in results["peak"].items()
    )
  )
  if "pytorch" in results:
    other = results["pytorch"]
    lines.append(
      f"PyTorch {other['torch']}, {other['threads']} threads, over ours: "
      + ", ".join(
        f"{word} {best[name] / best[word]:.2f}" for name, word in PYTORCH.items()
      )
    )
    lines.append(
      "one l2w step from the same weights, largest difference over "
      "largest entry: "
      + ", ".join(f"{name} {x:.0e}" for name, x in other["differences"].items())
    )
  return "\n".join(lines)


def main(arguments=None) -> None:
  """The command line."""
  parser = config_parser(__doc__)
  parser.add_argument(
    "--out",
    default="benchmark.json",
    type=pathlib.Path,
    help="where results are stored (default %(default)s)",
  )
  parser.add_argument(
    "--remat", action="store_true", help="also both steps with model.remat"
  )
  parser.add_argument(
    "--pytorch", action="store_true", help="also the same in plain PyTorch"
  )
  parser.add_argument(
    "--compile-only",
    action="store_true",
    help="operations, memory and compile time only",
  )
  parser.add_argument(
    "--rounds",
    default=5,
    type=int,
    help="times each program runs (default %(default)s)",
  )
  arguments = sys.argv[1:] if arguments is None else arguments
  if any(x.partition("=")[0] == "--topology" for x in arguments):
    import topology

    return topology.main(arguments)
  options = parser.parse_args(arguments)
  with one_line_errors():
    backend.check()
    if options.rounds < 1:
      raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    files.make_folder(options.out.parent)  # told before anything compiles
    print(
      table(
        run(
          options.config,
          dict(options.set),
          options.out,
          remat=options.remat,
          compile_only=options.compile_only,
          pytorch=options.pytorch,
          rounds=options.rounds,
        )
      )
    )


if __name__ == "__main__":
  main()
