"""A run goes on with its own config and data, and is refused with any other."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import TINY, run_main, tiny_flags
from PIL import Image

from l2w_jax import config as config_lib
from l2w_jax import main
from l2w_jax.data import sources
from l2w_jax.exits import early_exit
from l2w_jax.results import evaluate
from l2w_jax.run import config_of_run, directory
from l2w_jax.training import checkpoint, identity
from l2w_jax.training import loop as train


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished.workdir, tmp_path / "run")


def write_images(root, classes=("a", "b"), count=12, seed=0):
  """PNGs of 8×8 pixels; those of two classes differ in colour."""
  rng = np.random.default_rng(seed)
  for split, n in (("train", count), ("test", 3)):
    for c, name in enumerate(classes):
      (root / split / name).mkdir(parents=True)
      for i in range(n):
        pixels = rng.integers(0, 120, (8, 8, 3), np.uint8)
        pixels[..., c % 3] += 120
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")
  return root


def config_of(root, feed="resident"):
  return config_lib.load_config(
    "configs/digits.py:uniform",
    TINY
    | {
      "data.source": f"folder:{root}",
      "data.calibration": 4,
      "data.augment": "none",
      "data.feed": feed,
      "batch": 8,
    },
  )


@pytest.fixture
def run(tmp_path, monkeypatch):
  """(workdir, root of the images): as trained, one step saved and not one done."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  root = write_images(tmp_path / "images")
  save(tmp_path / "run", config_of(root))
  return tmp_path / "run", root


def save(workdir, config):
  _, made_of = identity.open_data(workdir, config)
  with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(0, {"step": np.int32(0)}, {"identity": made_of})


def rename(root):
  for split in ("train", "test"):
    (root / split / "a").rename(root / split / "z")


def add(root):
  for i in range(5):
    shutil.copy(root / "train/a/0.png", root / f"train/b/more{i}.png")


def add_class(root):
  shutil.copytree(root / "train/a", root / "train/c")


def repaint(root):
  Image.new("RGB", (8, 8)).save(root / "test/a/0.png")


def swap(root):
  one, other = root / "train/a/0.png", root / "train/b/0.png"
  pixels = one.read_bytes()
  one.write_bytes(other.read_bytes())
  other.write_bytes(pixels)


def enlarge(root):
  for path in root.rglob("*.png"):
    Image.open(path).resize((9, 9)).save(path)


OTHERS = {
  rename: "class 'a' is now 'z'",
  add: "train has 25 images, was 20",
  add_class: "there are 3 classes, were 2 (new: 'c')",
  repaint: "pixels of test differ",
  swap: "of train differ",
  enlarge: "images are 9×9×3, were 8×8×3",
}


@pytest.mark.parametrize("feed", ["resident", "streaming"])
@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change.__name__)
def test_other_images_are_refused_in_one_line(run, change, feed):
  workdir, root = run
  if feed == "streaming":
    save(workdir.with_name("lazy"), config_of(root, feed))
    workdir = workdir.with_name("lazy")
  identity.open_data(workdir, config_of(root, feed))
  change(root)
  with pytest.raises(ValueError, match="was trained on other data") as error:
    identity.open_data(workdir, config_of(root, feed))
  assert OTHERS[change] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("go_on", [train.train, evaluate.evaluate])
def test_nothing_compiles_before_images_are_compared(run, go_on, compilations):
  workdir, root = run
  repaint(root)
  with pytest.raises(ValueError, match="pixels of test differ"):
    go_on(workdir, config_of(root))
  assert not compilations()


def test_images_may_move_and_be_kept_otherwise(run):
  workdir, root = run
  before, _ = identity.open_data(workdir, config_of(root))
  root = root.rename(root.with_name("elsewhere"))
  after, _ = identity.open_data(workdir, config_of(root))
  np.testing.assert_array_equal(before.train.images, after.train.images)
  moved = root.with_name("images.npz")
  np.savez(
    moved,
    class_names=["a", "b"],
    **{
      f"{split}_{what}": values
      for split in ("train", "test")
      for what, values in zip(("images", "labels"), raw(root / split), strict=True)
    },
  )
  config = config_of(root)
  config.data.source = f"npz:{moved}"
  identity.open_data(workdir, config)


def raw(folder):
  paths = sorted(folder.rglob("*.png"))
  return np.stack([np.asarray(Image.open(p)) for p in paths]), np.array(
    ["ab".index(p.parent.name) for p in paths]
  )


def test_a_lost_config_json_is_restored_from_the_checkpoint(workdir, tiny_config):
  path = workdir / "config.json"
  before = path.read_text()
  path.unlink()
  tiny_config.seed = 5
  with pytest.raises(ValueError, match="config.seed is 5 here and 0 there"):
    train.train(workdir, tiny_config)
  assert not path.exists()
  assert identity.read_config(workdir).seed == 0
  assert path.read_text() == before
  path.write_text(json.dumps(json.loads(before) | {"seed": 5}))
  with pytest.raises(ValueError, match="config.seed is 5 here .*; delete it, and"):
    identity.read_config(workdir)


def test_the_command_restores_config_json_and_refuses_another(workdir):
  (workdir / "config.json").unlink()
  done = run_main(
    *tiny_flags(), f"--workdir={workdir}", "--config.optimizer.learning_rate=0.01"
  )
  assert done.code == 2 and "config.optimizer.learning_rate is 0.01" in done.err
  assert not (workdir / "config.json").exists()
  done = run_main("--mode=report", f"--workdir={workdir}")
  assert done.code == 0 and "restored from the checkpoint" in done.err
  assert (workdir / "config.json").exists()


def test_a_key_is_changed_where_config_json_is_lost(workdir):
  path = workdir / "config.json"
  before = json.loads(path.read_text())
  assert directory.config_of_checkpoints(workdir) == before
  path.unlink()
  change = [
    "--mode=evaluate",
    f"--workdir={workdir}",
    "--config.evaluate.target=q:1",
  ]
  done = run_main(*change)
  assert done.code == 0, done.err
  before["evaluate"]["target"] = "q:1"
  assert json.loads(path.read_text()) == before
  path.write_text("{")
  done = run_main(*change)
  assert done.code == 2 and done.err.startswith(
    f"error: cannot use {path}: Expecti"
  )
  path.unlink()
  path.mkdir()
  done = run_main(*change)
  assert done.code == 1 and done.err.startswith(
    f"error: {path}: Is a directory; a "
  )


def test_a_damaged_checkpoint_tells_no_config(workdir):
  steps = sorted((workdir / "checkpoints").iterdir(), key=lambda x: int(x.name))
  for step in steps[::-1]:
    assert directory.config_of_checkpoints(workdir)["seed"] == 0
    metadata = step / "info/metadata"
    metadata.write_text(metadata.read_text().replace('"seed": 0', '"seed": 1'))
  assert directory.config_of_checkpoints(workdir) is None
  (workdir / "config.json").unlink()
  with pytest.raises(
    ValueError, match="no checkpoint tells .*; give --config=NAME"
  ):
    config_of_run.get_config(str(workdir))


def test_lost_checkpoints_are_not_trained_anew(workdir, tiny_config, compilations):
  shutil.rmtree(workdir / "checkpoints")
  before = (workdir / "metrics.jsonl").read_bytes()
  with pytest.raises(
    ValueError, match="holds results.json but no checkpoint; bring"
  ):
    train.train(workdir, tiny_config)
  assert (workdir / "metrics.jsonl").read_bytes() == before and not compilations()
  assert not (workdir / "checkpoints").exists()
  # As of a run that was killed before its first checkpoint.
  (workdir / "results.json").unlink()
  identity.check_not_lost(workdir)


def test_checkpoints_of_early_versions_are_read_with_a_note(run, caplog):
  workdir, root = run
  with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(0, {"step": np.int32(0)}, {})
  add(root)
  identity.open_data(workdir, config_of(root))
  assert "do not say what they were trained on" in caplog.text


def test_a_fingerprint_is_of_images_and_labels_as_they_are_used(tiny_config):
  dataset = sources.load(tiny_config.data)
  found = identity.fingerprint(dataset)
  assert found == json.loads(json.dumps(found))
  tiny_config.data.label_noise = 0.1
  noisy = identity.fingerprint(sources.load(tiny_config.data))
  assert {name for name in found if found[name] != noisy[name]} == {"splits"}
  assert noisy["splits"]["train"]["labels"] != found["splits"]["train"]["labels"]
  assert noisy["splits"]["test"] == found["splits"]["test"]


def test_a_changed_target_is_evaluated_and_remembered(workdir):
  flags = [*tiny_flags(), f"--workdir={workdir}"]
  again = run_main(*flags)
  assert again.code == 0 and "nothing to do" in again.out
  done = run_main(*flags, "--config.evaluate.target=q:1.5")
  assert done.code == 0 and "nothing to do" not in done.out
  config, results = (
    json.loads((workdir / name).read_text())
    for name in ("config.json", "results.json")
  )
  assert config["evaluate"]["target"] == results["chosen"]["target"] == "q:1.5"
  assert results["config"] == config
  assert "At q = 1.5: " in (workdir / "report/index.html").read_text()
  for mode in ("export", "latency", "report"):
    done = run_main(f"--mode={mode}", *flags)
    assert done.code == 2 and "evaluate.target is 'q:0.75' here" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("mode", ["report", "export", "latency"])
def test_a_config_json_of_another_evaluation_is_named(workdir, mode, compilations):
  path = workdir / "config.json"
  values = json.loads(path.read_text())
  values["evaluate"]["target"] = "q:1.5"
  path.write_text(json.dumps(values))
  with pytest.raises(
    ValueError,
    match="results.json was made with another config than that of config.json: "
    "config.evaluate.target is 'q:1.5' here .*; run --mode=evaluate again$",
  ):
    main.run(mode, workdir, None)
  assert not compilations()


@pytest.mark.parametrize(
  ("key", "value", "shapes"),
  [
    ("evaluate.target", "q:1", True),
    ("evaluate.confidence", "margin", True),
    ("evaluate.calibration", "released", True),
    ("evaluate.every", 7, False),
    ("log.every", 7, False),
  ],
)
def test_results_are_made_again_where_a_key_shapes_them(
  finished, tiny_config, key, value, shapes
):
  assert identity.is_evaluated(finished.workdir, tiny_config, "scores.npz")
  config_lib.with_overrides(tiny_config, {key: value})
  done = identity.is_evaluated(finished.workdir, tiny_config, "scores.npz")
  assert done != shapes


def test_results_of_other_weights_are_refused(workdir):
  results = directory.read_results(workdir)
  directory.write_results(workdir, results | {"checkpoint": "other"})
  with pytest.raises(ValueError, match="of other weights .*--mode=evaluate again"):
    early_exit.load(workdir)


OTHER_RANDOM = {
  "jax_default_prng_impl": ("threefry2x32", "rbg"),
  "jax_threefry_partitionable": (1, 0),
  "jax_random_seed_offset": (0, 7),
}


@pytest.mark.parametrize("name", OTHER_RANDOM)
def test_other_random_settings_of_jax_are_named(run, name):
  workdir, root = run
  then, now = OTHER_RANDOM[name]
  jax.config.update(name, type(getattr(jax.config, name))(now))
  try:
    identity.open_data(workdir, config_of(root))  # to evaluate
    with pytest.raises(
      ValueError, match="its seed would draw other numbers"
    ) as error:
      identity.open_data(workdir, config_of(root), num_devices=1)
  finally:
    jax.config.update(name, type(getattr(jax.config, name))(then))
  name = name.upper()
  assert f"was trained with {name}={then}, and here it is {name}={now}: " in str(
    error.value
  )
  identity.open_data(workdir, config_of(root), num_devices=1)


def test_a_run_without_a_checkpoint_may_go(run, tmp_path):
  workdir, root = run
  other = config_of(root)
  other.epochs += 1

  def told(workdir):
    with pytest.raises(ValueError, match="another config: config.epochs") as error:
      identity.check_config(workdir, other)
    return "or delete this one, which has no checkpoint" in str(error.value)

  assert not told(workdir)
  directory.write_config(tmp_path, config_of(root))
  assert told(tmp_path)
  (tmp_path / "results.json").touch()
  assert not told(tmp_path)


def test_only_who_opens_an_npz_knows_whether_it_holds_images_out(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    f"{split}_{what}": value
    for split in ("train", "test", "calibration")
    for what, value in (
      ("images", rng.integers(0, 256, (32, 8, 8, 1), np.uint8)),
      ("labels", np.arange(32) % 2),
    )
  }
  np.savez(tmp_path / "own.npz", **arrays)
  for name in ("images", "labels"):
    del arrays[f"calibration_{name}"]
  np.savez(tmp_path / "none.npz", **arrays)

  def config(name, **changes):
    return config_lib.load_config(
      "configs/digits.py:uniform",
      TINY
      | {"data.source": f"npz:{tmp_path}/{name}.npz", "data.calibration": 0}
      | {"batch": 8}
      | changes,
    )

  workdir = tmp_path / "run"
  dataset, _ = identity.open_data(workdir, config("own"))
  assert len(dataset.calibration.labels) == 32
  with pytest.raises(ValueError, match="calibration=0 holds nothing out"):
    main.run("train", workdir, config("none"))
  risk = {"evaluate.calibration": "released", "evaluate.target": "risk:0.5:0.3"}
  with pytest.raises(ValueError, match="promises something of new images"):
    main.run("train", workdir, config("none", **risk))
  assert not workdir.exists()


def test_what_early_versions_did_not_save_is_not_compared(run):
  workdir, root = run
  _, made_of = identity.open_data(workdir, config_of(root))
  del made_of["jax"]
  with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(0, {"step": np.int32(0)}, {"identity": made_of})
  identity.open_data(workdir, config_of(root), num_devices=1)


@pytest.mark.parametrize("trained_in_x64", [False, True])
def test_x64_in_one_shell_only_is_named(tmp_path, trained_in_x64, caplog):
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    saved, wanted = np.float32, np.float64
    if trained_in_x64:
      saved, wanted = wanted, saved
    checkpoints.save(3, {"w": np.ones(2, saved)}, {})
  with (
    checkpoint.Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match="checkpoint 3 .* is sound, but") as error,
  ):
    checkpoints.restore({"w": np.ones(2, wanted)})
  way = "with JAX_ENABLE_X64=1; set" if trained_in_x64 else "without JAX_ENABLE_X64"
  assert way in str(error.value)
  assert "delete" not in str(error.value) and not caplog.text
