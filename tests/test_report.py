"""The report of synthetic runs: its pictures, its numbers and its errors."""

from __future__ import annotations

import io
import json
import pathlib
import re
import subprocess
import sys

import html5lib
import numpy as np
import pytest

from l2w_jax.exits import targets, temperature
from l2w_jax.results import drawing, intervals, report
from l2w_jax.results import page as page_lib
from l2w_jax.results.figures import (
  draw_curves,
  draw_samples,
  target_values,
  target_words,
)
from l2w_jax.results.report import sentence, write_report
from l2w_jax.run import directory

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = {"curves", "classes", "reliability", "samples", "training"}
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
        "calibration_macs": 1.01 * float(shares @ macs),
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
    "calibration": "held_out",
    "chosen": budgeted[0]
    | {
      "target": f"q:{budgeted[0]['q']:g}",
      "note": "",
      "confused": [{"class": "3", "as": "8", "images": 2}],
      "exit_accuracy": accuracy,
      "classes": [
        {
          "class": str(digit),
          "accuracy": 0.9 if digit == 3 else None,
          "macs": 4e5 if digit == 3 else None,
          "left": [6 if digit == 3 else 0] * num_exits,
        }
        for digit in range(10)
      ],
    },
    "temperatures": [
      {
        "exit": k + 1,
        "temperature": 1.5,
        "ece": 0.05,
        "ece_scaled": 0.01,
        "ece_calibrated": None,
        "ece_calibrated_high": None,
        "samples": 360,
        "reliability": [{"confidence": 0.9, "accuracy": 0.85, "samples": 360}],
      }
      for k in range(num_exits)
    ],
    "complete": True,
    "config": {"seed": 0, "model": {"name": "msd<net>", "growth": 6}},
    "checkpoint": "of the weights",
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
  metrics = make_metrics(num_exits, method)
  (workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in metrics)
  )
  directory.write_results(workdir, make_results(num_exits, method, qs))
  np.savez(workdir / "samples.npz", **make_samples(num_exits))
  return workdir


def assert_valid(html: str) -> None:
  """HTML5 without an error of the parser, and no id twice."""
  html5lib.HTMLParser(strict=True).parse(html)
  ids = re.findall(r' id="([^"]+)"', html)
  assert len(ids) == len(set(ids))
  for used in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
    assert used in ids


def drawn_in(html: str) -> set[str]:
  return set(re.findall(r'<svg [^>]*aria-label="(\w+)"', html))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
  return write_report(make_workdir(tmp_path_factory.mktemp("digits"), 3))


@pytest.mark.parametrize(("num_exits", "qs"), [(1, [1.0]), (11, QS)])
def test_any_number_of_exits_is_drawn(tmp_path, num_exits, qs):
  page = write_report(make_workdir(tmp_path, num_exits, qs=qs))
  assert page == tmp_path / "report" / "index.html"
  html = page.read_text()
  assert drawn_in(html) == {"weights", *PICTURES}
  assert_valid(html)


def test_the_page_names_the_split_that_thresholds_come_from(page, tmp_path):
  assert "360 images held out of training, on which the thresholds" in words(page)
  assert "on the calibration split" in words(page)
  workdir = make_workdir(tmp_path, 2)
  results = make_results(2)
  results["samples"]["calibration"] = 0
  directory.write_results(workdir, results)
  lines = [x for x in make_metrics(2) if x["kind"] != "evaluate"]
  (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  html = words(write_report(workdir))
  assert "on the train split" in html and html.count(">on train</th>") == 2
  for text in ("on calibration", "calibration images", "n the calibration split"):
    assert text not in html
  assert "1,077 training and 360 test images" in html
  assert "Losses of the training batches." in html


def words(page: pathlib.Path) -> str:
  """Text of the page, its lines joined."""
  return " ".join(page.read_text().split())


def test_the_page_is_one_file_with_every_picture(page):
  assert [path.name for path in page.parent.iterdir()] == ["index.html"]
  html = page.read_text()
  assert drawn_in(html) == {"weights", *PICTURES}
  assert_valid(html)
  assert "<img" not in html and "http://" not in re.sub(r"xmlns[^ >]*", "", html)
  # Text is text, of the page's own font.
  assert ">images leaving (%)</text>" in html and "DejaVu" not in html


@pytest.mark.parametrize("format", drawing.FORMATS)
def test_pictures_for_a_paper(tmp_path, format):
  page = write_report(make_workdir(tmp_path, 3), format)
  folder = page.parent / "figures"
  assert {path.name for path in folder.iterdir()} == {
    f"{name}.{format}" for name in {"weights", *PICTURES}
  }
  begins = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}[format]
  for path in folder.iterdir():
    assert path.read_bytes().startswith(begins) and path.stat().st_size > 5000


HOSTILE = [
  "<script>alert(1)</script>",
  "a & b \"q\" 'x'",
  "猫",
  "$x_1$ and $",
  "tab\tline\nnull\x00",
  "{{ 7 * 7 }}",
  "&lt;",
  "name " * 20,
]


@pytest.mark.filterwarnings("error")
def test_names_of_classes_are_only_text(tmp_path, capfd):
  workdir = make_workdir(tmp_path, 3)
  results, samples = make_results(3), make_samples(3)
  names = [*HOSTILE, "8", "9"]
  samples["class_names"] = np.array(names)
  results["class_names"] = names
  for entry, name in zip(results["chosen"]["classes"], names, strict=True):
    entry |= {"class": name, "accuracy": 0.9, "macs": 4e5, "left": [2, 2, 2]}
  results["chosen"]["confused"] = [{"class": names[0], "as": names[4], "images": 2}]
  results["dataset"] = names[0]
  directory.write_results(workdir, results)
  np.savez(workdir / "samples.npz", **samples)
  page = write_report(workdir, "pdf")
  html = page.read_text()
  assert_valid(html)
  assert "<script" not in html and "&lt;script&gt;" in html
  assert "\x00" not in html and "49" not in re.findall(r"<td>(.*?)</td>", html)
  assert "<td>猫</td>" in html and "<td>$x_1$ and $</td>" in html
  assert ">$x_1$ and $</text>" in html and "<td>&amp;lt;</td>" in html
  assert capfd.readouterr().err == ""


def test_a_curve_of_noise_does_not_fill_the_axis():
  results = make_results(3)
  points = [*results["anytime"], *results["budgeted"], results["chosen"]]
  for k, entry in enumerate(points):
    entry["accuracy"] = (359 - k % 2) / 360
  low, high = draw_curves(results).axes[0].get_ylim()
  assert high - low == pytest.approx(100 * 10 / 360)  # ten of 360 images
  assert low < 100 * 358 / 360 < 100 * 359 / 360 < high < 101


def test_page_shows_the_numbers_of_the_run(page):
  html = words(page)
  # q = 0.05: (1, 0.05, 0.0025) of 94, 96 and 97.2 %, and 0.02; 1 / 3^1.5 = 19.2 %.
  assert "At q = 0.05: 21 % of the cost, accuracy 94.1 % [91.2, 96.1];" in html
  assert "full network 97.2 %." in html
  assert "one test image is 0.28 points. 54,324 parameters." in html
  # At q = 0.5 the shares are 4 : 2 : 1; thresholds 0.99, none, -inf.
  assert "<td>57 · 29 · 14</td><td>0.990 · – · −∞</td>" in html
  assert html.count("<td>97.12 %</td>") == 7  # q = 0.25, 0.5, ..., 1.75
  assert "msd&lt;net&gt;" in html
  for term in ("early exits", "every image at exit k", "q", "calibration"):
    assert html.count(f"<dt>{term}</dt>") == 1


@pytest.mark.parametrize(
  ("target", "promise", "short"),
  [
    ("q:0.75", "At q = 0.75", "q = 0.75"),
    # The full network takes 1.56 million.
    ("macs:1e5", "At most 0.1 million MACs", "≤ 0.1 million MACs"),
    (
      "accuracy:0.93",
      "Accuracy at least 93 % on calibration images",
      "accuracy ≥ 93 %",
    ),
    (
      "risk:0.2:0.1",
      "At most 20 points below the full network with probability 90 %",
      "≤ 20 points lost, 90 % sure",
    ),
    ("macs:many", "At macs:many", "macs:many"),
  ],
)
def test_a_target_in_words(target, promise, short):
  results = make_results(3)
  results["chosen"]["target"] = target
  assert sentence(results).startswith(f"{promise}: 2")
  assert target_words(target, results["macs"]) == short
  labels = [
    text.get_text() for text in draw_curves(results).axes[0].legend_.get_texts()
  ]
  assert f"deployed: {short}" in labels


def test_every_form_of_a_target_has_words():
  for form in targets.FORMS.replace(" or ", ", ").split(", "):
    target = re.sub("Q|M|A|R|DELTA", "0.5", form)
    kind, values = target_values(target)
    assert (kind, values) == (targets.parse(target).kind, [0.5] * len(values))


@pytest.mark.parametrize(
  ("logits", "says"),
  [
    ([[1.0, -1.0]], "≤ 0.01"),  # right, so the surer the likelier
    ([[-1.0, 1.0]], "≥ 100"),
    # Right three times of four where p = 3/4 is a logit of ln 3.
    ([[2, 0]] * 3 + [[0, 2]], f"{2 / np.log(3):.2f}"),
  ],
)
def test_a_temperature_at_an_end_of_its_search_is_marked(logits, says):
  assert report.SEARCHED == (temperature.LOWEST, temperature.HIGHEST)
  logits = np.array(logits, np.float32)[:, None]
  (value,) = temperature.fit(logits, np.zeros(len(logits), int))
  results = make_results(1)
  results["temperatures"][0]["temperature"] = float(value)
  _, ((_, cell),) = report._temperatures(results)
  assert cell == says


def test_a_page_of_other_results_is_known(tmp_path):
  workdir = make_workdir(tmp_path, 2)
  assert not directory.is_reported(workdir, directory.read_results(workdir))
  write_report(workdir)
  assert directory.is_reported(workdir, directory.read_results(workdir))
  other = make_results(2)
  other["chosen"]["accuracy"] = 0.5
  directory.write_results(workdir, other)
  assert not directory.is_reported(workdir, directory.read_results(workdir))


def test_top5_is_explained_where_it_is_shown(page, tmp_path):
  assert page.read_text().count("<dt>MACs</dt>") == 1
  assert "top-5" not in page.read_text()
  workdir = make_workdir(tmp_path, 2)
  results = make_results(2)
  results["chosen"]["top5_accuracy"] = 0.99
  directory.write_results(workdir, results)
  assert "<dt>top-5</dt>" in write_report(workdir).read_text()


def test_the_interval_of_an_accuracy_is_that_of_a_table():
  # Wilson's interval of 80 of 100: 71.1 to 86.7 % (Wallis, 2013).
  low, high = intervals.of_accuracy(np.array([0.8, 1.0, 0.0]), 100)
  np.testing.assert_allclose(low, [0.7111708, 0.9630065, 0], atol=1e-6)
  np.testing.assert_allclose(high, [0.8666331, 1, 0.0369935], atol=1e-6)


def test_where_images_leave_is_what_the_results_say():
  above, below = draw_curves(make_results(3)).axes
  # Areas of q = 1/20, 2/20, ...: the first begins at its share of exit 1, 95 %.
  first = below.collections[0].get_paths()[0].vertices
  cost = [3e5 * (k + 1) ** 1.5 for k in range(3)]
  shares = np.array([1, 0.05, 0.0025]) / 1.0525
  x = 100 * shares @ cost / cost[-1]
  assert [x, 100 * shares[0]] in np.round(first, 9).tolist() or np.isclose(
    first, [x, 100 * shares[0]]
  ).all(1).any()
  stars = [line for line in above.lines if line.get_marker() == "*"]
  np.testing.assert_allclose(stars[0].get_xdata(), [x])


def labels_of_shares(results: dict) -> dict[str, tuple]:
  """{text: its box} below, boxes in fractions of the panel."""
  figure = draw_curves(results)
  figure.savefig(io.BytesIO(), format="png")  # lays it out
  below = figure.axes[1]
  inverse = below.transAxes.inverted()
  return {
    text.get_text(): tuple(
      inverse.transform_bbox(text.get_window_extent()).extents.tolist()
    )
    for text in below.texts
  }


@pytest.mark.parametrize(
  ("num_exits", "every"), [(1, 1), (2, 38), (3, 38), (11, 1)]
)
def test_names_of_areas_are_not_cut(num_exits, every):
  results = make_results(num_exits)
  results["budgeted"] = results["budgeted"][::every]
  found = labels_of_shares(results)
  assert found
  for left, low, right, high in found.values():
    assert 0 <= left < right <= 1 and -0.01 <= low < high <= 1.01


def test_names_of_areas_are_off_the_line_of_the_deployed_point():
  results = make_results(2)
  full = results["macs"][-1]
  results["chosen"] |= results["budgeted"][19]
  figure = draw_curves(results)
  low, high = figure.axes[1].get_xlim()
  line = (100 * results["chosen"]["macs"] / full - low) / (high - low)
  found = labels_of_shares(results)
  assert set(found) == {"exit 1", "exit 2"}
  assert not any(left < line < right for left, _, right, _ in found.values())


def test_names_of_areas_that_are_narrow_lie_beside_them():
  results = make_results(3)
  full = results["macs"][-1]
  for entry in results["budgeted"]:  # of 20 to 25 % of the cost
    entry["macs"] = full * (0.2 + 0.025 * entry["q"])
    entry["exits"] = [0.6, 0.35, 0.05]
  found = labels_of_shares(results)
  assert set(found) == {"exit 1", "exit 2"}  # 5 % are not as high as a name
  low, high = draw_curves(results).axes[1].get_xlim()
  end = (25 - low) / (high - low)
  assert all(end - 0.01 < left < end + 0.03 for left, *_ in found.values())


def test_a_single_exit_is_a_line_as_its_legend_says():
  above, below = draw_curves(make_results(1)).axes
  (line,) = [x for x in above.lines if x.get_label() == "early exits"]
  assert np.ptp(line.get_xdata()) > 0 and np.ptp(line.get_ydata()) == 0
  area = below.collections[0].get_paths()[0].vertices
  assert np.ptp(area[:, 0]) > 0 and area[:, 1].max() == 100


def test_a_page_of_patience_speaks_of_no_q(tmp_path, page):
  assert "At q = 0.75. A wrong answer" in words(page)
  workdir = make_workdir(tmp_path, 3)
  results = make_results(3)
  for level, entry in enumerate(results["budgeted"][:2], 2):
    entry["patience"] = level
    del entry["q"]
  results["budgeted"] = results["budgeted"][:2]
  results["chosen"]["target"] = "accuracy:0.9"
  directory.write_results(workdir, results)
  html = words(write_report(workdir))
  assert "Accuracy at least 90 % on calibration images: " in html
  assert "q =" not in html and "<dt>patience</dt>" in html
  assert "At the patience whose mean cost on the calibration split" in html


def test_uniform_run_has_no_weights_and_says_why(tmp_path):
  html = words(write_report(make_workdir(tmp_path, 3, "uniform")))
  assert drawn_in(html) == PICTURES
  assert "Method uniform weighs every sample alike" in html


def test_an_unfinished_and_diverged_run_is_shown_as_such(tmp_path):
  workdir = make_workdir(tmp_path, 3)
  (workdir / "metrics.jsonl").write_text(
    '{"kind": "train", "step": 7, "epoch": 0.5}\n'
  )
  results = make_results(3) | {"complete": False, "step": 7}
  directory.write_results(workdir, results)
  html = words(write_report(workdir))
  assert "Evaluated in mid-training, after step 7." in html
  assert "no line of kind weights" in html


def test_an_exit_that_no_sample_leaves_at_is_said_to_be_empty():
  samples = make_samples(3)
  samples["exits"][:] = 2
  figure = draw_samples(samples, 3)
  first, last = figure.subfigs
  assert figure.get_figheight() < draw_samples(make_samples(3), 3).get_figheight()
  assert first.get_suptitle() == "Left at exit 1: none of these images"
  assert not any(axes.images for axes in first.axes)
  assert last.get_suptitle() == "Left at exit 3"
  assert all(axes.images for axes in last.axes)


def test_sample_pictures_name_label_and_wrong_prediction():
  samples = make_samples(3)
  samples["images"] = np.repeat(samples["images"] * 15, 3, axis=-1)
  figure = draw_samples(samples, 3)
  last = figure.subfigs[1]
  here = np.arange(0, 60, 3)  # those that leave at exit 3
  for i, axes in zip(here, last.axes, strict=False):
    label = samples["labels"][i]
    expected = f"{label}\n→ {(label + 1) % 10}" if i % 7 == 6 else f"{label}"
    assert axes.get_title() == expected
    np.testing.assert_array_equal(axes.images[0].get_array(), samples["images"][i])


def test_a_step_repeated_after_a_resume_counts_once(tmp_path):
  lines = [
    {"kind": "train", "step": step, "epoch": 1, "train_loss": loss}
    for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)]
  ]
  text = "\n".join(json.dumps(line) for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  train = directory.read_metrics(tmp_path)["train"]
  assert [(line["step"], line["train_loss"]) for line in train] == [
    (1, 3.0),
    (2, 2.5),
    (3, 1.0),
  ]


@pytest.mark.parametrize(
  ("name", "mode"), [("results.json", "evaluate"), ("samples.npz", "evaluate")]
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
  directory.write_results(make_workdir(tmp_path, 3), results)
  with pytest.raises(ValueError, match=f"{says}.*--mode=evaluate"):
    write_report(tmp_path)


def test_a_damaged_metrics_line_is_named_and_left_out(tmp_path, caplog):
  workdir = make_workdir(tmp_path, 3)
  path = workdir / "metrics.jsonl"
  before = directory.read_metrics(workdir, 3)
  number = len(path.read_text().splitlines()) + 1
  with path.open("a") as file:
    file.write('{"kind": "evaluate", "step": 481, "epoch": 61}\n')
  write_report(workdir)
  assert directory.read_metrics(workdir, 3) == before
  assert f"{path}: line {number} left out, as damaged (it lacks 'acc" in caplog.text


def test_a_report_without_metrics_says_so(tmp_path, caplog):
  path = make_workdir(tmp_path, 3) / "metrics.jsonl"
  path.unlink()
  page = write_report(tmp_path)
  assert "training" not in drawn_in(page.read_text())
  assert "metrics.jsonl holds no curves of training" in page.read_text()
  assert f"{path} is missing" in caplog.text and "--mode=train" not in caplog.text


def test_samples_of_different_length_are_refused(tmp_path):
  samples = make_samples(3)
  samples["labels"] = samples["labels"][:-1]
  np.savez(make_workdir(tmp_path, 3) / "samples.npz", **samples)
  with pytest.raises(ValueError, match="'labels' has not all of its 60 samples"):
    write_report(tmp_path)


def test_import_leaves_matplotlib_out():
  code = (
    "import sys, l2w_jax.results.report; "
    "assert not {'matplotlib', 'jinja2', 'tensorflow'} & set(sys.modules)"
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


def test_early_exits_and_latency_are_on_the_page_once_measured(tmp_path, caplog):
  workdir = make_workdir(tmp_path, 3)
  results = make_results(3)
  results["chosen"] |= {
    "target": "macs:9e5",
    "exits": [0.5, 0.5, 0.0],
    "exit_accuracy": [0.98, 0.9424, None],
    "classes": [
      {"class": "<cat>", "accuracy": 0.9, "macs": 9e5, "left": [5, 5, 0]},
      {"class": "none", "accuracy": None, "macs": None, "left": [0, 0, 0]},
      *results["chosen"]["classes"][:8],
    ],
  }
  results["temperatures"][1]["ece_scaled"] = 0.0123
  directory.write_results(workdir, results)
  row = {
    "kind": "early",
    "point": "q = 1",
    "decides": "device",
    "batch": 1,
    "calls": 9,
    "macs": 8e5,
    "rounds": 20,
    "ms": 1.25,
    "ms_low": 1.0,
    "ms_high": 2.5,
    "p95_ms": None,
    "images_per_second": 777.0,
    "speedup": 1.75,
    "speedup_low": 1.5,
    "speedup_high": 2.0,
    "speedup_by_macs": 2.0,
  }
  (workdir / "latency.json").write_text(
    json.dumps(
      {
        "step": 480,
        "checkpoint": results["checkpoint"],
        "target": "macs:9e5",
        "confidence": "margin",
        "device": {"platform": "cpu", "kind": "cpu"},
        "rows": [row, row | {"kind": "full", "batch": 64}],
      }
    )
  )
  html = words(write_report(workdir))
  assert_valid(html)
  assert "<span>≤ 0.9 million MACs</span>" in html and "&lt;cat&gt;" in html
  assert "<td>2</td><td>50.0 %</td><td>94.24 %</td>" in html
  assert "A calibration error is not shown: on 360 test images" in html
  # Of 3e5 · 3^1.5 MACs.
  assert (
    "<td>device decides</td><td>51.3 %</td><td>1.250 [1.000, 2.500]</td>" in html
  )
  assert "<td>777</td><td>1.75 [1.50, 2.00]</td><td>2.00</td><td>9</td>" in html
  assert "latency" in drawn_in(html)
  for entry in results["temperatures"]:
    entry |= {"ece_calibrated": 0.004, "ece_calibrated_high": 0.007}
  results["chosen"]["target"] = "q:0.75"
  directory.write_results(workdir, results)
  html = words(write_report(workdir))
  row = "<td>5.00 %</td><td>1.23 %</td><td>0.40 %, up to 0.70 %</td>"
  assert f"<td>2</td><td>1.50</td>{row}" in html
  assert "latency" not in drawn_in(html)
  assert "is of another evaluation and left out" in caplog.text
  (workdir / "latency.json").write_text("{}")
  with pytest.raises(ValueError, match="cannot use .*latency.json.*latency"):
    write_report(workdir)


def test_a_table_alone_escapes_its_cells():
  html = page_lib.table(["a", "<b>"], [["1", "&"], [2, "\x07"]])
  assert_valid(f"<!doctype html><html><head><title>t</title></head>{html}</html>")
  assert "&lt;b&gt;</th>" in html and "<td>&amp;</td>" in html and "�" in html
