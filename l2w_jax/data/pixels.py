"""One image at a time, on the host: decoding, resizing and cropping by Pillow.

Pillow is what the released code reads images with: its bilinear filter widens
when it shrinks an image (antialiasing), and it lets go of the interpreter while
it decodes and resizes, so threads are enough to use every core.

As in torchvision, alpha is dropped, with the colours that it hid showing, the
first frame stands for all, and an EXIF orientation is not applied: images that a
camera has marked as turned are seen as they are stored.
"""

from __future__ import annotations

import io
import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

# What is decoded, whatever a file is called, and the suffixes that class folders
# are searched for. Pillow knows others, some of which start programs (EPS).
FORMATS = {
  "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
  "PNG": (".png",),
  "WEBP": (".webp",),
  "BMP": (".bmp",),
  "TIFF": (".tif", ".tiff"),
  "GIF": (".gif",),
  "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
# config.data.max_pixels is the limit; Pillow's own knows no key to raise it by.
Image.MAX_IMAGE_PIXELS = None

Pixels = Image.Image | np.ndarray

BITS_PER_SAMPLE = 258  # tag of a TIFF file
AREA = (0.08, 1.0)  # of the image, that a random crop covers
ASPECT = (3 / 4, 4 / 3)  # width over height of a random crop
# Pixels of a resized image above which, as of a line one pixel wide, only what is
# kept of it is computed; rounding then differs by 1 in places.
ENORMOUS = 2**28
SHOWN = 0.875  # of the shorter side, that the middle of an image keeps: 224/256


def decode(encoded: bytes, channels: int, config: ConfigDict) -> Image.Image:
  """The image in a file of one of `FORMATS`; grey for one channel, else RGB.

  Greys of more than 8 bits are scaled so that white becomes 255; colours of more
  than 8 bits are cut to their upper 8 by Pillow.

  Args:
    encoded: the file.
    channels: 1 or 3.
    config: the data config, for `max_pixels` and `grey_range`.

  Raises:
    ValueError: another format, too many pixels, or greys out of range.
    OSError, SyntaxError, ValueError, EOFError: what Pillow says of a broken file.
  """
  try:
    image = Image.open(io.BytesIO(encoded), formats=list(FORMATS))
  except UnidentifiedImageError as error:
    raise ValueError(f"is none of {', '.join(FORMATS)}, or damaged") from error
  width, height = image.size
  if width * height > config.max_pixels:
    raise ValueError(
      f"has {width}×{height} pixels, more than "
      f"config.data.max_pixels={config.max_pixels} allows"
    )
  image.load()
  if image.mode.startswith(("I", "F")):
    image = _eight_bits(image, config.grey_range)
  if image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")  # or Pillow warns of what is dropped
  mode = "L" if channels == 1 else "RGB"
  return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image, grey_range: float) -> Image.Image:
  """A grey image of more than 8 bits, scaled from 0 … white to 0 … 255."""
  white = grey_range or _white(image)
  values = np.asarray(image).astype(np.float64)
  low, high = values.min(), values.max()
  if not (low >= 0 and high <= white):  # NaN is neither
    raise ValueError(
      f"holds grey values from {low:g} to {high:g}, and white is {white:g}; set "
      "config.data.grey_range to the value that is white, or save the file anew "
      "with values from 0 on"
    )
  return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _white(image: Image.Image) -> float:
  """The largest grey value that a file of this kind can hold."""
  if image.mode == "F":
    return 1.0
  if image.format in ("PNG", "PPM"):  # Pillow has scaled the latter
    return 2.0**16 - 1
  if image.mode.startswith("I;16"):
    tags = image.tag_v2  # ty: ignore[missing-attribute]
    return 2.0 ** tags[BITS_PER_SAMPLE][0] - 1
  raise ValueError(
    "holds whole numbers with a sign or of 32 bits, which do not say what white "
    "is; set config.data.grey_range to its value"
  )


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
  left, top = round((width - size) / 2), round((height - size) / 2)
  if width * height > ENORMOUS:
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return to_array(image.resize((size, size), Image.Resampling.BILINEAR, box))
  image = image.resize((width, height), Image.Resampling.BILINEAR)
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
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
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
