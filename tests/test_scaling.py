"""The launch lines of docs/clusters.md parse; what scaling.py counts, it counts."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))

import scaling  # noqa: E402

PAGE = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
# Reads lists of arguments and prints what the command line makes of them.
PARSE = """
import json, sys
from l2w_jax import main
from l2w_jax.run import command, parallel
from l2w_jax import config as config_lib
for line in json.load(sys.stdin):
  for flag in ("distributed", "coordinator", "process_id", "num_processes"):
    main.FLAGS[flag].unparse()
  for flag in [name for name in main.FLAGS if name.startswith("config.")]:
    delattr(main.FLAGS, flag)
  sys.argv = ["main", *line]  # where overrides of a config are looked for
  rest = command._parse(sys.argv)[1:]
  config = config_lib.validate(main.FLAGS.config)
  for devices in (1, 8, 32):
    parallel.check_batch(config.batch, devices, config.microbatches)
  print(json.dumps([rest, main.FLAGS.workdir, main.FLAGS.distributed,
                    main.FLAGS.process_id, config.to_dict()]))
"""


def launch_lines() -> list[list[str]]:
  """Arguments behind `-m l2w_jax.main` of every command on the page."""
  blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
  lines = []
  for line in "".join(blocks).splitlines():
    words = shlex.split(line)
    inner = [
      w.removeprefix("--command=") for w in words if w.startswith("--command=")
    ]
    words = shlex.split(inner[0]) if inner else words
    if "l2w_jax.main" in words:
      lines.append(words[words.index("l2w_jax.main") + 1 :])
  return lines


def test_every_launch_line_is_understood():
  lines = launch_lines()
  done = subprocess.run(
    [sys.executable, "-c", PARSE],
    input=json.dumps(lines),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  parsed = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(parsed) == len(lines) >= 7
  assert all(not rest and workdir for rest, workdir, *_ in parsed)
  assert [p[2] for p in parsed].count(True) == 2  # Slurm and the pod slice
  assert [p[3] for p in parsed] == [None, None, None, 0, 1, 0, None, None, None]
  assert parsed[2][4]["microbatches"] == 64
  assert parsed[-1][4]["model"]["dtype"] == "bfloat16"


def test_collectives_are_counted_and_the_longest_chain_of_them():
  def twice(x):
    y = jax.lax.psum(x, "d")
    z = jax.lax.psum(2 * x, "d")  # beside the first
    return jax.jit(lambda y: jax.lax.all_gather(y + z, "d"))(y)

  def body(x):
    return twice(x) + jax.lax.pmean(x, "d")

  traced = jax.make_jaxpr(body, axis_env=[("d", 4)])(jnp.ones(3))
  assert scaling.chain(traced.jaxpr) == (4, 2)
  hidden = jax.make_jaxpr(
    lambda x: jax.lax.fori_loop(0, 3, lambda _, y: twice(y)[0], x),
    axis_env=[("d", 4)],
  )(jnp.ones(3))
  with pytest.raises(ValueError, match="inside scan cannot be counted"):
    scaling.chain(hidden.jaxpr)


def test_bytes_are_those_of_all_results():
  assert scaling.compiled_collectives("""
  %a = (f32[8]{0}, f32[2,3]{1,0}) all-reduce(%b, %c), channel_id=1
  ROOT %d = f32[16,4]{1,0} all-gather(%e), dimensions={0}
  %f = f32[] all-reduce-start(%g)
  %h = f32[8]{0} add(%a, %b)""") == [56, 256, 4]


def test_more_devices_wait_longer():
  rows = scaling.predict(
    {"flops_per_device": 1e12, "devices": 8, "bytes": 1e8, "compiled": 100}
  )
  assert len(rows) == 3 * len(scaling.LINKS)
  h100 = [row for row in rows if row["machine"].startswith("H100")]
  # 50 ms of computing, 1.75e8 bytes at 450 GB/s, and 100 times 15 µs.
  assert h100[0]["compute_ms"] == pytest.approx(50)
  assert h100[0]["bytes_ms"] == pytest.approx(0.3889, rel=1e-3)
  assert h100[0]["latency_ms"] == pytest.approx(1.5)
  assert h100[0]["growing_batch"] == pytest.approx(50 / 51.889, rel=1e-3)
  assert h100[0]["same_batch"] > h100[1]["same_batch"] > h100[2]["same_batch"]


@pytest.mark.slow
def test_a_digits_step_is_counted():
  done = subprocess.run(
    [
      sys.executable,
      "experiments/scaling.py",
      "count",
      "configs/digits_plain.py",
      "--devices",
      "2",
      "--set",
      "model.num_exits=2",
      "--set",
      "model.growth_factors=(1,)",
      "--set",
      "model.bottleneck_factors=(1,)",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
  assert facts["written"] > facts["compiled"] >= facts["chain"] > 0
  # Pseudo gradient, ∇ L_meta and real gradient, and a little beside them.
  assert 12 * facts["parameters"] < facts["bytes"] < 15 * facts["parameters"]
