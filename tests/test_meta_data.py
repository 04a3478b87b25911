"""`data.meta`: meta halves from images of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY

import l2w_jax
from l2w_jax.data import order, resident, sources, splits
from l2w_jax.training import identity, loop


def load(**overrides):
  config = l2w_jax.load_config(
    str(ROOT / "configs/digits.py"),
    {**TINY, "data.meta": 40, "batch": 32, "data.augment": "none", **overrides},
  )
  return config, sources.load(config.data)


def rows(images):
  return {row.tobytes() for row in np.asarray(images)}


def test_they_are_held_out_clean_and_balanced():
  _, plain = load(**{"data.meta": 0})
  _, noisy = load(**{"data.label_noise": 0.5})
  _, clean = load()
  assert np.bincount(noisy.meta.labels).tolist() == [4] * 10
  assert len(noisy.train.labels) == len(plain.train.labels) - 40
  np.testing.assert_array_equal(noisy.meta.labels, clean.meta.labels)
  assert (noisy.train.labels != clean.train.labels).mean() == pytest.approx(
    0.5, abs=0.01
  )
  assert len(plain.meta.labels) == 0 and "meta" not in plain.splits
  of_train = rows(plain.train.images)
  assert rows(clean.meta.images) <= of_train
  prints = [identity.fingerprint(x)["splits"] for x in (plain, clean, noisy)]
  assert [sorted(p) for p in prints[:2]] == [
    ["calibration", "test", "train"],
    ["calibration", "meta", "test", "train"],
  ]
  assert prints[1]["meta"] == prints[2]["meta"]


def test_train_halves_stay_and_meta_halves_are_of_meta_images():
  config, dataset = load()
  feed = resident.ResidentFeed(dataset, config, jax.random.key(3), 1)
  first, second, *of = feed.halves(5)
  config.data.meta = 0
  alone = resident.ResidentFeed(
    dataset._replace(meta=sources.Dataset._field_defaults["meta"]),
    config,
    jax.random.key(3),
    1,
  )
  for ours, theirs in zip((first, second), alone.halves(5), strict=True):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  ready = (
    dataset.meta.images.astype(np.float32) - np.float32(dataset.mean)
  ) / np.float32(dataset.std)
  for half in of:
    assert half["image"].shape == first["image"].shape
    distance = np.abs(np.asarray(half["image"])[:, None] - ready[None]).max(
      (2, 3, 4)
    )
    nearest = distance.argmin(1)
    assert distance.min(1).max() < 1e-5
    np.testing.assert_array_equal(half["label"], dataset.meta.labels[nearest])
    assert len(set(nearest.tolist())) == 16
  assert not np.array_equal(of[0]["image"], of[1]["image"])
  other = feed.halves(6)[2]
  assert not np.array_equal(of[0]["image"], other["image"])


def test_rows_are_without_repetition_and_change_with_the_step():
  found = np.array(
    [order.meta_rows(jax.random.key(0), t, 20, 24) for t in range(200)]
  )
  assert all(len(set(half)) == 12 for row in found for half in (row[:12], row[12:]))
  counts = np.bincount(found.ravel(), minlength=20)
  assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_a_step_looks_at_them(monkeypatch):
  config, dataset = load()
  backbone = l2w_jax.build_backbone(config.model, 10, dataset.image_shape)
  state = l2w_jax.init_state(jax.random.key(0), backbone, config)
  feed = resident.ResidentFeed(dataset, config, jax.random.key(3), 1)
  first, second, *of = feed.halves(0)
  seen = []
  step = loop.Step(backbone, config, 4, 1)

  def half_step(state, train_half, meta_half, key):
    seen.append((train_half, meta_half))
    return state, {}

  monkeypatch.setattr(step, "_half_steps", {True: half_step})
  step(state, (first, second, *of), 0)
  assert [id(x) for pair in seen for x in pair] == [
    id(x) for x in (first, of[0], second, of[1])
  ]
  seen.clear()
  step(state.replace(step=jnp.zeros((), jnp.int32)), (first, second), 0)
  assert [id(x) for pair in seen for x in pair] == [
    id(x) for x in (first, second, second, first)
  ]


def test_too_few_are_refused_before_anything_compiles(tmp_path):
  config, _ = load(**{"data.meta": 10})
  with pytest.raises(
    ValueError, match="config.data.meta holds 10 images, fewer than"
  ):
    loop.train(tmp_path / "run", config)
  assert not (tmp_path / "run").exists()
  with pytest.raises(ValueError, match="for meta; set config.data.meta below"):
    splits.hold_out(np.arange(10), 10, 20, 0, "meta")


def test_a_streamed_set_is_refused():
  with pytest.raises(ValueError, match="set config.data.feed=resident"):
    load(**{"data.feed": "streaming"})
