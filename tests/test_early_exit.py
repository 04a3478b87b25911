"""Networks that stop: answers equal the simulated ones, image for image."""

import json
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from l2w_jax import config as config_lib
from l2w_jax import models
from l2w_jax.data import sources
from l2w_jax.exits import early_exit
from l2w_jax.exits import policy as exit_policy
from l2w_jax.run import directory


def make_network(name="msdnet", measure="probability", **overrides):
  config = config_lib.defaults(name)
  small = {"channels": 4, "growth": 4, "classifier_width": 8}
  small |= {
    "msdnet": {
      "num_exits": 3,
      "growth_factors": (1, 2),
      "bottleneck_factors": (1, 2),
    },
    "ranet": {},
  }[name] | overrides
  config.model.update(small)
  backbone = models.build_backbone(config.model, 5, (8, 8, 3))
  variables = backbone.init(jax.random.key(0))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: (x * rng.uniform(0.5, 1.5, x.shape)).astype(x.dtype), variables
  )
  return early_exit.EarlyExit(
    backbone,
    variables,
    np.zeros(backbone.num_exits),
    [120.0] * 3,
    [60.0] * 3,
    measure,
  )


def make_images(num, seed=2):
  # Of many contrasts, so that confidences differ.
  rng = np.random.default_rng(seed)
  contrast = rng.uniform(0.05, 1, (num, 1, 1, 1))
  return (rng.integers(0, 256, (num, 8, 8, 3)) * contrast).astype(np.uint8)


def thresholds_for(network, images, q=0.75):
  """A little below the confidence that was found: nobody stands on a threshold."""
  _, confidence = network.simulate(images)
  return exit_policy.find_thresholds(
    confidence,
    exit_policy.proportions(q, network.backbone.num_exits),
    calibration="held_out",
  ) - np.float32(1e-5)


def assert_equals_simulation(network, images):
  answers = network.predict(images)
  prediction, confidence = network.simulate(images)
  exits = np.asarray(exit_policy.exits_taken(confidence, network.thresholds))
  rows = np.arange(len(images))
  np.testing.assert_array_equal(answers.exit, exits + 1)
  np.testing.assert_array_equal(answers.label, prediction[rows, exits])
  # On some CPUs an image's place in its batch moves the last bit.
  np.testing.assert_allclose(answers.confidence, confidence[rows, exits], rtol=3e-7)
  return exits


@pytest.fixture(scope="module")
def network():
  return make_network()


@pytest.mark.parametrize("num", [1, 3, 8, 31, 32, 33, 67, 1000])
def test_answers_equal_the_simulated_ones(network, num):
  images = make_images(num)
  own = network.with_thresholds(thresholds_for(network, images))
  exits = assert_equals_simulation(own, images)
  if num > 60:
    assert set(exits) == {0, 1, 2}


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_everyone_may_leave_at_one_exit(network, stop):
  thresholds = np.where(np.arange(3) < stop, np.inf, -np.inf)
  images = make_images(150)
  answers = network.with_thresholds(thresholds).predict(images)
  np.testing.assert_array_equal(answers.exit, stop + 1)
  prediction, _ = network.simulate(images)
  np.testing.assert_array_equal(answers.label, prediction[:, stop])


@pytest.mark.parametrize("measure", ["margin", "entropy", "patience"])
def test_every_measure_stops_as_simulated(measure):
  network, images = make_network(measure=measure), make_images(100)
  thresholds = thresholds_for(network, images)
  if measure == "patience":
    thresholds = [2.0, 2.0, 2.0]
  assert_equals_simulation(network.with_thresholds(thresholds), images)


@pytest.mark.slow
def test_ranet_stops_as_simulated():
  network, images = make_network("ranet"), make_images(80)
  own = network.with_thresholds(thresholds_for(network, images))
  exits = assert_equals_simulation(own, images)
  assert len(set(exits)) > 3


def test_stages_give_the_logits_of_the_whole_network():
  network, images = make_network("msdnet"), make_images(16)
  prediction, confidence = network.simulate(images)
  x = jnp.asarray((images.astype(np.float32) - 120) / 60)
  logits = network.backbone.apply(network.variables, x)
  expected_prediction, expected = exit_policy.confidence(logits)
  np.testing.assert_array_equal(prediction, expected_prediction)
  # Float32, other fusions, through 40 layers and logits of up to 50.
  np.testing.assert_allclose(confidence, expected, rtol=1e-4)


def test_one_image_is_answered_by_one_program(network, compilations):
  images = make_images(40)
  own = network.with_thresholds(thresholds_for(network, images))
  own.answer(images[0])
  before, exits = compilations(), set()
  for image in images:
    answer = own.answer(image)
    (found,) = zip(answer.label, answer.exit, answer.confidence, strict=True)
    prediction, confidence = own.simulate_one(image)
    k = int(exit_policy.exits_taken(confidence[None], own.thresholds)[0])
    assert found == (prediction[k], k + 1, confidence[k])
    exits.add(k)
  assert exits == {0, 1, 2}
  # exits_taken is compiled once, outside the network.
  assert compilations() - before <= 8


def test_compilations_stay_few():
  network = make_network()
  images = make_images(300)
  network = network.with_thresholds(thresholds_for(network, images))
  for num in (1, 2, 3, 5, 8, 13, 21, 32, 100, 256, 300):
    network.predict(images[:num])
  assert max(network.compilations()) <= np.log2(32) + 1
  before = network.compilations()
  network.predict(images[:257])
  assert network.compilations() == before


def test_late_stages_run_full(network):
  images = make_images(640)
  own = network.with_thresholds(thresholds_for(network, images))
  runs = []

  def counted(k, program):
    def run(state):
      runs.append(k)
      return program(state)

    return run

  network.warm_up(len(images))
  own._programs = [counted(k, p) for k, p in enumerate(own._programs)]
  halves = np.split(own.predict(images).exit, 2)
  for k in range(3):
    assert runs.count(k) == sum(-(-(half > k).sum() // 32) for half in halves)


@pytest.mark.parametrize(
  "images",
  [
    np.zeros((4, 9, 8, 3), np.uint8),
    np.zeros((4, 8, 8, 3), np.float32),
    np.zeros((0, 8, 8, 3), np.uint8),
    np.zeros((8, 8, 3), np.uint8),
  ],
  ids=["size", "float", "none", "one"],
)
def test_images_of_another_kind_are_refused(network, images):
  with pytest.raises(ValueError, match=r"takes uint8 images \[N 8 8 3\]"):
    network.predict(images)


def test_thresholds_that_do_not_fit_are_refused(network):
  for bad in ([0.5, 0.5], [np.nan, 0.5, 0.5]):
    with pytest.raises(ValueError, match=r"thresholds must be \[3\]"):
      network.with_thresholds(bad)


def scaled(network, factor):
  return early_exit.EarlyExit(
    network.backbone,
    jax.tree.map(lambda x: x * factor, network.variables),
    [0.5, 0.5, 0.5],
    [120.0] * 3,
    [60.0] * 3,
  )


def test_nan_weights_are_refused(network):
  with pytest.raises(ValueError, match="not finite in .* such as batch_stats/"):
    scaled(network, np.float32(np.nan))


def test_nan_confidences_are_no_answer(network):
  huge = scaled(network, np.float32(1e30))
  with pytest.raises(ValueError, match="NaN for 2 of 2 images"):
    huge.predict(make_images(2))
  with pytest.raises(ValueError, match="NaN for 1 of 1 images"):
    huge.answer(make_images(1)[0])


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished.workdir, tmp_path / "run")


def test_a_run_is_loaded_with_its_thresholds(workdir, tiny_config):
  network = early_exit.load(workdir)
  test = sources.load(tiny_config.data).test
  answers = network.predict(test.images)
  results = json.loads((workdir / "results.json").read_text())
  chosen = results["chosen"]
  assert np.mean(answers.label == test.labels) == pytest.approx(chosen["accuracy"])
  np.testing.assert_allclose(
    np.bincount(answers.exit - 1) / 360, chosen["exits"], rtol=1e-6
  )
  assert network.class_names == tuple("0123456789")


def test_the_script_that_measures_takes_a_run(workdir, tiny_config):
  script = runpy.run_path(str(ROOT / "experiments/early_exit.py"))
  network, images = script["of_run"](str(workdir))
  assert network.class_names == tuple("0123456789")
  np.testing.assert_array_equal(images, sources.load(tiny_config.data).test.images)


def test_what_does_not_fit_the_run_is_refused(workdir, tiny_config):
  path = workdir / "results.json"
  results = json.loads(path.read_text())
  directory.write_results(workdir, results | {"step": 3})
  with pytest.raises(ValueError, match="step 3, .* step 16; run --mode=evaluate"):
    early_exit.load(workdir)
  fewer = {"num_classes": 7, "class_names": list("abcdefg")}
  fewer["chosen"] = results["chosen"] | {
    "classes": results["chosen"]["classes"][:7]
  }
  directory.write_results(workdir, results | fewer)
  with pytest.raises(ValueError, match="is sound, but .*of another network"):
    early_exit.load(workdir)
  chosen = results["chosen"] | {"thresholds": [0.1, "-inf"]}
  for edited in ({"std": [9.0]}, {"chosen": chosen}, {"confidence": "margin"}):
    path.write_text(json.dumps(results | edited))
    with pytest.raises(ValueError, match="digest differs.*--mode=evaluate"):
      early_exit.load(workdir)
  path.write_text(
    json.dumps(results, sort_keys=True)
  )  # the same, otherwise written
  early_exit.load(workdir)
  path.write_text("{}")
  with pytest.raises(ValueError, match="cannot use .*lacks .*--mode=evaluate"):
    early_exit.load(workdir)
  path.unlink()
  with pytest.raises(ValueError, match="missing; run .*--mode=evaluate"):
    early_exit.load(workdir)


def test_an_answer_says_all_that_is_known_of_it(network):
  images = make_images(70)
  own = early_exit.EarlyExit(
    network.backbone,
    network.variables,
    np.asarray(thresholds_for(network, images)),
    network.mean,
    network.std,
    class_names=("ant", "bee", "cat", "dog", "emu"),
    temperatures=[0.5, 2.0, 4.0],
  )
  answers = own.predict(images)
  exits = answers.exit - 1
  assert len(answers) == 70 and set(exits) == {0, 1, 2}
  x = jnp.asarray((images.astype(np.float32) - 120) / 60)
  logits = network.backbone.apply(network.variables, x)[np.arange(70), exits]
  np.testing.assert_allclose(answers.logits, logits, rtol=1e-4, atol=1e-3)
  plain, scaled_ = answers.probabilities(), answers.probabilities(scaled=True)
  np.testing.assert_allclose(plain, jax.nn.softmax(answers.logits), rtol=1e-5)
  np.testing.assert_allclose(plain.max(1), answers.confidence, rtol=1e-5)
  np.testing.assert_allclose(
    scaled_,
    jax.nn.softmax(answers.logits / np.float32([0.5, 2, 4])[exits][:, None]),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(answers.macs, own.backbone.macs[exits])
  classes, likely = answers.top(2)
  np.testing.assert_array_equal(classes[:, 0], answers.label)
  np.testing.assert_array_equal(likely, np.sort(plain, 1)[:, :-3:-1])
  assert answers.class_name[0] == own.class_names[answers.label[0]]
  np.testing.assert_array_equal(own.predict_proba(images, scaled=True), scaled_)
  one = own.answer(images[0])
  np.testing.assert_allclose(one.logits[0], answers.logits[0], rtol=1e-4)
  assert one.macs[0] == own.backbone.macs[one.exit[0] - 1]


def test_a_target_is_met_for_a_network_and_for_a_call(network):
  images = make_images(200)
  _, confidence = network.simulate(images)
  correct = np.arange(3) == np.full((200, 1), 2)  # so going on is worth its cost
  own = early_exit.EarlyExit(
    network.backbone,
    network.variables,
    [np.inf] * 3,
    network.mean,
    network.std,
    calibration=early_exit.Calibration(confidence, correct),
  )
  limit = 0.7 * own.backbone.macs[-1]
  for answers in (
    own.predict(images, target=f"macs:{limit}"),
    own.with_target(f"macs:{limit}").predict(images),
  ):
    assert 0.5 * limit < answers.macs.mean() <= limit
  assert set(own.predict(images).exit) == {3}
  assert set(own.predict(images, thresholds=[-np.inf] * 3).exit) == {1}
  with pytest.raises(ValueError, match="a target or thresholds, not both"):
    own.predict(images, target="q:1", thresholds=[0] * 3)
  with pytest.raises(ValueError, match="did you mean accuracy:0.93"):
    own.predict(images, target="accuracy:93")
  with pytest.raises(ValueError, match="without scores of a calibration split"):
    network.predict(images, target="q:1")
