"""1,797 handwritten digits of 8×8 pixels, embedded; DIGITS.md credits them.

    digits         each image once, as it is
    digits:mixed   and made hard, so that exits have easy and hard ones to tell
                   apart: 4 copies of each train image as it is and 4 made hard,
                   1 and 1 of each calibration and test image

Hard is fainter (0.4 to 1 times the ink), moved by up to one pixel, with a square
of 2×2 pixels hidden and noise of a tenth of the range. The draws are fixed.
"""

from __future__ import annotations

import pathlib

import numpy as np

COPIES = {"train": 4, "calibration": 1, "test": 1}  # as it is, and made hard
INK = 16  # the largest pixel
FAINTEST, HIDDEN, NOISE = 0.4, 2, 0.1


def read(kind: str) -> dict[str, np.ndarray]:
  """{split_images: uint8 [N 8 8 1], split_labels: int32 [N], class_names}.

  Args:
    kind: what follows the colon, "" or "mixed".
  """
  with np.load(pathlib.Path(__file__).with_name("digits.npz")) as found:
    arrays = dict(found)
  if kind == "mixed":
    # RandomState, whose draws no version of NumPy changes.
    draws = np.random.RandomState(0)
    for name, copies in COPIES.items():
      images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
      hard = [make_hard(images, draws) for _ in range(copies)]
      arrays[f"{name}_images"] = np.concatenate([images] * copies + hard)
      arrays[f"{name}_labels"] = np.tile(labels, 2 * copies)
  return arrays


def make_hard(images: np.ndarray, draws: np.random.RandomState) -> np.ndarray:
  """uint8 [N H W 1], the images made hard."""
  num, height, width, _ = images.shape
  ink = draws.uniform(FAINTEST, 1, (num, 1, 1, 1))
  moves = draws.randint(-1, 2, (num, 2))
  corners = draws.randint(0, (height - HIDDEN + 1, width - HIDDEN + 1), (num, 2))
  noise = draws.normal(0, NOISE * INK, images.shape)
  moved = np.zeros_like(images, float)
  for target, image, (down, right) in zip(moved, images, moves, strict=True):
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    target[:] = padded[1 - down :, 1 - right :][:height, :width]
  moved *= ink
  for image, (top, left) in zip(moved, corners, strict=True):
    image[top : top + HIDDEN, left : left + HIDDEN] = 0
  return np.clip(np.rint(moved + noise), 0, INK).astype(np.uint8)
