"""N devices give what one device gives: states, metrics and scores.

CPU devices are virtual and their number is fixed when JAX starts, so the
comparison is this file, run as a program with four of them.
"""
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax import evaluate, parallel, train
from l2w_jax.data import resident, sources

ROOT = pathlib.Path(__file__).parents[1]
STEPS, BATCH, NUM_TRAIN = 2, 16, 40
# What is planted in the source of the step, and where a device then errs.
REAL_GRADIENT = (
    "train_step",
    "gradient = devices.mean(meta.backbone_gradient(pull, weights))\n"
    "    state = _real_step(optimizer, state, gradient, batch_stats, "
    "learning_rate)\n    state = state.replace(wpn_params",
    "gradient = meta.backbone_gradient(pull, weights)\n"
    "    state = _real_step(optimizer, state, gradient, batch_stats, "
    "learning_rate)\n    state = state.replace(wpn_params")
BUGS = {
    "real gradient not averaged": REAL_GRADIENT,
    "pseudo gradient not averaged": (
        "meta", "return sgd_step(average(backbone_gradient(pull, weights)))",
        "return sgd_step(backbone_gradient(pull, weights))"),
    "meta-gradient not averaged": (
        "meta", "return (average(meta_loss), aux), average(gradient)",
        "return (average(meta_loss), aux), gradient"),
    "centred on each device": (
        "weighting", "mean = average(output.mean(keepdims=True))",
        "mean = output.mean(keepdims=True)"),
    "allocated on each device": (
        "train_step", "everyone = devices.gather(jax.lax.stop_gradient(\n"
        "          losses_lib.confidence(logits)))\n"
        "      allocated = allocation.allocate(everyone, proportions)",
        "own = jax.lax.stop_gradient(losses_lib.confidence(logits))\n"
        "      allocated = devices.gather("
        "allocation.allocate(own, proportions))"),
}


def make_config(center_over="all", method="l2w") -> ConfigDict:
  config = config_lib.defaults("msdnet")
  config.method, config.batch, config.epochs = method, BATCH, 3
  # The second batch is new to every device, the shifts are not symmetric.
  config.data.update(augment="shift", pad=1)
  config.model.update(
      num_exits=2, step_mode="even", channels=4, growth=4, bottleneck=False,
      growth_factors=(1,), bottleneck_factors=(1,), classifier_width=4)
  config.meta.update(center_over=center_over, hidden=5, learning_rate=0.01)
  config.evaluate.batch = 7
  return config_lib.validate(config)


def make_dataset(config: ConfigDict) -> sources.Dataset:
  digits = sources.load(config.data)
  return digits._replace(train=sources.Split(
      digits.train.images[:NUM_TRAIN], digits.train.labels[:NUM_TRAIN]))


def make_backbone(config: ConfigDict) -> l2w_jax.models.Backbone:
  return l2w_jax.build_backbone(config.model, 10, (8, 8, 1))


def run_steps(config: ConfigDict, num_devices: int):
  """(replicas of the state [D ...], sums of weights) after two steps."""
  dataset, backbone = make_dataset(config), make_backbone(config)
  with jax.enable_x64(True):
    state = l2w_jax.init_state(jax.random.key(0), backbone, config)
    state = jax.tree.map(
        lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)
    run = train.make_block_fn(
        backbone, config, jax.random.key(1),
        resident.steps_per_epoch(NUM_TRAIN, BATCH), num_devices)
    state, block = run(*(
        parallel.replicate(x, num_devices)
        for x in (state, resident.arrays(dataset), np.int32(STEPS))))
    if num_devices == 1:
      state = jax.tree.map(lambda x: x[None], state)
    block = parallel.first(block, num_devices)
    return jax.device_get(state), jax.device_get(block)


def relative_difference(ours, theirs) -> float:
  """The largest difference of an array, relative to its largest value."""
  return max(
      float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-300))
      for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs),
                      strict=True) if a.dtype != bool and a.size)


def compare(config: ConfigDict, num_devices: int, one) -> dict:
  """How far `num_devices` are from one device."""
  state, block = run_steps(config, num_devices)
  one_state, one_block = one
  return {
      "replicas_equal": all(
          x[d].tobytes() == x[0].tobytes()
          for x in jax.tree.leaves(state) for d in range(num_devices)),
      "moved": relative_difference(
          one_state.params,
          jax.tree.map(lambda x: x[None], make_backbone(config).init(
              jax.random.split(jax.random.key(0))[0])["params"])),
      "state": relative_difference(
          jax.tree.map(lambda x: x[0], state),
          jax.tree.map(lambda x: x[0], one_state)),
      "metrics": relative_difference(block, one_block)}


def compare_scores(num_devices: int) -> bool:
  """Whether a split whose size no batch divides scores the same."""
  config = make_config()
  dataset, backbone = make_dataset(config), make_backbone(config)
  scores = []
  for n in (1, num_devices):
    variables = parallel.replicate(backbone.init(jax.random.key(0)), n)
    score = evaluate.compile_scorer(variables, backbone, dataset, config, n)
    scores.append(score(variables, dataset.test))
  for a, b in zip(*scores, strict=True):
    # A sample's confidence depends on its own pixels; batches of another size
    # may be summed in another order.
    np.testing.assert_allclose(a, b, rtol=1e-5)
  return len(scores[1].confidence) == len(dataset.test.labels)


def main():
  results = {}
  for center_over in ("exits", "batch", "all"):
    config = make_config(center_over)
    one = run_steps(config, 1)
    for n in (2, 4) if center_over == "all" else (4,):
      results[f"{center_over} {n}"] = compare(config, n, one)
  uniform = make_config(method="uniform")
  results["uniform 2"] = compare(uniform, 2, run_steps(uniform, 1))
  results["scores"] = compare_scores(4)
  from test_train_step import plant
  for name, bug in BUGS.items():
    with pytest.MonkeyPatch.context() as patch:
      plant(patch, [bug])
      patch.setattr(train, "step_body",
                    sys.modules["l2w_jax.train_step"].step_body)
      results[name] = compare(config, 2, one)
  print(json.dumps(results))


@pytest.fixture(scope="module")
def results():
  # Compilation is most of the time; code that is optimised less still adds the
  # same float64 numbers.
  flags = ("--xla_force_host_platform_device_count=4 "
           "--xla_backend_optimization_level=0")
  done = subprocess.run(
      [sys.executable, __file__], capture_output=True, text=True, cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
      timeout=300)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case", ["exits 4", "batch 4", "all 2", "all 4", "uniform 2"])
def test_devices_agree_with_one(results, case):
  result = results[case]
  assert result["replicas_equal"]
  # Float64: sums over a batch in another order, through two steps.
  assert result["state"] < 1e-12 and result["metrics"] < 1e-12
  assert result["moved"] > 1e-3  # there was something to agree about


@pytest.mark.parametrize("bug", BUGS)
def test_a_missing_collective_is_seen(results, bug):
  assert results[bug]["state"] > 1e-9


def test_replicas_part_where_the_real_gradient_is_not_averaged(results):
  assert not results["real gradient not averaged"]["replicas_equal"]


def test_scores_do_not_depend_on_the_number_of_devices(results):
  assert results["scores"] is True


def test_rows_are_split_and_merged_in_order():
  x = np.arange(24).reshape(12, 2)
  split = parallel.split_rows(x, 3)
  assert split.shape == (3, 4, 2)
  np.testing.assert_array_equal(parallel.merge_rows(split, 3), x)
  assert parallel.split_rows(x, 1) is x and parallel.merge_rows(x, 1) is x


@pytest.mark.parametrize("batch, num_devices, message", [
    (129, 1, "multiple of 2, such as 128"),
    (1026, 4, "on 4 device.* multiple of 8, such as 1024"),
    (2, 4, "multiple of 8, such as 8")])
def test_a_batch_that_does_not_split_is_refused(batch, num_devices, message):
  with pytest.raises(ValueError, match=message):
    parallel.check_batch(batch, num_devices)


@pytest.mark.parametrize("batch, num_devices", [(2, 1), (128, 1), (1024, 8)])
def test_a_batch_that_splits_is_not(batch, num_devices):
  parallel.check_batch(batch, num_devices)


def test_no_more_devices_than_there_are():
  available = jax.local_device_count()
  assert parallel.num_local_devices(0) == available
  with pytest.raises(ValueError, match=f"has {available} cpu device.*or 0"):
    parallel.num_local_devices(available + 1)


if __name__ == "__main__":
  main()
