"""Tables of answers for images of one's own, with a tiny run on the digits."""

import csv
import dataclasses
import io
import os

import numpy as np
import pytest
from conftest import ROOT, TINY, run_main
from PIL import Image

from l2w_jax import config as config_lib
from l2w_jax import main
from l2w_jax.exits import early_exit
from l2w_jax.results import predict
from l2w_jax.run import directory


def config_of(**changes):
  return config_lib.load_config(str(ROOT / "configs/digits.py"), TINY | changes)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, 17, (70, 8, 8, 1), np.uint8)


@pytest.fixture
def array(tmp_path, images):
  np.save(tmp_path / "images.npy", images)
  return tmp_path / "images.npy"


def rows_of(path) -> list[dict]:
  with path.open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


def run(finished, where, out, config=None):
  main.run("predict", finished.workdir, config, images=str(where), out=str(out))
  return rows_of(out)


def test_rows_are_the_answers_of_early_exits(finished, images, array, tmp_path):
  rows = run(finished, array, tmp_path / "out.csv")
  network = early_exit.load(finished.workdir)
  answers = network.predict(images)
  assert [row["image"] for row in rows] == [str(i) for i in range(70)]
  for name in ("label", "exit"):
    assert [int(row[name]) for row in rows] == getattr(answers, name).tolist()
  assert [row["class"] for row in rows] == answers.class_name.tolist()
  assert [float(row["macs"]) for row in rows] == answers.macs.tolist()
  for name, expected in (
    ("confidence", answers.confidence),
    ("probability", answers.probabilities(scaled=True).max(-1)),
    ("probability_5", answers.top(5, scaled=True)[1][:, 4]),
  ):
    np.testing.assert_allclose([float(row[name]) for row in rows], expected, 1e-5)
  classes = [[row[f"class_{i}"] for i in range(2, 6)] for row in rows]
  assert classes == answers.top(5)[0][:, 1:].astype(str).tolist()


def test_a_folder_and_an_array_of_the_same_pixels(
  finished, images, array, tmp_path
):
  folder = tmp_path / "images"
  (folder / "deep" / "deeper").mkdir(parents=True)
  for i, image in enumerate(images[:9]):
    place = folder / ("deep/deeper" if i % 2 else "") / f"{i}.png"
    Image.fromarray(image[..., 0]).save(place)
  (folder / "notes.txt").write_text("no image")
  found = run(finished, folder, tmp_path / "folder.csv")
  whole = run(finished, array, tmp_path / "array.csv")
  assert [row["image"] for row in found][:2] == ["0.png", "2.png"]
  assert {row["image"] for row in found} >= {f"deep{os.sep}deeper{os.sep}1.png"}
  for row in found:
    name = row.pop("image").split(os.sep)[-1]
    same = whole[int(name.removesuffix(".png"))]
    for key, value in row.items():
      if key.startswith(("confidence", "probability")):
        # Widths of batches differ, and so do last digits.
        assert float(value) == pytest.approx(float(same[key]), rel=1e-4)
      else:
        assert value == same[key]
  (one,) = run(finished, folder / "0.png", tmp_path / "one.csv")
  assert one["image"] == "0.png" and one["label"] == whole[0]["label"]


def test_a_long_array_is_read_in_parts(
  finished, images, array, tmp_path, monkeypatch
):
  whole = run(finished, array, tmp_path / "whole.csv")
  monkeypatch.setattr(predict, "CHUNK", 33)
  sizes, original = [], predict._read
  monkeypatch.setattr(
    predict,
    "_read",
    lambda f, part, *x: sizes.append(len(part)) or original(f, part, *x),
  )
  assert run(finished, array, tmp_path / "parts.csv") != []
  assert sizes == [24, 23, 23]
  # Some of the last part are left out: the programs are those of the first.
  network = early_exit.load(finished.workdir)
  monkeypatch.setattr(early_exit, "load", lambda *_: network)
  original_read = predict.Rows.read
  monkeypatch.setattr(
    predict.Rows,
    "read",
    lambda rows, i: (
      original_read(rows, i) if i < 50 else np.zeros((9, 9, 1), np.uint8)
    ),
  )
  skip = config_of(**{"data.corrupt": "skip"})
  some = run(finished, array, tmp_path / "some.csv", skip)
  assert [row["label"] == "" for row in some] == [False] * 50 + [True] * 20
  assert max(network.compilations()) <= 2  # the stage and what gathers for it
  names = ("image", "label", "exit", "macs")
  for a, b in zip(whole, rows_of(tmp_path / "parts.csv"), strict=True):
    assert [a[name] for name in names] == [b[name] for name in names]


def test_another_target_and_no_config_file(finished, array, tmp_path):
  out = tmp_path / "out.csv"
  done = run_main(
    "--mode=predict",
    f"--workdir={finished.workdir}",
    f"--images={array}",
    f"--out={out}",
    "--config.evaluate.target=q:100",  # late
  )
  assert done.code == 0, done.err
  assert "predict: compiled the stages" in done.err
  assert "predict: image 70/70 (100 %)" in done.err
  assert done.out.startswith("predict: 70 images, ") and str(out) in done.out
  results = directory.read_results(finished.workdir)
  assert results["chosen"]["target"] == "q:0.75"
  early = run(finished, array, tmp_path / "early.csv")
  late = rows_of(out)
  assert sum(int(row["exit"]) for row in late) > sum(int(r["exit"]) for r in early)


def test_only_a_table_of_predictions_is_written_over(finished, array, tmp_path):
  before = array.read_bytes()
  with pytest.raises(ValueError, match="is there and no table of pred"):
    main.run("predict", finished.workdir, None, images=str(array), out=str(array))
  assert array.read_bytes() == before
  table = tmp_path / "out.csv"
  table.write_text("image,label,class\nof an earlier run\n")
  main.run("predict", finished.workdir, None, images=str(array), out=str(table))
  assert len(rows_of(table)) == 70


def test_a_pipe_is_refused_before_anything_compiles(
  finished, array, tmp_path, compilations
):
  os.mkfifo(tmp_path / "out.csv")
  with pytest.raises(ValueError, match="out.csv is there and no regular file"):
    run(finished, array, tmp_path / "out.csv")
  assert not compilations()


def test_the_table_is_in_the_run_if_nothing_is_said(finished, array, monkeypatch):
  written = []
  monkeypatch.setattr(
    predict.files, "write", lambda path, text: written.append(path)
  )
  main.run("predict", finished.workdir, None, images=str(array))
  assert written == [finished.workdir / "predictions.csv"]


def test_unreadable_images(finished, images, tmp_path, capsys, caplog):
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(3):
    Image.fromarray(images[i, ..., 0]).save(folder / f"{i}.png")
  (folder / "1.png").write_bytes(b"no image at all")
  Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "wide.png")
  with pytest.raises(ValueError, match="image 1.png is none of JPEG.*corrupt=skip"):
    run(finished, folder, tmp_path / "out.csv")
  assert not (tmp_path / "out.csv").exists()
  config = config_of(**{"data.corrupt": "skip"})
  rows = run(finished, folder, tmp_path / "out.csv", config)
  assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png", "wide.png"]
  assert [row["label"] == "" for row in rows] == [False, True, False, True]
  assert "predict: 2 images, 2 left out, " in capsys.readouterr().out
  assert "left out: 1.png is none of JPEG" in caplog.text
  assert "wide.png has 9×8×1 pixels" in caplog.text


def empty(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / "notes.txt").write_text("no image")
  return tmp_path / "empty"


def saved(array):
  def save(tmp_path):
    np.save(tmp_path / "images.npy", array)
    return tmp_path / "images.npy"

  return save


def pipe(tmp_path):
  os.mkfifo(tmp_path / "pipe.npy")
  return tmp_path / "pipe.npy"


def text(tmp_path):
  (tmp_path / "images.npy").write_text("words")
  return tmp_path / "images.npy"


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda tmp_path: tmp_path / "none", "none: there is nothing"),
    (empty, "empty has no image"),
    (pipe, "pipe.npy is a pipe or a device; copy"),
    (text, "images.npy is no array that np.load reads"),
    (
      saved(np.zeros((2, 8, 8, 1))),
      r"holds float64 \[2, 8, 8, 1\]; .* takes uint8",
    ),
    (saved(np.zeros((2, 8, 8, 3), np.uint8)), r"holds uint8 \[2, 8, 8, 3\]"),
    (saved(np.zeros((2, 9, 9, 1), np.uint8)), "image 0 has 9×9×1 .* takes 8×8×1"),
    (saved(np.zeros((0, 8, 8, 1), np.uint8)), "holds no image"),
    # One image, not eight of 8×1 pixels.
    (saved(np.zeros((8, 8, 1), np.uint8)), r"holds uint8 \[8, 8, 1\]"),
    (saved(np.array([None])), "is no array that np.load reads"),
  ],
)
def test_images_that_cannot_be_answered(
  finished, tmp_path, make, says, compilations
):
  with pytest.raises(ValueError, match=says):
    run(finished, make(tmp_path), tmp_path / "out.csv")
  assert compilations() == 0 and not (tmp_path / "out.csv").exists()


def test_flags_that_do_not_fit(finished, array, tmp_path):
  with pytest.raises(ValueError, match="needs --images"):
    main.run("predict", finished.workdir, None)
  with pytest.raises(ValueError, match="--images=x is for --mode=predict; got"):
    main.run("report", finished.workdir, None, images="x")
  with pytest.raises(ValueError, match="there is no folder .*none"):
    run(finished, array, tmp_path / "none" / "out.csv")
  with pytest.raises(ValueError, match="it is a folder; name a file"):
    run(finished, array, tmp_path)
  with pytest.raises(ValueError, match="another config: config.model.growth"):
    run(finished, array, tmp_path / "x.csv", config_of(**{"model.growth": 6}))
  with pytest.raises(
    ValueError, match="another config: config.evaluate.confidence"
  ):
    other = config_of(**{"evaluate.confidence": "margin"})
    run(finished, array, tmp_path / "x.csv", other)
  with pytest.raises(ValueError, match="no thresholds reach accuracy 1"):
    run(
      finished,
      array,
      tmp_path / "x.csv",
      config_of(**{"evaluate.target": "accuracy:1"}),
    )


def test_a_run_that_is_not_evaluated(tmp_path, array):
  directory.write_config(tmp_path, config_of())
  with pytest.raises(ValueError, match="results.json is missing.*--mode=evaluate"):
    main.run("predict", tmp_path, None, images=str(array))


def test_names_that_are_not_utf8_and_classes_with_commas(
  finished, images, tmp_path
):
  folder = tmp_path / "images"
  folder.mkdir()
  Image.fromarray(images[0, ..., 0]).save(folder / os.fsdecode(b"caf\xe9.png"))
  (row,) = run(finished, folder, tmp_path / "out.csv")
  assert row["image"] == "caf\\udce9.png"
  answers = early_exit.load(finished.workdir).predict(images[:2])
  named = dataclasses.replace(
    answers, class_names=tuple("a,b;c\nd" + c for c in "0123456789")
  )
  table = io.StringIO()
  csv.writer(table).writerows(predict._rows(named))
  rows = list(csv.reader(io.StringIO(table.getvalue())))
  assert rows[0][1] == f"a,b;c\nd{answers.label[0]}" and len(rows) == 2


def test_other_classes_leave_out_the_label_that_patience_chose(finished, images):
  answers = early_exit.load(finished.workdir).predict(images[:1])
  second = answers.top(2)[0][0, 1]
  (row,) = predict._rows(dataclasses.replace(answers, label=np.array([second])))
  others = row[6::2]
  assert len(others) == 4 and str(second) not in others
  assert others[0] == str(answers.top(1)[0][0, 0])
