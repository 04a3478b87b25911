"""Error, noise and cost of meta-gradients, and what weights do."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from toy import LinearExits

import l2w_jax
from l2w_jax import config as config_lib
from l2w_jax.data import sources
from l2w_jax.results import evaluate, figures, report
from l2w_jax.run import directory
from l2w_jax.training import diagnostics
from l2w_jax.training import loop as train


def test_error_of_an_estimate_by_hand():
  exact = {"a": np.array([3.0]), "b": np.array([[4.0]])}
  estimate = {"a": np.array([4.0]), "b": np.array([[3.0]])}
  assert diagnostics.cosine(estimate, exact) == pytest.approx(24 / 25)
  assert diagnostics.relative_error(estimate, exact) == pytest.approx(2**0.5 / 5)
  zero = {"a": np.zeros(1), "b": np.zeros((1, 1))}
  assert np.isnan(diagnostics.cosine(zero, exact))
  assert diagnostics.relative_error(zero, exact) == 1
  assert np.isnan(diagnostics.relative_error(exact, zero))


def test_noise_of_two_gradients_by_hand():
  """(1, 0) and (3, 0): mean (2, 0), variance 2, so (4 - 2/2) / 2 = 1.5."""
  gradients = [{"x": np.array([1.0, 0])}, {"x": np.array([3.0, 0])}]
  assert diagnostics.variance(gradients) == pytest.approx(2)
  assert diagnostics.signal_to_noise(gradients) == pytest.approx(1.5)
  assert np.isnan(diagnostics.signal_to_noise([gradients[0]] * 2))


def test_signal_to_noise_of_pure_noise_is_zero_on_average():
  rng = np.random.default_rng(0)
  found = [
    diagnostics.signal_to_noise(list(rng.normal(size=(4, 50)))) for _ in range(200)
  ]
  # Not 1/4, which |mean|² alone gives. Its spread, 0.03, over 200 draws.
  assert abs(np.mean(found)) < 0.01


def test_an_exit_has_its_column_of_the_output_layer():
  gradient = {
    "hidden_0": {"kernel": np.ones((2, 2)), "bias": np.ones(2)},
    "output": {"kernel": np.arange(6).reshape(2, 3), "bias": np.arange(3)},
  }
  assert jax.tree.map(np.ndarray.tolist, diagnostics.of_exit(gradient, 1)) == {
    "kernel": [1, 4],
    "bias": 1,
  }


def test_weights_are_averaged_in_bins():
  weights = np.array([[1.0, 2], [3, 4], [5, 6]])
  values = np.array([[0.1, 0.9], [0.2, 7], [0.5, -1]])
  assert diagnostics.mean_by_bin(weights, values, np.array([0, 0.5, 1.0])) == [
    [2.0, 5.0],
    [6.0, 3.0],
  ]
  assert diagnostics.mean_by_bin(
    weights[:1], values[:1], np.array([0, 0.5, 1.0])
  ) == [[1.0, None], [None, 2.0]]


def test_easy_is_a_small_mean_loss():
  losses = np.array([[5.0, 0], [0, 1], [9, 9], [2, 2]])
  weights = np.arange(8.0).reshape(4, 2)
  easy, hard = diagnostics.easy_and_hard(weights, losses)
  assert easy.tolist() == [2, 3] and hard.tolist() == [4, 5]


class Linear(LinearExits):
  num_classes = 10

  def init(self, key):
    weight = 0.1 * jax.random.normal(key, (3, 64, 10))
    return {
      "params": {"weight": weight},
      "batch_stats": {"mean": jnp.zeros((3, 10))},
    }


def digits_config(**overrides):
  return config_lib.load_config(
    str(ROOT / "configs/digits.py"),
    {"data.source": "digits", "meta.hidden": 8, **overrides},
  )


@pytest.fixture(scope="module")
def line():
  """A diagnosis of the first state of linear exits on the digits."""
  config = digits_config(
    **{
      "diagnose.half": 16,
      "diagnose.meta_halves": 3,
      "diagnose.estimators": (
        "jvp",
        "finite_difference",
        "first_order",
        "unroll:4",
      ),
    }
  )
  backbone = Linear()
  state = l2w_jax.init_state(jax.random.key(0), backbone, config)
  probe = diagnostics.make_probe(sources.load(config.data), 16, 3)
  return diagnostics.Diagnosis(backbone, config, 8, state, probe)(state)


def test_a_diagnosis_tells_the_estimators_apart(line):
  rows = line["estimators"]
  assert list(rows) == [
    "grad",
    "jvp",
    "finite_difference",
    "first_order",
    "unroll:4",
  ]
  error = {name: row["relative_error"] for name, row in rows.items()}
  assert error["grad"] == 0
  # Float32, and a curvature without kinks; on some CPUs not even rounding differs.
  assert error["jvp"] < 1e-5
  assert 1e-5 < error["finite_difference"] < 1e-2
  assert 0.1 < error["first_order"] and 0.1 < error["unroll:4"]
  for row in rows.values():
    assert row["flops"] > 0 and row["temporary_bytes"] > 0 and row["ms"] > 0
    assert -1 <= row["cosine"] <= 1.000001
  # Four steps on a quarter each; the loop's body counts four times.
  assert rows["unroll:4"]["flops"] > rows["grad"]["flops"]


def test_a_diagnosis_describes_noise_and_weights(line):
  assert line["variance"] > 0 and len(line["signal_to_noise_by_exit"]) == 3
  # Centred over exits, weights of each sample average to 1.
  for name in ("easy_weight", "hard_weight"):
    assert np.mean(line[name]) == pytest.approx(1, abs=1e-5)
  assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_a_probe_is_drawn_from_train_without_overlap():
  config = digits_config()
  dataset = sources.load(config.data)
  probe = diagnostics.make_probe(dataset, 300, 2)
  assert len(probe.meta_halves) == 2
  train_half, meta_half = (
    {np.asarray(image).tobytes() for image in half["image"]}
    for half in (probe.train_half, probe.meta_halves[1])
  )
  assert len(train_half) > 290 and not train_half & meta_half
  assert abs(float(probe.train_half["image"].mean())) < 0.1
  with pytest.raises(ValueError, match="half is 600.*1077.*at most 538"):
    diagnostics.make_probe(dataset, 600, 2)


def test_meta_halves_of_a_probe_are_images_held_out_for_meta():
  config = digits_config(**{"data.meta": 100, "data.label_noise": 0.9})
  dataset = sources.load(config.data)
  probe = diagnostics.make_probe(dataset, 60, 2)
  every = diagnostics.make_probe(dataset._replace(train=dataset.meta), 100, 1)
  clean = dict(
    zip(
      (np.asarray(image).tobytes() for image in every.meta_halves[0]["image"]),
      np.asarray(every.meta_halves[0]["label"]).tolist(),
      strict=True,
    )
  )
  for half in probe.meta_halves:
    for image, label in zip(half["image"], half["label"], strict=True):
      assert clean[np.asarray(image).tobytes()] == int(label)
  with pytest.raises(ValueError, match="is 101.*977 images.*meta 100; use at most"):
    diagnostics.make_probe(dataset, 101, 2)


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"method": "uniform"}, "method 'uniform' does not have; set it to 0"),
    ({"diagnose.half": 33}, "half=33 does not split.*'unroll:2'.*multiple of 2"),
    ({"meta.center_over": "batch"}, "diagnose.estimators has 'first_order'"),
    ({"diagnose.estimators": ("jpv",)}, "estimators must be a tuple of values of"),
  ],
)
def test_what_cannot_be_diagnosed_is_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    digits_config(**{"diagnose.every": 5, **overrides})


def test_a_summary_averages_errors_and_keeps_both_ends(line):
  first = line | {"step": 0}
  rows = {name: dict(row) for name, row in line["estimators"].items()}
  rows["jvp"]["relative_error"], rows["jvp"]["cosine"] = 0.5, None
  last = line | {"step": 5, "estimators": rows, "easy_weight": [7, 7, 7]}
  summary = diagnostics.summarize([first, last])
  assert summary["estimators"]["jvp"]["relative_error"] == pytest.approx(
    0.25, rel=1e-4
  )
  assert (
    summary["estimators"]["jvp"]["cosine"] == (line["estimators"]["jvp"]["cosine"])
  )
  assert summary["first"]["easy_weight"] == line["easy_weight"]
  assert summary["last"]["easy_weight"] == [7, 7, 7]


def test_the_lines_are_drawn(line):
  pytest.importorskip("matplotlib")
  lines = [line | {"epoch": epoch} for epoch in (0.0, 1.0)]
  axes = figures.draw_diagnostics(lines).axes
  labels = [x.get_text() for x in axes[0].get_legend().get_texts()]
  rows = line["estimators"].items()
  assert labels == [name for name, row in rows if row["relative_error"] > 0]
  assert len(labels) >= 3
  assert len(axes[1].lines) == 3 + 1 and len(axes[2].lines) == 6 + 1
  head, rows = report.estimators(lines)
  assert rows[0][:3] == ["grad", "1.0000", "0.0e+00"]
  assert all(len(row) == len(head) for row in rows)


@pytest.mark.slow
def test_a_run_is_diagnosed_and_not_changed(finished, tmp_path):
  from test_train import final_state

  config = config_lib.load_config(
    str(ROOT / "configs/digits.py"),
    TINY
    | {
      "diagnose.every": 5,
      "diagnose.half": 16,
      "diagnose.meta_halves": 2,
      "diagnose.estimators": ("jvp",),
    },
  )
  workdir = tmp_path / "run"
  assert train.train(workdir, config)
  ours, theirs = (final_state(x, config)[0] for x in (workdir, finished.workdir))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  lines = directory.read_metrics(workdir)["diagnose"]
  assert [x["step"] for x in lines] == [0, 5, 10, 15]
  assert all(x["estimators"]["jvp"]["relative_error"] < 1e-3 for x in lines)
  evaluate.evaluate(workdir, config)
  results = json.loads((workdir / "results.json").read_text())
  assert results["diagnostics"]["lines"] == 4
  page = report.write_report(workdir).read_text()
  assert 'aria-label="diagnostics"' in page and "finite_difference" not in page
  # The keys shape no result, so a finished run may be asked again.
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  config.diagnose.every = 0
  assert train.train(copy, config) is False


def weights_line(mean, std=0.0, counts=((10, 30), (20, 20))):
  mean = np.asarray(mean, float)
  return {
    "step": 7,
    "mean_weight": mean.tolist(),
    "std_weight": np.full(mean.shape, std).tolist(),
    "count": counts,
  }


def test_learned_weights_by_hand():
  # Exit 1: 10 of 0.5 and 30 of 0.9, mean 0.8; exit 2: 20 of 1.3 and 20 of 1.1.
  found = diagnostics.learned(weights_line([[0.5, 0.9], [1.3, 1.1]], 0.1))
  np.testing.assert_allclose(found["mean"], [0.8, 1.2])
  within = np.array([0.25 * 0.3**2 + 0.75 * 0.1**2, 0.1**2]) + 0.1**2
  np.testing.assert_allclose(found["std"], np.sqrt(within))
  assert found["exit_share"] == pytest.approx(0.04 / (0.04 + within.mean()))
  np.testing.assert_allclose(found["rank_correlation"], [1, -1])
  assert found["kind"] == "both" and found["step"] == 7


@pytest.mark.parametrize(
  "mean, kind",
  [
    ([[0.7, 0.7], [1.3, 1.3]], "exits"),
    ([[0.7, 1.1], [1.3, 0.7]], "samples"),
    ([[1.0, 1.01], [1.0, 0.99]], "none"),
  ],
)
def test_learned_weights_are_called_by_what_they_tell_apart(mean, kind):
  found = diagnostics.learned(weights_line(mean))
  assert found["kind"] == kind
  if kind == "exits":
    assert found["exit_share"] == 1 and found["rank_correlation"] == [None, None]


def test_what_rounding_makes_of_a_constant_weight_has_no_rank():
  found = diagnostics.learned(weights_line([[0.2, 0.2 + 1e-7], [1.7, 1.9]], 3e-4))
  assert found["rank_correlation"] == [None, 1]


def test_a_bin_without_samples_counts_for_nothing():
  line = weights_line([[0.5, np.nan, 0.9]] * 2, counts=((5, 0, 5),) * 2)
  line["mean_weight"][0][1] = line["mean_weight"][1][1] = None
  found = diagnostics.learned(line)
  np.testing.assert_allclose(found["mean"], [0.7, 0.7])
  np.testing.assert_allclose(found["rank_correlation"], [1, 1])
