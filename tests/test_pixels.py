"""Decoding, resizing and cropping of one image."""

import io
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from l2w_jax import config as config_lib
from l2w_jax.data import pixels


def encoded(image, kind, **options):
  file = io.BytesIO()
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  image.save(file, kind, **options)
  return file.getvalue()


def decode(contents, channels=3, **changes):
  config = config_lib.defaults()
  config.data.update(changes)
  return pixels.decode(contents, channels, config_lib.validate(config).data)


def ramp(height, width):
  return np.stack(
    np.broadcast_arrays(np.arange(width), np.arange(height)[:, None], 7), -1
  ).astype(np.uint8)


def test_decode_gives_the_channels_asked_for():
  color = ramp(5, 7)
  np.testing.assert_array_equal(
    pixels.to_array(decode(encoded(color, "PNG"), 3)), color
  )
  grey = color[..., 0]
  assert pixels.to_array(decode(encoded(grey, "PNG"), 1)).shape == (5, 7, 1)
  np.testing.assert_array_equal(
    pixels.to_array(decode(encoded(grey, "PNG"), 3)),
    np.repeat(grey[..., None], 3, -1),
  )
  with pytest.raises(OSError):
    decode(encoded(ramp(64, 64), "PNG")[:-60], 3)


GREYS = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)


@pytest.mark.parametrize(
  "array, kind, white",
  [
    (GREYS.astype(np.uint16) * 257, "PNG", 0),
    (GREYS.astype(np.uint16) * 257, "TIFF", 0),
    (GREYS.astype(">u2") * 257, "TIFF", 0),
    (GREYS.astype(np.uint16) * 16, "PNG", 255 * 16),
    (GREYS.astype(np.float32) / 255, "TIFF", 0),
    (GREYS.astype(np.float32) * 100, "TIFF", 25500),
    (GREYS.astype(np.int32) * 1000, "TIFF", 255000),
  ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_greys_of_more_than_8_bits_keep_their_range(array, kind, white, channels):
  image = decode(encoded(array, kind), channels, grey_range=white)
  np.testing.assert_array_equal(
    pixels.to_array(image), np.repeat(GREYS[..., None], channels, -1)
  )


def test_the_bits_that_a_file_declares_are_its_range():
  # 12 bits: TIFF packs two pixels into three bytes, PGM names its white.
  pgm = b"P5 2 1 4095\n" + np.array([4095, 2048], ">u2").tobytes()
  assert pixels.to_array(decode(pgm))[0, :, 0].tolist() == [255, 128]
  image = Image.fromarray(np.zeros((1, 2), np.uint16))
  tiff = bytearray(encoded(image, "TIFF"))
  entry = tiff.index(b"\x02\x01\x03\x00\x01\x00\x00\x00\x10\x00")
  tiff[entry + 8] = 12
  tiff[-4:-1] = bytes([0xFF, 0xF8, 0x00])
  assert pixels.to_array(decode(bytes(tiff)))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize(
  "array, white, message",
  [
    (np.array([[0, 65535]], np.uint16), 4095, "from 0 to 65535, and white is 4095"),
    (np.array([[0, 255]], np.float32), 0, "from 0 to 255, and white is 1"),
    (np.array([[-1, 0.5]], np.float32), 0, "from -1 to 0.5"),
    (np.array([[np.nan, 0.5]], np.float32), 0, "from nan to nan"),
    (np.array([[7, 255]], np.int32), 0, "do not say what white"),
    (np.array([[-7, 255]], np.int32), 255, "from -7 to 255"),
  ],
)
def test_greys_of_an_unknown_range_are_refused(array, white, message):
  with pytest.raises(ValueError, match=message) as error:
    decode(encoded(array, "TIFF"), grey_range=white)
  assert "config.data.grey_range" in str(error.value)


@pytest.mark.parametrize("kind", pixels.FORMATS)
def test_every_listed_format_is_decoded(kind):
  options = {"lossless": True} if kind == "WEBP" else {}
  image = decode(encoded(np.full((8, 8, 3), 80, np.uint8), kind, **options))
  assert np.abs(pixels.to_array(image).astype(int) - 80).max() <= 1


@pytest.mark.parametrize("kind", ["ICO", "EPS", "PCX", "TGA", "PDF"])
def test_no_other_format_is_opened(kind, monkeypatch):
  contents = encoded(ramp(16, 16), kind)
  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
  with pytest.raises(ValueError, match="is none of JPEG, PNG, "):
    decode(contents)


def png_of(width, height):
  """A PNG that says it is of this size; nothing more is in it."""
  start = bytearray(encoded(ramp(1, 1), "PNG")[:29])
  start[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
  crc = zlib.crc32(start[12:]).to_bytes(4, "big")
  return bytes(start) + crc + b"\x00\x00\x01\x00IDAT"


def test_the_limit_of_pixels_is_a_key(monkeypatch):
  with pytest.raises(ValueError, match="13000×13000 .*max_pixels=89478485 allows"):
    decode(png_of(13_000, 13_000))
  contents = encoded(ramp(8, 9), "PNG")
  with pytest.raises(ValueError, match="has 9×8 pixels, more .*max_pixels=71"):
    decode(contents, max_pixels=71)
  assert decode(contents, max_pixels=72).size == (9, 8)
  # Pillow's own limit does not stand in the way of a higher one.
  monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: None)
  assert decode(png_of(1, 200_000_000), max_pixels=10**9).height == 200_000_000


def test_alpha_is_dropped_without_a_word():
  hidden = np.dstack([ramp(4, 4), np.zeros((4, 4), np.uint8)])
  np.testing.assert_array_equal(
    pixels.to_array(decode(encoded(hidden, "PNG"))), ramp(4, 4)
  )
  palette = Image.fromarray(ramp(4, 4)).quantize(4)
  contents = encoded(palette, "PNG", transparency=b"\x00\x80\xff\xff")
  np.testing.assert_array_equal(  # a warning would be an error here
    pixels.to_array(decode(contents)), np.asarray(palette.convert("RGB"))
  )


def test_middle_keeps_seven_eighths_of_the_shorter_side():
  assert pixels.middle(ramp(375, 500), 224).shape == (224, 224, 3)
  assert pixels.middle(ramp(100, 50), 28).shape == (28, 28, 3)
  # 64×96 becomes 32×48 (a size of 28), and the middle 28 of both are kept: the
  # average of two columns 2i + 20 and 2i + 21, i from 0.
  image = pixels.middle(ramp(64, 96), 28).astype(int)
  assert abs(image[14, 0, 0] - 20.5) <= 1 and abs(image[14, -1, 0] - 74.5) <= 1
  assert abs(image[0, 14, 1] - 4.5) <= 1 and abs(image[-1, 14, 1] - 58.5) <= 1
  np.testing.assert_array_equal(pixels.middle(ramp(6, 9), 0), ramp(6, 9))


def test_a_line_is_not_resized_as_a_whole(monkeypatch):
  line = ramp(1, 60_000)
  assert pixels.middle(line, 224).shape == (224, 224, 3)
  assert pixels.middle(line.transpose(1, 0, 2), 224).shape == (224, 224, 3)
  whole = pixels.middle(ramp(64, 96), 28).astype(int)
  monkeypatch.setattr(pixels, "ENORMOUS", 0)
  part = pixels.middle(ramp(64, 96), 28)
  np.testing.assert_allclose(part, whole, atol=1)  # rounding of Pillow's


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
