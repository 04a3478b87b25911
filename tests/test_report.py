"""The report of synthetic runs: its pictures, its numbers and its errors."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from l2w_jax.results.report import draw_curves, draw_samples, write_report
from l2w_jax.run import directory

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = {"curves.png", "exits.png", "samples.png", "training.png"}
QS = [q / 20 for q in range(1, 40)]


def make_results(num_exits: int, method: str = "l2w", qs=QS) -> dict:
  macs = [3e5 * (k + 1) ** 1.5 for k in range(num_exits)]
  accuracy = [0.99 - 0.05 * 0.6**k for k in range(num_exits)]
  budgeted = []
  for q in qs:
    shares = np.array([q**k for k in range(1, num_exits + 1)])
    shares /= shares.sum()
    thresholds = [0.99 - 0.05 * k for k in range(num_exits - 1)] + ["-inf"]
    if num_exits > 2:
      thresholds[1] = None
    budgeted.append(
      {
        "q": q,
        "thresholds": thresholds,
        "calibration_accuracy": 0.9712,
        "accuracy": float(shares @ accuracy) + 0.004 * q,
        "macs": float(shares @ macs),
        "exits": shares.tolist(),
      }
    )
  return {
    "method": method,
    "dataset": "digits",
    "num_classes": 10,
    "image_shape": [8, 8, 1],
    "class_names": [str(digit) for digit in range(10)],
    "mean": [0.3],
    "std": [0.4],
    "samples": {"train": 1077, "calibration": 360, "test": 360},
    "params": 54321 + num_exits,
    "macs": macs,
    "params_to_exit": [10000 * (k + 1) for k in range(num_exits)],
    "seconds": {"train": 100.25, "compile": 41.5, "evaluate": 3.25},
    "step": 480,
    "epochs": 60,
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "versions": {"jax": "0.10.2", "python": "3.11.9"},
    "anytime": [
      {
        "exit": k + 1,
        "macs": macs[k],
        "accuracy": accuracy[k],
        "calibration_accuracy": 0.9644,
      }
      for k in range(num_exits)
    ],
    "budgeted": budgeted,
    "confidence": "margin",
    "chosen": budgeted[0]
    | {
      "target": f"q:{budgeted[0]['q']:g}",
      "calibration_macs": 1.01 * budgeted[0]["macs"],
      "exit_accuracy": accuracy,
      "classes": [
        {"class": "3", "accuracy": 0.9, "macs": 4e5, "left": [6] * num_exits}
      ],
    },
    "temperatures": [
      {"exit": k + 1, "temperature": 1.5, "ece": 0.05, "ece_scaled": 0.01}
      for k in range(num_exits)
    ],
    "complete": True,
  }


def make_metrics(num_exits: int, method: str = "l2w") -> list[dict]:
  lines = []
  edges = np.linspace(0, 4, 9)
  losses = (edges[:-1] + edges[1:]) / 2
  for step in range(8, 481, 8):
    epoch = step // 8
    loss = num_exits * (2.2 * np.exp(-epoch / 9) + 0.05)
    line = {
      "kind": "train",
      "step": step,
      "epoch": epoch,
      "lr": 0.1,
      "train_loss": loss,
      "images_per_second": 900.0,
      "seconds": 1.0,
    }
    if method == "l2w":
      line["meta_loss"] = 0.6 * loss + 0.1
    lines.append(line)
    if epoch % 5 == 0:
      lines.append(
        {
          "kind": "evaluate",
          "step": step,
          "epoch": epoch,
          "split": "calibration",
          "accuracy": [
            0.97 - 0.8 * np.exp(-epoch / 9) - 0.02 * 0.5**k
            for k in range(num_exits)
          ],
        }
      )
      if method == "l2w":
        mean = [
          (
            1 + 0.01 * epoch * np.tanh((k - num_exits / 2) * (0.5 - losses) / 4)
          ).tolist()
          for k in range(num_exits)
        ]
        mean[0][-1] = None
        lines.append(
          {
            "kind": "weights",
            "step": step,
            "epoch": epoch,
            "loss_bins": edges.tolist(),
            "mean_weight": mean,
            "count": [[5] * 8] * num_exits,
          }
        )
  return lines


def make_samples(num_exits: int) -> dict[str, np.ndarray]:
  digits = np.load(ROOT / "l2w_jax/data/digits.npz")
  labels = digits["test_labels"][:60]
  return {
    "images": digits["test_images"][:60],
    "labels": labels,
    "predictions": np.where(np.arange(60) % 7 == 6, (labels + 1) % 10, labels),
    "exits": np.where(np.arange(60) % 3 == 0, num_exits - 1, 0),
    "confidence": np.linspace(0.5, 1, 60),
    "q": np.array(0.75),
    "class_names": digits["class_names"],
  }


def make_workdir(
  workdir: pathlib.Path, num_exits: int, method: str = "l2w", qs=QS
) -> pathlib.Path:
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(
    json.dumps({"seed": 0, "model": {"name": "msd<net>", "growth": 6}})
  )
  metrics = make_metrics(num_exits, method)
  (workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in metrics)
  )
  (workdir / "results.json").write_text(
    json.dumps(make_results(num_exits, method, qs))
  )
  np.savez(workdir / "samples.npz", **make_samples(num_exits))
  return workdir


def assert_picture(path: pathlib.Path) -> None:
  with Image.open(path) as image:
    image.load()
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("L"), dtype=float)
  # An empty page has variance 0; thin lines on white stay above 50.
  assert pixels.var() > 50
  assert min(pixels.shape) > 300


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
  return write_report(make_workdir(tmp_path_factory.mktemp("digits"), 3))


@pytest.mark.parametrize(("num_exits", "qs"), [(1, [1.0]), (11, QS)])
def test_any_number_of_exits_is_drawn(tmp_path, num_exits, qs):
  page = write_report(make_workdir(tmp_path, num_exits, qs=qs))
  assert page == tmp_path / "report" / "index.html"
  for name in {"weights.png", *PICTURES}:
    assert_picture(page.parent / name)


def test_the_page_names_the_split_that_thresholds_come_from(page, tmp_path):
  assert "chosen on the calibration split" in page.read_text()
  workdir = make_workdir(tmp_path, 2)
  path = workdir / "results.json"
  results = json.loads(path.read_text())
  results["samples"]["calibration"] = 0
  path.write_text(json.dumps(results))
  assert "chosen on the train split" in write_report(workdir).read_text()


def test_every_picture_is_drawn_and_on_the_page(page):
  assert {path.name for path in page.parent.iterdir()} == {
    "index.html",
    "weights.png",
    *PICTURES,
  }
  html = page.read_text()
  for name in {"weights.png", *PICTURES}:
    assert_picture(page.parent / name)
    assert f'src="{name}"' in html


def test_a_curve_of_noise_does_not_fill_the_axis():
  results = make_results(3)
  for k, entry in enumerate(results["anytime"] + results["budgeted"]):
    entry["accuracy"] = (359 - k % 2) / 360
  low, high = draw_curves(results).axes[0].get_ylim()
  assert high - low == pytest.approx(100 * 10 / 360)  # ten of 360 images
  assert low < 100 * 358 / 360 < 100 * 359 / 360 < high < 101


def test_page_shows_the_numbers_of_the_run(page):
  html = page.read_text()
  # 0.99 - 0.05 * 0.6^k for k = 0, 2; the cost ratio is 1 / 3^1.5 = 0.192.
  assert "<b>97.20 %</b>test accuracy at the last exit" in html
  assert "<b>94.00 %</b>at the first exit, at 19 % of the cost" in html
  # q = 1 uses each exit alike: (94 + 96 + 97.2) / 3 + 0.4.
  assert "<b>96.13 %</b>with early exits at q = 1, at 58 % of the cost" in html
  assert "<b>54,324</b>parameters" in html
  assert "one test image is\n0.28 points" in html
  # At q = 0.5 the shares are 4 : 2 : 1; thresholds 0.99, none, -inf.
  assert "<td>57 · 29 · 14</td><td>0.990 · – · −∞</td>" in html
  assert html.count("<td>97.12 %</td>") == 7  # q = 0.25, 0.5, ..., 1.75
  assert "msd&lt;net&gt;" in html


def test_uniform_run_has_no_weights_and_says_why(tmp_path):
  (tmp_path / "report").mkdir()
  (tmp_path / "report" / "weights.png").write_bytes(b"of an earlier run")
  page = write_report(make_workdir(tmp_path, 3, "uniform"))
  assert {path.name for path in page.parent.iterdir()} == {"index.html", *PICTURES}
  html = page.read_text()
  assert "weights.png" not in html
  assert "Method uniform weighs every sample alike" in html


def test_an_unfinished_and_diverged_run_is_shown_as_such(tmp_path):
  workdir = make_workdir(tmp_path, 3)
  (workdir / "metrics.jsonl").write_text(
    '{"kind": "train", "step": 7, "epoch": 0.5}\n'
  )
  results = make_results(3) | {"complete": False, "step": 7}
  (workdir / "results.json").write_text(json.dumps(results))
  html = write_report(workdir).read_text()
  assert "One run, evaluated in mid-training after step 7." in html
  assert "no line of kind weights" in html


def test_an_exit_that_no_sample_leaves_at_is_said_to_be_empty():
  samples = make_samples(3)
  samples["exits"][:] = 2
  first, last = draw_samples(samples, 3).subfigs
  assert first.get_suptitle() == "Left at exit 1: none of these images"
  assert not any(axes.images for axes in first.axes)
  assert last.get_suptitle() == "Left at exit 3"
  assert all(axes.images for axes in last.axes)


def test_sample_pictures_name_label_and_wrong_prediction(tmp_path):
  samples = make_samples(3)
  samples["images"] = np.repeat(samples["images"] * 15, 3, axis=-1)
  figure = draw_samples(samples, 3)
  last = figure.subfigs[1]
  here = np.arange(0, 60, 3)  # those that leave at exit 3
  for i, axes in zip(here, last.axes, strict=False):
    label = samples["labels"][i]
    expected = f"{label} → {(label + 1) % 10}" if i % 7 == 6 else f"{label}"
    assert axes.get_title() == expected
    np.testing.assert_array_equal(axes.images[0].get_array(), samples["images"][i])
  figure.savefig(tmp_path / "samples.png")
  assert_picture(tmp_path / "samples.png")


def test_a_step_repeated_after_a_resume_counts_once():
  lines = [
    {"kind": "train", "step": step, "epoch": 1, "train_loss": loss}
    for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)]
  ]
  data = "\n".join(json.dumps(line) for line in lines).encode()
  train = directory._parse_metrics(data)["train"]
  assert [(line["step"], line["train_loss"]) for line in train] == [
    (1, 3.0),
    (2, 2.5),
    (3, 1.0),
  ]


@pytest.mark.parametrize(
  ("name", "mode"),
  [
    ("config.json", "train"),
    ("metrics.jsonl", "train"),
    ("results.json", "evaluate"),
    ("samples.npz", "evaluate"),
  ],
)
def test_missing_or_broken_file_is_named_with_what_to_run(tmp_path, name, mode):
  path = make_workdir(tmp_path, 3) / name
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match=f"cannot use .*{name}.*--mode={mode}"):
    write_report(tmp_path)
  path.unlink()
  with pytest.raises(ValueError, match=f"{name} is missing.*--mode={mode}"):
    write_report(tmp_path)
  assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda results: results.pop("anytime"), "it lacks 'anytime'"),
    # Of a release that chose no operating point.
    (lambda results: results.pop("chosen"), "it lacks 'chosen'"),
    (lambda results: results["samples"].pop("test"), "its 'samples' lacks 'test'"),
    (
      lambda results: results["budgeted"][3].pop("macs"),
      "an entry of its 'budgeted' lacks 'macs'",
    ),
    (lambda results: results["chosen"]["exits"].pop(), "not all of its 3 exits"),
    (
      lambda results: results["budgeted"][3]["exits"].pop(),
      "not all of its 3 exits",
    ),
  ],
)
def test_incomplete_results_are_refused(tmp_path, change, says):
  results = make_results(3)
  change(results)
  path = make_workdir(tmp_path, 3) / "results.json"
  path.write_text(json.dumps(results))
  with pytest.raises(ValueError, match=f"{says}.*--mode=evaluate"):
    write_report(tmp_path)


def test_a_broken_metrics_line_is_named(tmp_path):
  with (make_workdir(tmp_path, 3) / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "evaluate", "step": 481, "epoch": 61}\n')
  with pytest.raises(
    ValueError, match=r"line \d+ is not a metric .*lacks 'accuracy'"
  ):
    write_report(tmp_path)


def test_samples_of_different_length_are_refused(tmp_path):
  samples = make_samples(3)
  samples["labels"] = samples["labels"][:-1]
  np.savez(make_workdir(tmp_path, 3) / "samples.npz", **samples)
  with pytest.raises(ValueError, match="differ in length"):
    write_report(tmp_path)


def test_import_leaves_matplotlib_out():
  code = (
    "import sys, l2w_jax.results.report; "
    "assert not {'matplotlib', 'tensorflow'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_embedded_digits_are_what_their_page_says():
  digits = np.load(ROOT / "l2w_jax/data/digits.npz")
  assert digits["class_names"].tolist() == [str(d) for d in range(10)]
  everything = []
  for split, size in (("train", 1077), ("calibration", 360), ("test", 360)):
    images, labels = digits[f"{split}_images"], digits[f"{split}_labels"]
    assert images.shape == (size, 8, 8, 1)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert images.max() == 16
    # The source has 174 to 183 of 1,797 in each class.
    counts = np.bincount(labels, minlength=10)
    assert np.all(np.abs(counts / size - 0.1) < 0.005)
    everything.append(images.reshape(size, 64))
  assert len(np.unique(np.concatenate(everything), axis=0)) == 1797


def test_early_exits_and_latency_are_on_the_page_once_measured(tmp_path):
  workdir = make_workdir(tmp_path, 3)
  results = make_results(3)
  results["chosen"] |= {
    "target": "macs:9e5",
    "exits": [0.5, 0.5, 0.0],
    "exit_accuracy": [0.98, 0.9424, None],
    "classes": [
      {"class": "<cat>", "accuracy": 0.9, "macs": 9e5, "left": [5, 5, 0]},
      {"class": "none", "accuracy": None, "macs": None, "left": [0, 0, 0]},
    ],
  }
  results["temperatures"][1]["ece_scaled"] = 0.0123
  (workdir / "results.json").write_text(json.dumps(results))
  row = {
    "kind": "early",
    "point": "q = 1",
    "decides": "device",
    "batch": 1,
    "calls": 9,
    "macs": 8e5,
    "p50_ms": 1.25,
    "p95_ms": 2.5,
    "images_per_second": 777.0,
    "speedup": 1.75,
    "speedup_by_macs": 2.0,
  }
  (workdir / "latency.json").write_text(
    json.dumps(
      {
        "step": 480,
        "device": {"platform": "cpu", "kind": "cpu"},
        "rows": [row, row | {"kind": "full", "batch": 64}],
      }
    )
  )
  page = write_report(workdir)
  html = page.read_text()
  assert "Early exits at macs:9e5" in html and "&lt;cat&gt;" in html
  assert "<td>94.24 %</td><td>1.50</td><td>5.00 %</td><td>1.23 %</td>" in html
  assert "<td>early, device decides</td>" in html
  assert "<td>777</td><td>1.75</td><td>2.00</td>" in html
  assert_picture(page.parent / "latency.png")
  (workdir / "latency.json").write_text("{}")
  with pytest.raises(ValueError, match="cannot use .*latency.json.*latency"):
    write_report(workdir)
