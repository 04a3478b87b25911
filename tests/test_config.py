"""Every config file loads; every wrong key or value is one clear error."""

import ast
import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.method import estimators
from l2w_jax.run import parallel

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / "configs/digits.py")
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))


def load(**overrides):
  return config_lib.load_config(
    DIGITS, {key.replace("__", "."): x for key, x in overrides.items()}
  )


def image_shape(config):
  if config.data.source == "digits":
    return (8, 8, 1)
  return (224, 224, 3) if config.model.stem == "imagenet" else (32, 32, 3)


@pytest.mark.parametrize("method", ["", ":l2w", ":uniform"])
@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_every_config_loads_is_locked_and_builds(file, method):
  config = l2w_jax.load_config(f"{file}{method}")
  assert config.method == (method[1:] or "l2w")
  assert config.is_locked and config.model.is_locked
  assert config_lib.validate(config) is config
  l2w_jax.build_backbone(config.model, 10, image_shape(config))


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_every_config_says_which_batch_fills_a_tpu(file):
  text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
  chips, batch = re.search(
    r"on (one chip|\d+) take batch=(\d+) \(docs/tpu\.md\)", text
  ).groups()
  chips = 1 if chips == "one chip" else int(chips)
  given = l2w_jax.load_config(str(file)).batch
  assert parallel.fuller_batch(int(batch), chips) is None
  assert parallel.fuller_batch(given, chips) == int(batch)
  full = re.search(r"It fills a TPU's lanes on (.*);", text)
  for number in re.findall(r"\d+", full[1] if full else ""):
    assert parallel.fuller_batch(given, int(number)) is None


def test_there_is_a_config_for_every_published_data_set():
  names = {file.stem for file in CONFIG_FILES}
  assert names >= {
    "digits",
    *(
      f"{data}_{model}"
      for data in ("cifar10", "cifar100", "imagenet")
      for model in ("msdnet", "ranet")
    ),
  }


@pytest.mark.parametrize("method", ["l2w", "uniform"])
@pytest.mark.parametrize(
  "name, size, key, values",
  [
    ("cifar10_msdnet", 32, "num_exits", (5, 7)),
    ("cifar100_msdnet", 32, "num_exits", (5, 7)),
    ("imagenet_msdnet", 224, "step", (4, 6, 7)),
  ],
)
def test_every_published_network_is_an_argument(name, size, key, values, method):
  for value in values:
    config = l2w_jax.load_config(f"{ROOT}/configs/{name}.py:{value}-{method}")
    assert config.model[key] == value and config.method == method
    assert config.model.num_exits in (5, value)
    l2w_jax.build_backbone(config.model, 10, (size, size, 3))
  with pytest.raises(ValueError, match="got '3-l2w'"):
    l2w_jax.load_config(f"{ROOT}/configs/{name}.py:3-l2w")


def test_imagenet_is_streamed_as_published():
  for name in ("msdnet", "ranet"):
    data = l2w_jax.load_config(f"{ROOT}/configs/imagenet_{name}.py").data
    assert (data.augment, data.image_size, data.calibration) == (
      "crop_flip",
      224,
      50_000,
    )
    assert len(data.mean) == len(data.std) == 3


def test_without_calibration_thresholds_must_be_the_released_ones():
  nothing = {"data__source": "folder:some", "data__calibration": 0}
  with pytest.raises(ValueError, match="calibration=0 holds nothing out.*released"):
    load(**nothing)
  load(**nothing, evaluate__calibration="released")
  # These bring a split of their own, or may.
  load(data__source="digits", data__calibration=0)
  load(data__source="npz:some.npz", data__calibration=0)


@pytest.mark.parametrize(
  "value, name, parts",
  [
    ("grad", "grad", 1),
    ("jvp", "jvp", 1),
    ("first_order", "first_order", 1),
    ("finite_difference", "finite_difference", 1),
    ("unroll:1", "unroll", 1),
    ("unroll:12", "unroll", 12),
  ],
)
def test_an_estimator_has_a_name_and_parts(value, name, parts):
  load(meta__estimator=value)
  assert config_lib.estimator(value) == (name, parts)
  assert name in {"grad", "unroll", *estimators.SLOPES}


@pytest.mark.parametrize(
  "value",
  ["", "unroll", "unroll:", "unroll:0", "unroll:-1", "unroll:x", "jvp:2", "Grad"],
)
def test_other_estimators_are_refused(value):
  with pytest.raises(ValueError, match="meta.estimator must be one.*'unroll:T'"):
    load(meta__estimator=value)


def test_first_order_needs_weights_that_do_not_cancel_it():
  with pytest.raises(
    ValueError, match="meta.estimator has 'first_order'.*exits or"
  ):
    load(meta__estimator="first_order", meta__center_over="batch")
  diagnosed = {"meta__center_over": "batch", "diagnose__every": 10}
  with pytest.raises(ValueError, match="diagnose.estimators has 'first_order'"):
    load(**diagnosed)
  load(**diagnosed, diagnose__estimators=("jvp",))


UNREAD = [
  {"method": "uniform", "meta.estimator": "unroll:3", "microbatches": 2},
  {
    "method": "random",
    "meta.estimator": "first_order",
    "meta.center_over": "batch",
  },
  {"method": "distill", "baseline.exit_weights": (1.0, 2.0)},
  {"meta.center_over": "batch", "diagnose.half": 63},
]


@pytest.mark.parametrize("overrides", UNREAD)
def test_what_is_not_read_is_not_refused(overrides):
  config_lib.check_method(config_lib.load_config(DIGITS, overrides), num_exits=4)


@pytest.mark.parametrize(
  "key, value, says",
  [
    ("method", "focal", "config.method must be one of 'l2w'.*got 'focal'"),
    ("meta.center_over", "row", "config.meta.center_over must be one of.*'row'"),
    ("meta.inputs", "losses", "config.meta.inputs must be one of.*'losses'"),
    ("meta.objective", "all", "config.meta.objective must be one of.*'all'"),
    ("meta.estimator", "exact", "config.meta.estimator must be one of.*'exact'"),
    ("sync", "none", "config.sync must be one of.*'none'"),
    ("microbatches", 0, "config.microbatches must be a whole number at least 1"),
    ("meta.interval", 0, "config.meta.interval must be a whole number at least 1"),
  ],
)
def test_a_step_is_not_made_of_what_was_changed_after_validation(key, value, says):
  config = load()
  config_lib.check_method(config, num_exits=4)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=says):
    config_lib.check_method(config, num_exits=4)


def test_a_step_needs_what_its_estimator_needs():
  config = load()
  config.meta.update(estimator="first_order", center_over="batch")
  with pytest.raises(ValueError, match="'first_order'.*exits or all"):
    config_lib.check_method(config, num_exits=4)


@pytest.mark.parametrize("exit_weights", [(), (1.0,), (1.0, 2.0, 3.0, 4.0, 5.0)])
def test_fixed_weights_are_one_for_each_exit(exit_weights):
  config = load(method="fixed", baseline__exit_weights=exit_weights)
  with pytest.raises(ValueError, match="each of the 4 exits; got ") as error:
    config_lib.check_method(config, num_exits=4)
  assert str(exit_weights) in str(error.value)
  config.baseline.exit_weights = (1.0, 2.0, 3.0, 4.0)
  config_lib.check_method(config, num_exits=4)


def test_a_step_does_not_ask_about_data_or_diagnosis():
  config = load(method="uniform", data__source="npz:some.npz")
  config.data.calibration, config.diagnose.every = 0, 10
  config_lib.check_method(config, num_exits=4)
  with pytest.raises(ValueError, match="diagnose.every=10 looks at meta-gradients"):
    config_lib.validate(config)


@pytest.mark.parametrize("model", config_lib.MODEL_KEYS)
def test_defaults_are_valid(model):
  config_lib.validate(config_lib.defaults(model))


def test_a_config_survives_json():
  config = load()
  again = config_lib.from_dict(config.to_dict())
  assert config_lib.differences(config, again) == []
  changed = load(meta__q=0.5, log__every=7)
  assert config_lib.differences(changed, config, ("log",)) == [
    "meta.q is 0.5 here and 0.75 there"
  ]


def test_overrides():
  config = load(model__num_exits=7, meta__epsilon=0.5, data__augment="none")
  assert config.model.num_exits == 7
  assert config.meta.epsilon == 0.5
  assert config.data.augment == "none"


@pytest.mark.parametrize(
  "key, value",
  [
    ("optimizer.learning_rate", 1),
    ("meta.epsilon", 0),
    ("meta.epsilon", 1),
    ("meta.q", 2),
    ("model.growth_factors", [1, 2, 4]),
    ("model.growth_factors", (1, 2, 4)),
    ("label_smoothing", 0),
    ("meta.interval", 100),
    ("num_devices", 0),
  ],
)
def test_ints_for_floats_and_lists_for_tuples_are_accepted(key, value):
  config = config_lib.load_config(DIGITS, {key: value})
  parent, _, name = key.rpartition(".")
  found = (config[parent] if parent else config)[name]
  assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
  "key, value, says",
  [
    ("meta.q", 0, "above 0, got 0"),
    ("meta.q", -1.5, "above 0, got -1.5"),
    ("meta.q", float("inf"), "got inf"),
    ("meta.q", float("nan"), "got nan"),
    ("meta.epsilon", -0.1, "at least 0 and at most 1, got -0.1"),
    ("meta.epsilon", 1.1, "at most 1, got 1.1"),
    ("meta.center_over", "col", "one of 'exits', 'batch', 'all', got 'col'"),
    ("meta.inputs", "conf", "one of 'loss', 'confidence', 'both', got 'conf'"),
    ("method", "sgd", "one of 'l2w', 'uniform', .*got 'sgd'"),
    ("model.name", "resnet", "unknown model 'resnet'.*'msdnet'"),
    ("model.stem", "mnist", "one of 'cifar', 'imagenet'"),
    ("model.growth_factors", (), "a tuple of whole numbers"),
    ("model.growth_factors", (1, 0), "a tuple of whole numbers"),
    ("model.growth_factors", (1, True), "a tuple of whole numbers"),
    ("model.growth_factors", 4, "of the type of"),
    ("model.num_exits", 0, "at least 1, got 0"),
    ("model.reduction", 1.5, "at most 1"),
    ("epochs", 0, "at least 1, got 0"),
    ("epochs", 2.5, "of the type of 30, got 2.5"),
    ("epochs", "3", "of the type of 30, got '3'"),
    ("epochs", None, "a whole number at least 1, got None"),
    ("epochs", True, "of the type of 30, got True"),
    ("meta.epsilon", True, "of the type of 0.8, got True"),
    ("meta.epsilon", "all", "of the type of 0.8, got 'all'"),
    ("model.bottleneck", 1, "of the type of True, got 1"),
    ("batch", 1, "at least 2"),
    ("seed", -1, "at least 0"),
    ("seed", 2**32, "at most 4294967295, got 4294967296"),
    ("data.seed", 2**32, "at most 4294967295, got 4294967296"),
    ("label_smoothing", 1, "at most 0.999"),
    ("optimizer.learning_rate", 0, "above 0"),
    ("optimizer.momentum", 1, "at most 0.9999"),
    ("optimizer.weight_decay", -1e-4, "at least 0"),
    ("meta.interval", 0, "at least 1"),
    ("evaluate.calibration", "test", "one of 'held_out', 'released'"),
    ("data.source", "", "a non-empty string"),
    ("log.seconds", 0, "above 0"),
    ("checkpoint.keep", 0, "at least 1"),
    ("num_devices", -1, "at least 0"),
  ],
)
def test_a_value_out_of_range_is_named(key, value, says):
  with pytest.raises(ValueError, match=says) as error:
    config_lib.load_config(DIGITS, {key: value})
  assert f"config.{key}" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "key, says",
  [
    ("epoch", "config.epoch does not exist; did you mean config.epochs?"),
    ("model.num_exit", "did you mean config.model.num_exits?"),
    ("meta.zzz", "config.meta.zzz does not exist; keys of config.meta: center"),
    ("metta.q", "config.metta does not exist; did you mean config.meta?"),
  ],
)
def test_an_unknown_key_brings_the_closest_and_all_others(key, says):
  for check in (
    lambda: config_lib.load_config(DIGITS, {key: 3}),
    lambda: config_lib.check_key(key),
  ):
    with pytest.raises(ValueError) as error:
      check()
    assert says in str(error.value)
    assert "; " in str(error.value) and "keys of config" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_below_a_value_does_not_exist():
  for check in (
    lambda: load(epochs__x=3),
    lambda: config_lib.check_key("epochs.x"),
  ):
    with pytest.raises(ValueError, match="config.epochs.* does not exist"):
      check()


def test_check_key_knows_the_keys_of_every_model():
  for model, keys in config_lib.MODEL_KEYS.items():
    for name in ("name", *keys):
      config_lib.check_key(f"model.{name}")
    assert set(keys) | {"name"} == set(config_lib.defaults(model).model)


@pytest.mark.parametrize(
  "key, value, says",
  [
    ("model", {}, "config.model.name is missing"),
    ("model", {"name": "msdnet"}, "config.model.num_exits is missing"),
    ("meta", {}, "config.meta.epsilon is missing"),
    ("meta", 3, r"config.meta holds keys of its own.* such as config.meta.\w+$"),
  ],
)
def test_an_emptied_subtree_is_one_clear_error(key, value, says):
  with pytest.raises(ValueError, match=says):
    config_lib.load_config(DIGITS, {key: value})


def test_validate_does_not_trust_where_a_config_comes_from():
  values = load().to_dict()
  values["optimiser"] = values.pop("optimizer")
  with pytest.raises(ValueError, match="did you mean config.optimizer?"):
    config_lib.validate(config_lib.from_dict(values))
  with pytest.raises(ValueError, match="config.seed is missing"):
    config_lib.validate(ConfigDict({"model": load().model}))
  values = load().to_dict() | {"model": None}
  with pytest.raises(ValueError, match="config.model must hold the keys"):
    config_lib.validate(ConfigDict(values))


def test_every_seed_is_another_run():
  seeds = (0, 1, 2**31 - 1, 2**31, load(seed=2**32 - 1).seed)
  keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in seeds]
  assert len(set(map(tuple, keys))) == len(seeds)


def test_a_missing_file_and_an_unknown_argument(tmp_path):
  with pytest.raises(ValueError, match="no config file .*nope.py"):
    config_lib.load_config(str(tmp_path / "nope.py"))
  with pytest.raises(ValueError, match="config.method must be one of"):
    config_lib.load_config(f"{DIGITS}:lw2")
  with pytest.raises(ValueError, match="unknown model 'resnet'"):
    config_lib.defaults("resnet")


@pytest.mark.parametrize(
  "code, says",
  [
    (b"import no_such_module", ", line 1: ModuleNotFoundError: No module named"),
    (b"x = 1\ny = = 2", ", line 2: SyntaxError: invalid syntax$"),
    (b"def get_config():\n  return 1 / 0", ", line 2: ZeroDivisionError: division"),
    (b"x = '\xff'", "SyntaxError: .unicode error. 'utf-8' codec can't decode"),
    (b"import sys\nsys.exit(3)", ", line 2: SystemExit: 3$"),
    (b"x = 1", "AttributeError: .* no attribute 'get_config'"),
    (
      b"def get_config():\n  pass",
      ": get_config returns None, no ConfigDict; start",
    ),
    (b"get_config = dict", ": get_config returns {}, no ConfigDict"),
  ],
)
def test_a_config_file_that_fails_is_one_line_with_its_place(tmp_path, code, says):
  path = tmp_path / "own.py"
  path.write_bytes(code)
  with pytest.raises(ValueError, match=f"^{path}.*{says}") as caught:
    config_lib.load_config(str(path))
  assert len(str(caught.value).splitlines()) == 1
