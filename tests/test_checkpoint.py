"""Checkpoints: round trips, donated memory, and damage that is stepped over."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l2w_jax
from l2w_jax import main
from l2w_jax.results import evaluate
from l2w_jax.run import compile_cache, directory, files
from l2w_jax.training import checkpoint, identity

INFO = {"seconds": {"train": 1.5}, "complete": False}


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "step": jnp.asarray(seed, jnp.int32),
    # Large and random, so that most of the bytes on disk are its values.
    "kernel": jnp.asarray(rng.normal(size=(300, 200)), jnp.float32),
    "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
    "flags": jnp.asarray([True, False]),
    "empty": {},
    "chain": ((), jnp.asarray(2.5)),
  }


def template(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(ours, other):
  assert jax.tree.structure(ours) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def three_steps(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), INFO | {"step": step})
  return tmp_path


@pytest.fixture
def warnings(monkeypatch):
  """What we tell the user; Orbax has warnings of its own."""
  told = []

  def warning(message, *values):
    if message.startswith("checkpoint "):
      told.append(message % values)

  monkeypatch.setattr(checkpoint.logging, "warning", warning)
  return told


def restore(workdir):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(template(make_state()))


def test_every_leaf_and_dtype_survives(three_steps, warnings):
  state, info = restore(three_steps)
  assert_same(state, make_state(3))
  assert len(info.pop("checkpoint")) == 64  # digest of all arrays
  assert info == INFO | {"step": 3}
  assert not warnings


def test_a_train_state_survives(tmp_path, tiny_config):
  backbone = l2w_jax.build_backbone(tiny_config.model, 10, (8, 8, 1))
  state = l2w_jax.init_state(jax.random.key(0), backbone, tiny_config)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, state, INFO)
    restored, _ = checkpoints.restore(template(state))
  assert_same(restored, state)


def test_nothing_saved_is_none(tmp_path):
  assert restore(tmp_path) is None
  assert not list(tmp_path.iterdir())  # reading leaves no trace
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.restore(template(make_state())) is None


def test_only_the_latest_are_kept(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), INFO)
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"2", "3"}


def test_saved_is_what_the_state_was_though_its_memory_is_donated(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  state = make_state()
  expected = jax.tree.map(np.array, state)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, INFO)
    for name in ("kernel", "half"):
      state[name] = overwrite(state[name])
  assert_same(restore(tmp_path)[0], expected)


def flip_a_bit(workdir: pathlib.Path, step: int):
  """Flips a bit in the middle of the largest file of a step: array values."""
  files = [
    path
    for path in (workdir / f"checkpoints/{step}/state").rglob("*")
    if path.is_file()
  ]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  assert len(data) > 100_000
  data[len(data) // 2] ^= 0b100
  largest.write_bytes(data)


def test_a_flipped_bit_is_seen_and_the_step_before_is_used(three_steps, warnings):
  flip_a_bit(three_steps, 3)
  state, info = restore(three_steps)
  assert_same(state, make_state(2))
  assert info["step"] == 2
  (told,) = warnings
  assert told.startswith("checkpoint 3 in ") and "cannot be used" in told


def test_without_digests_the_flipped_bit_would_be_read_as_a_number(
  three_steps, monkeypatch
):
  flip_a_bit(three_steps, 3)
  monkeypatch.setattr(checkpoint, "digests", lambda state: {})
  state, _ = restore(three_steps)
  different = np.sum(np.asarray(state["kernel"]) != make_state(3)["kernel"])
  assert different >= 1


def test_a_step_that_is_not_finite_is_stepped_over(three_steps, warnings):
  broken = make_state(4) | {"half": jnp.full(7, jnp.nan, jnp.bfloat16)}
  with checkpoint.Checkpoints(three_steps, keep=3) as checkpoints:
    checkpoints.save(4, broken, INFO)
  with checkpoint.Checkpoints(three_steps) as checkpoints:
    assert_same(checkpoints.restore(template(broken))[0], make_state(3))
  assert "'half'" in warnings[0] and "is not finite" in warnings[0]


def empty_directory(step: pathlib.Path):
  shutil.rmtree(step)
  step.mkdir()


def lost_info(step: pathlib.Path):
  shutil.rmtree(step / "info")


def cut_metadata(step: pathlib.Path):
  path = step / "state/_METADATA"
  path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("damage", [empty_directory, lost_info, cut_metadata])
def test_other_damage_is_stepped_over_too(three_steps, warnings, damage):
  damage(three_steps / "checkpoints/3")
  assert_same(restore(three_steps)[0], make_state(2))
  assert len(warnings) == 1


@pytest.mark.parametrize("name", ["info/metadata", "state/_METADATA"])
def test_what_may_not_be_read_is_not_damaged(three_steps, warnings, name):
  path = three_steps / "checkpoints/3" / name
  path.unlink()
  path.symlink_to(path)  # refused to root, too, as permissions are not
  with pytest.raises(OSError, match="symbolic links") as error:
    restore(three_steps)
  assert error.value.filename == str(path) and not warnings
  with checkpoint.Checkpoints(three_steps) as checkpoints:
    if name == "info/metadata":
      with pytest.raises(OSError, match="symbolic links"):
        checkpoints.info()


def test_none_usable_is_one_clear_error(three_steps, warnings):
  for step in (1, 2, 3):
    empty_directory(three_steps / f"checkpoints/{step}")
  with pytest.raises(ValueError, match=r"tried 3, 2, 1.*another workdir"):
    restore(three_steps)
  assert len(warnings) == 3


def test_another_model_is_one_clear_error(three_steps, warnings):
  other = template(make_state() | {"kernel": jnp.zeros((2, 2))})
  with (
    checkpoint.Checkpoints(three_steps) as checkpoints,
    pytest.raises(
      ValueError, match="is sound, but .*of another network; give the config"
    ),
  ):
    checkpoints.restore(other)


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_replaces_the_damaged_steps_after_it(
  three_steps, warnings, step
):
  """Orbax by itself saves nothing at or before its latest step."""
  for damaged in range(2, 4):
    empty_directory(three_steps / f"checkpoints/{damaged}")
  with checkpoint.Checkpoints(three_steps, keep=2) as checkpoints:
    assert_same(checkpoints.restore(template(make_state()))[0], make_state(1))
    checkpoints.save(step, make_state(10 + step), INFO)
  warnings.clear()
  assert_same(restore(three_steps)[0], make_state(10 + step))
  assert not warnings


def test_config_json_is_the_config(tmp_path, tiny_config):
  directory.write_config(tmp_path, tiny_config)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
  again = directory.read_config(tmp_path)
  assert again == tiny_config and again.is_locked
  identity.check_config(tmp_path, tiny_config)
  moved = again.copy_and_resolve_references()
  with moved.unlocked():
    moved.data.data_dir, moved.num_devices = "elsewhere", 3
  identity.check_config(tmp_path, moved)
  moved.data.pad = 2
  with pytest.raises(ValueError, match="config.data.pad is 2 here and 1 there"):
    identity.check_config(tmp_path, moved)


@pytest.mark.parametrize("asked", [0, 2])
def test_a_local_run_goes_on_with_the_devices_that_trained_it(
  tmp_path, tiny_config, asked
):
  tiny_config.sync, tiny_config.num_devices = "local", asked
  directory.write_config(tmp_path, tiny_config, num_devices=2)
  assert directory.read_config(tmp_path).num_devices == 2
  for num_devices in (2, None):  # None: to evaluate it, on whatever there is
    identity.check_config(tmp_path, tiny_config, num_devices)
  tiny_config.num_devices = 0
  for num_devices in (1, 8):
    with pytest.raises(ValueError, match="trained on 2 device.*=2 to res") as error:
      identity.check_config(tmp_path, tiny_config, num_devices)
    assert "\n" not in str(error.value)


def test_a_local_run_is_evaluated_on_what_there_is(
  tmp_path, tiny_config, monkeypatch
):
  tiny_config.sync = "local"
  directory.write_config(tmp_path, tiny_config, num_devices=512)
  asked = []
  monkeypatch.setattr(compile_cache, "enable", lambda: None)
  monkeypatch.setattr(
    evaluate, "evaluate", lambda unused, config: asked.append(config)
  )
  monkeypatch.setattr(main, "_print_results", lambda unused: None)
  main.run("evaluate", tmp_path, None)
  assert [config.num_devices for config in asked] == [0]


def test_a_global_run_goes_on_with_any_devices(tmp_path, tiny_config):
  directory.write_config(tmp_path, tiny_config, num_devices=2)
  assert directory.read_config(tmp_path) == tiny_config
  identity.check_config(tmp_path, tiny_config, num_devices=8)


def test_weights_that_no_device_trained_go_on_with_any(tmp_path, tiny_config):
  tiny_config.sync = "local"
  directory.write_config(tmp_path, tiny_config)
  identity.check_config(tmp_path, tiny_config, num_devices=8)


def test_broken_config_json_is_one_clear_error(tmp_path, tiny_config):
  path = tmp_path / "config.json"
  path.write_text('{"seed": ')
  with pytest.raises(ValueError, match="cannot use .*config.json"):
    directory.read_config(tmp_path)
  values = tiny_config.to_dict()
  del values["seed"]
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match="config.seed is missing"):
    directory.read_config(tmp_path)
  path.write_text("[]")
  with pytest.raises(ValueError, match="config.json"):
    directory.read_config(tmp_path)


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "x.txt"
  files.write(path, "old")

  def fail(*unused):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
      files.write(path, "new")
  assert path.read_text() == "old"
  files.write(path, "new")
  assert path.read_text() == "new"
