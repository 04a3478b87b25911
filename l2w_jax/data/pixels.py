"""One image at a time, on the host: decoding, resizing and cropping by Pillow.

Pillow is what the released code reads images with: its bilinear filter widens
when it shrinks an image (antialiasing), and it lets go of the interpreter while
it decodes and resizes, so threads are enough to use every core.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

Pixels = Image.Image | np.ndarray

AREA = (0.08, 1.0)  # of the image, that a random crop covers
ASPECT = (3 / 4, 4 / 3)  # width over height of a random crop
SHOWN = 0.875  # of the shorter side, that the middle of an image keeps: 224/256


def decode(encoded: bytes, channels: int) -> Image.Image:
  """The image in a JPEG, PNG or other file; grey for one channel, else RGB.

  Raises:
    OSError, SyntaxError, ValueError, EOFError: what Pillow says of a broken file.
  """
  image = Image.open(io.BytesIO(encoded))
  mode = "L" if channels == 1 else "RGB"
  image.load()
  return image if image.mode == mode else image.convert(mode)


def to_array(image: Pixels) -> np.ndarray:
  """uint8 [H W channels]."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def middle(image: Pixels, size: int) -> np.ndarray:
  """uint8 [size size channels]: what evaluation looks at.

  The shorter side is resized to size / 0.875 (256 for 224), and the middle
  square is cut out. A size of 0 leaves the image as it is.
  """
  if size == 0:
    return to_array(image)
  image = _as_image(image)
  shorter = round(size / SHOWN)
  scale = shorter / min(image.size)
  # The longer side is rounded down, as torchvision does.
  width, height = (
    shorter if side == min(image.size) else int(side * scale + 1e-9)
    for side in image.size
  )
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return to_array(image.crop((left, top, left + size, top + size)))


def random_box(
  width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of a random crop, in whole pixels.

  Its area is uniform in `AREA` of the image, the logarithm of its aspect uniform
  in that of `ASPECT`, its place uniform. After ten draws that do not fit: the
  largest middle box whose aspect is allowed. (Szegedy et al., CVPR 2015, as
  released.)
  """
  for _ in range(10):
    area = width * height * rng.uniform(*AREA)
    aspect = math.exp(rng.uniform(*map(math.log, ASPECT)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w + 1))
      top = int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * ASPECT[1]))
  h = min(height, round(width / ASPECT[0]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_crop(image: Pixels, size: int, rng: np.random.Generator) -> np.ndarray:
  """uint8 [size size channels]: a `random_box` of the image, resized."""
  image = _as_image(image)
  box = random_box(*image.size, rng)
  return to_array(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))


def _as_image(image: Pixels) -> Image.Image:
  if isinstance(image, Image.Image):
    return image
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
