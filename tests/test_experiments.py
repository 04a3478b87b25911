"""Every command of the page of experiments is one that would start."""

import importlib
import json
import pathlib
import re
import runpy
import shlex
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from l2w_jax import compare
from l2w_jax import config as config_lib
from l2w_jax.run import directory

DEFINED = re.compile(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?([\w-]+)"')


def commands(page: str) -> list[str]:
  blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  return [line for line in lines if line.strip()]


PAGE = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
OTHERS = [
  line
  for path in sorted([ROOT / "README.md", *ROOT.glob("*/*.md")])
  if path != ROOT / "experiments/README.md"
  for line in commands(path.read_text(encoding="utf-8"))
  if line.startswith(("python experiments/", "l2w-jax compare "))
]


def check(command: str) -> None:
  command = command.replace("l2w-jax compare", "python -m l2w_jax.compare")
  python, *words = shlex.split(command)
  assert python == "python"
  if words[0] == "-m":
    script = ROOT / (words[1].replace(".", "/") + ".py")
    words = words[2:]
  else:
    script, words = ROOT / words[0], words[1:]
  if script == ROOT / "experiments/compare.py":
    script = pathlib.Path(compare.__file__)
  source = script.read_text(encoding="utf-8")
  if "options import config_parser" in source:
    source += (ROOT / "experiments/options.py").read_text(encoding="utf-8")
  if any(word.startswith("--topology=") for word in words):
    source += (ROOT / "experiments/topology.py").read_text(encoding="utf-8")
  defined = set(DEFINED.findall(source))
  flags, overrides = {}, {}
  for word in words:
    if not word.startswith("--"):
      continue  # a run directory
    name, _, value = word[2:].partition("=")
    if name.startswith("config."):
      overrides[name.removeprefix("config.")] = compare.literal(value)
    else:
      flags[name] = value
  takes_config = "define_config(" in source
  assert flags.keys() <= defined | ({"config"} if takes_config else set())
  assert not overrides or "config" in flags
  if "config" in flags:
    config = config_lib.load_config(flags["config"], overrides)
    if script.name == "compare.py":
      runs = compare.plan(
        config,
        compare.parse_methods(flags["methods"]),
        int(flags.get("seeds", 3)),
        pathlib.Path(flags["workdir"]),
      )
      assert len({path for _, path, _ in runs}) == len(runs)


def test_there_is_a_command_for_every_published_item():
  found = "\n".join(commands(PAGE))
  for config in (
    "cifar100_msdnet.py:5",
    "cifar100_msdnet.py:7",
    "cifar10_msdnet.py:5",
    "cifar10_msdnet.py:7",
    "imagenet_msdnet.py:4",
    "imagenet_msdnet.py:6",
    "imagenet_msdnet.py:7",
    "cifar100_ranet.py",
    "cifar10_ranet.py",
    "imagenet_ranet.py",
    "digits.py",
    "cifar100_small.py",
  ):
    assert f"--config=configs/{config}" in found
  for method in (
    "fixed:",
    "random",
    "easy_early",
    "equilibrium",
    "distill",
    "meta.objective=plain",
    *(
      f"l2w:meta.{key}="
      for key in ("epsilon", "q", "inputs", "center_over", "interval", "hidden")
    ),
  ):
    assert method in found
  assert "--mode=latency" in found


@pytest.mark.parametrize("command", commands(PAGE) + OTHERS)
def test_every_command_would_start(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  check(command)


@pytest.mark.parametrize(
  "command, error",
  [
    ("python experiments/compare.py --methods=l2w --seed=3", AssertionError),
    ("python experiments/nothing.py", OSError),
    ("python experiments/compare.py --config=configs/digit.py", ValueError),
    (
      "python experiments/compare.py --config=configs/digits.py --methods=l2v"
      " --workdir=w",
      ValueError,
    ),
    (
      "python experiments/compare.py --config=configs/digits.py --methods=l2w"
      " --workdir=w --config.meta.epsilom=1",
      ValueError,
    ),
    ("python -m l2w_jax.main --mod=latency", AssertionError),
  ],
)
def test_a_command_that_would_not_start_is_seen(command, error, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(error):
    check(command)


def test_endpoints_of_a_few_runs():
  table = runpy.run_path(str(ROOT / "experiments/endpoint.py"))["table"]

  def run(accuracy):
    budgeted = [{"q": q / 20, "accuracy": accuracy} for q in range(1, 40)]
    return {
      "budgeted": budgeted,
      "anytime": [{"exit": 1, "accuracy": accuracy - 0.1}],
    }

  runs = {
    "l2w": {seed: run(0.52 + 0.01 * seed) for seed in (0, 1)},
    "uniform": {seed: run(0.51) for seed in (0, 1, 2)},
  }
  lines = table(runs, "uniform").splitlines()
  assert lines[4] == ("| uniform | 3 | 51.00 ± 0.00 |  |  |  | 51.00 51.00 51.00 |")
  # Two seeds: no interval.
  assert lines[5] == "| l2w | 2 | 52.50 ± 0.71 | +1.50 | – | – | +1.00 +2.00 |"
  assert "**exit 1**" in lines
  runs["l2w"][2] = run(0.54)
  line = table(runs, "uniform").splitlines()[5]
  assert line.startswith(
    "| l2w | 3 | 53.00 ± 1.00 | +2.00 | [-0.48, +4.48] | 0.074 |"
  )


def test_endpoints_of_what_cannot_be_compared_are_refused(tmp_path):
  endpoint = runpy.run_path(str(ROOT / "experiments/endpoint.py"))
  kept = ROOT / "experiments/results/populations"
  for name in ("uniform-10", "l2w-10", "l2w-11"):
    shutil.copy(kept / f"{name}.json", tmp_path)
  assert set(endpoint["read"](tmp_path)) == {"uniform", "l2w"}
  with pytest.raises(ValueError, match="no ARM-SEED/results.json"):
    endpoint["read"](kept.parent)  # of several settings
  (tmp_path / "l2w-11").mkdir()
  path = tmp_path / "l2w-11/results.json"
  results = json.loads((tmp_path / "l2w-11.json").read_text())

  def told(change):
    directory.write_results(path.parent, results | change)
    with pytest.raises(ValueError, match=f"cannot use {tmp_path}/l2w-11") as error:
      endpoint["read"](tmp_path)
    return str(error.value)

  assert "it is a second one of l2w-11" in told({})
  (tmp_path / "l2w-11.json").unlink()
  assert "its run is not over" in told({"complete": False})
  other = [2 * x for x in results["macs"]]
  assert f"its exits cost {other}" in told({"macs": other})
  by_patience = [
    {"patience": 1.0, **{k: v for k, v in entry.items() if k != "q"}}
    for entry in results["budgeted"]
  ]
  assert "no values of q" in told({"budgeted": by_patience})
  path.write_text(path.read_text()[:-99])
  with pytest.raises(ValueError, match=f"cannot use {path}"):
    endpoint["read"](tmp_path)
  path.unlink()
  (tmp_path / "uniform-10.json").rename(tmp_path / "uniform-12.json")
  with pytest.raises(ValueError, match="l2w and uniform have no seed in common"):
    endpoint["table"](endpoint["read"](tmp_path), "uniform")


def test_sets_are_made_of_cifar_alone(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "experiments")
  read = importlib.import_module("make_sets").read
  fine = " ".join(importlib.import_module("make_sets").COARSE.values()).split()
  arrays = {
    f"{split}_{what}": value
    for split in ("train", "test")
    for what, value in (
      ("images", np.zeros((200, 32, 32, 3), np.uint8)),
      ("labels", np.arange(200) % 100),
    )
  }
  path = tmp_path / "x.npz"
  path.write_bytes(b"no zip")
  with pytest.raises(ValueError, match="is not an .npz file"):
    read(path)
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match="is not CIFAR-100.*and 0, 1, 2 …"):
    read(path)
  np.savez(path, **arrays, class_names=sorted(fine))
  with pytest.raises(ValueError, match="has 200 train images, and.* 15,000"):
    read(path)


def test_known_weights_are_of_the_populations(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "experiments")
  rules = importlib.import_module("known_weights")
  for rule in (rules.expected, rules.learned):
    weights = rule(jnp.zeros((4, 4)), None, jnp.array([0, 19, 20, 29]))
    np.testing.assert_allclose(weights.mean(axis=1), 1, rtol=1e-6)
    cifar, digits = weights[:2], weights[2:]
    assert (cifar[0] == cifar[1]).all() and (digits[0] == digits[1]).all()
    assert digits[0, 0] > cifar[0, 0] and digits[0, 3] < cifar[0, 3]
