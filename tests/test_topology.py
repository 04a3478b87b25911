"""What a TPU's and a GPU's compiler make of the programs; skipped without them.

Each program is compiled in a process of its own, as libtpu can be loaded once.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "experiments"))
import topology  # noqa: E402

pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
needs_cuda = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="the wheels of jax[cuda13] are not installed",
)


def compile_for(tmp_path, config, program, described, *extra, **overrides):
  """What topology.py stores of a program."""
  out = tmp_path / "out.json"
  flags = [f"--set={key}={value}" for key, value in overrides.items()]
  done = subprocess.run(
    [sys.executable, "experiments/benchmark.py", f"configs/{config}.py", *flags]
    + [f"--topology={described}", f"--program={program}", f"--out={out}", *extra],
    cwd=ROOT,
    capture_output=True,
    text=True,
    # As a user would, at the compiler's own level of optimisation.
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  return found["about"], found["programs"][program]


def number(facts, kind):
  return facts["collectives"].get(kind, {"number": 0})["number"]


@needs_libtpu
@pytest.mark.parametrize("described, hosts", [("v5e:2x4", 1), ("v5e:4x4", 4)])
def test_the_feed_makes_no_copy_of_the_set_and_has_no_loop(
  tmp_path, described, hosts
):
  about, facts = compile_for(tmp_path, "cifar100_msdnet", "feed", described)
  assert (about["devices"], about["hosts"]) == (8 * max(1, hosts // 2), hosts)
  # A re-laid-out copy of 45,000 images took 526 MiB and 7 M cycles.
  assert facts["temporary_bytes"] < 8 * 2**20
  assert sum(facts["cycles"].values()) < 500_000
  assert facts["padded"] < 1.5


@pytest.mark.parametrize(
  "described, hosts",
  [
    pytest.param("v5e:2x4", 1, marks=needs_libtpu),
    pytest.param("v5e:4x4", 4, marks=needs_libtpu),
    pytest.param("h100:1x8", 1, marks=needs_cuda),
    pytest.param("a100:2x4", 2, marks=needs_cuda),
  ],
)
def test_a_small_step_exchanges_one_message_for_each_batchnorm(
  tmp_path, described, hosts
):
  about, facts = compile_for(
    tmp_path, "digits_plain", "l2w", described, **TINY | {"batch": 2048}
  )
  assert about["hosts"] == hosts
  backbone = topology.l2w.build_backbone(
    topology.l2w.load_config(str(ROOT / "configs/digits_plain.py"), TINY).model,
    10,
    (8, 8, 1),
  )
  stats = topology.jax.eval_shape(backbone.init, topology.jax.random.key(0))
  norms = len(topology.jax.tree.leaves(stats["batch_stats"])) // 2
  # Forward at Θ and at Θ̂, their derivatives and tangents, and the gradients.
  assert number(facts, "all-reduce") < 6 * norms
  assert number(facts, "all-gather") <= 2  # of confidences, to allocate
  assert facts["temporary_bytes"] < 64 * 2**20
  assert facts["rematerialised"] == 0
  assert facts["padded"] < 4


@needs_libtpu
def test_before_code_is_generated_all_but_cycles_is_known(tmp_path):
  asked = tmp_path, "digits_plain", "uniform", "v5e:2x4"
  overrides = TINY | {"batch": 2048}
  _, whole = compile_for(*asked, **overrides)
  _, early = compile_for(*asked, "--hlo-only", **overrides)
  assert whole["cycles"] and not early["cycles"]
  assert early["temporary_bytes"] > 2**20  # activations of 128 images at least
  for name in ("temporary_bytes", "argument_bytes", "collectives", "fusions"):
    assert early[name] == whole[name]


@needs_libtpu
@pytest.mark.parametrize("described, hosts", [("v5e:2x4", 1), ("v5e:4x4", 4)])
def test_the_scorer_and_the_exported_stages_compile(tmp_path, described, hosts):
  for program, gathers in ("scorer", 1), ("stages", 0):
    about, facts = compile_for(tmp_path, "digits_plain", program, described, **TINY)
    assert about["hosts"] == hosts
    assert facts["temporary_bytes"] < 64 * 2**20
    assert facts["padded"] < 4
    assert number(facts, "all-gather") <= gathers


@needs_libtpu
def test_messages_in_a_loop_count_as_often_as_it_turns(tmp_path):
  asked = tmp_path, "digits_plain", "uniform", "v5e:2x4", "--hlo-only"
  _, whole = compile_for(*asked, **TINY | {"batch": 2048})
  _, parts = compile_for(*asked, **TINY | {"batch": 4096, "microbatches": 2})
  # All but the gradient's are of BatchNorm, and in parts each part has them.
  assert number(parts, "all-reduce") > 1.7 * number(whole, "all-reduce")


MODULE = """HloModule toy

%body (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %twice = f32[8,128]{1,0:T(8,128)} add(%x, %x), "estimated_cycles":"100"
}

%condition (x: f32[8,128]) -> pred[] {
  %y = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (a: f32[8,64]) -> f32[8,128] {
  %a = f32[8,64]{1,0:T(8,128)} parameter(0)
  %sum = f32[8,64]{1,0:T(8,128)} all-reduce(%a), to_apply=%add
  %rows = f32[8,128]{1,0:T(8,128)} gather(%sum), "estimated_cycles":"700"
  ROOT %loop = f32[8,128]{1,0:T(8,128)} while(%rows), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_a_table_says_the_share_of_memory_and_where_cycles_go():
  memory = {"temporary_bytes": 3 * 2**30, "argument_bytes": 2**30}
  facts = topology.facts_of(MODULE, memory, 1.0)
  assert facts["cycles"] == {"gathers": 700, "elementwise": 300}
  assert facts["cycles_in_loops"] == 300
  assert facts["collectives"] == {"all-reduce": {"number": 1, "bytes": 8 * 64 * 4}}
  assert facts["padded"] == 4 / 3  # the first two arrays have half of their lanes
  about = {"chip": "v5e", "batch": 128}
  said = topology.table({"about": about, "programs": {"toy": facts}}).split("\n")
  row = said[1].split()
  assert row[:4] == ["toy", "1", "3072.0", "25.0%"]
  assert row[-9:] == ["0%", "0%", "30%", "0%", "70%", "30%", "1.33", "0", "0"]


def test_results_of_another_kind_are_refused_before_anything_compiles(tmp_path):
  path = tmp_path / "benchmark.json"
  path.write_text('{"about": {}, "programs": ["forward"]}')
  with pytest.raises(SystemExit):
    topology.main(["configs/digits.py", f"--against={path}"])


@pytest.mark.parametrize("unknown", ["v9:2x4", "h100", "gpu:1x8", "h100:0x8"])
def test_an_unknown_topology_is_one_clear_error(unknown):
  with pytest.raises(
    ValueError, match=f"={unknown} must be CHIP:SIZES, .*h100:1x8"
  ):
    topology.describe(unknown)


@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is not None,
  reason="the wheels of jax[cuda13] are installed",
)
def test_a_gpu_without_its_wheels_is_one_clear_error():
  with pytest.raises(ValueError, match=r"h100:1x8 .* pip install 'jax\[cuda13\]=="):
    topology.describe("h100:1x8")
