"""Decoding, resizing and cropping of one image."""

import io

import numpy as np
import pytest
from PIL import Image

from l2w_jax.data import pixels


def encoded(array, kind):
  file = io.BytesIO()
  Image.fromarray(array).save(file, kind)
  return file.getvalue()


def ramp(height, width):
  return np.stack(
    np.broadcast_arrays(np.arange(width), np.arange(height)[:, None], 7), -1
  ).astype(np.uint8)


def test_decode_gives_the_channels_asked_for():
  color = ramp(5, 7)
  np.testing.assert_array_equal(
    pixels.to_array(pixels.decode(encoded(color, "PNG"), 3)), color
  )
  grey = color[..., 0]
  assert pixels.to_array(pixels.decode(encoded(grey, "PNG"), 1)).shape == (5, 7, 1)
  np.testing.assert_array_equal(
    pixels.to_array(pixels.decode(encoded(grey, "PNG"), 3)),
    np.repeat(grey[..., None], 3, -1),
  )
  with pytest.raises(OSError):
    pixels.decode(encoded(ramp(64, 64), "PNG")[:-60], 3)


def test_middle_keeps_seven_eighths_of_the_shorter_side():
  assert pixels.middle(ramp(375, 500), 224).shape == (224, 224, 3)
  assert pixels.middle(ramp(100, 50), 28).shape == (28, 28, 3)
  # 64×96 becomes 32×48 (a size of 28), and the middle 28 of both are kept: the
  # average of two columns 2i + 20 and 2i + 21, i from 0.
  image = pixels.middle(ramp(64, 96), 28).astype(int)
  assert abs(image[14, 0, 0] - 20.5) <= 1 and abs(image[14, -1, 0] - 74.5) <= 1
  assert abs(image[0, 14, 1] - 4.5) <= 1 and abs(image[-1, 14, 1] - 58.5) <= 1
  np.testing.assert_array_equal(pixels.middle(ramp(6, 9), 0), ramp(6, 9))


def test_shrinking_averages():
  # Without antialiasing a checkerboard shrinks to black or white.
  board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
  shrunk = pixels.middle(board, 14)[1:-1, 1:-1].astype(int)
  assert np.abs(shrunk - 127.5).max() < 8
  crops = [
    pixels.random_crop(board, 4, np.random.default_rng(seed)) for seed in range(20)
  ]
  assert np.abs(np.stack(crops).astype(int) - 127.5).max() < 80


def test_random_boxes_are_inside_and_as_large_as_asked():
  rng = np.random.default_rng(0)
  boxes = np.array([pixels.random_box(500, 375, rng) for _ in range(4000)])
  left, top, right, bottom = boxes.T
  assert (left >= 0).all() and (top >= 0).all()
  assert (right <= 500).all() and (bottom <= 375).all()
  width, height = right - left, bottom - top
  area, aspect = width * height / (500 * 375), width / height
  # Sides are rounded to whole pixels.
  assert area.min() > 0.078 and area.max() <= 1
  assert aspect.min() > 0.74 and aspect.max() < 1.35
  assert area.min() < 0.1 and area.max() > 0.9
  assert aspect.min() < 0.76 and aspect.max() > 1.32
  # Uniform where every draw fits, which areas up to a half always do: a third
  # of those are in each third of the range, ± 5 standard deviations.
  small = area[area < 0.5]
  thirds = np.histogram(small, np.linspace(0.08, 0.5, 4))[0] / len(small)
  assert np.abs(thirds - 1 / 3).max() < 5 * np.sqrt(2 / 9 / len(small))
  assert np.abs(np.log(aspect[area < 0.5]).mean()) < 0.02


@pytest.mark.parametrize(
  "size, box", [((300, 10), (143, 0, 156, 10)), ((10, 300), (0, 143, 10, 156))]
)
def test_where_no_draw_fits_the_middle_is_taken(size, box):
  # The smallest area is 240 pixels: 13 wide at most, so it needs 18 in height.
  assert pixels.random_box(*size, np.random.default_rng(0)) == box


def test_a_random_crop_of_the_whole_is_the_image(monkeypatch):
  image = ramp(8, 8)
  monkeypatch.setattr(pixels, "random_box", lambda w, h, rng: (0, 0, w, h))
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(pixels.random_crop(image, 8, rng), image)
