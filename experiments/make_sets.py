"""Writes the image sets of `protocol.md` from the real CIFAR-100 and the digits.

    python experiments/make_sets.py cifar100.npz sets

cifar100.npz holds train_images, train_labels, test_images, test_labels (uint8
[N 32 32 3]) and class_names. Two files of 16×16 pixels are written:

    sets/cifar16.npz      CIFAR-100, every 2×2 pixels averaged, 100 classes
    sets/populations.npz  two populations in one set of 30 classes: the 20 coarse
                          classes of CIFAR-100, and digits, enlarged to 12×12 and
                          placed anywhere; 60 % and 40 % of each split

The splits of a population share no image and, of digits, no writing: calibration
digits are those that the embedded set holds out. All draws are fixed.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from l2w_jax.data import digits, sources
from l2w_jax.run import files
from l2w_jax.run.command import one_line_errors

# Krizhevsky (2009): the fine classes of each coarse class.
COARSE = {
  "aquatic mammals": "beaver dolphin otter seal whale",
  "fish": "aquarium_fish flatfish ray shark trout",
  "flowers": "orchid poppy rose sunflower tulip",
  "food containers": "bottle bowl can cup plate",
  "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
  "household electrical devices": "clock keyboard lamp telephone television",
  "household furniture": "bed chair couch table wardrobe",
  "insects": "bee beetle butterfly caterpillar cockroach",
  "large carnivores": "bear leopard lion tiger wolf",
  "large man-made outdoor things": "bridge castle house road skyscraper",
  "large natural outdoor scenes": "cloud forest mountain plain sea",
  "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
  "medium-sized mammals": "fox porcupine possum raccoon skunk",
  "non-insect invertebrates": "crab lobster snail spider worm",
  "people": "baby boy girl man woman",
  "reptiles": "crocodile dinosaur lizard snake turtle",
  "small mammals": "hamster mouse rabbit shrew squirrel",
  "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
  "vehicles 1": "bicycle bus motorcycle pickup_truck train",
  "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
SIZE, DIGIT = 16, 12  # pixels
# Split -> (images of CIFAR-100, digits).
COUNTS = {"train": (12_000, 8_000), "calibration": (3_000, 2_000)}
COUNTS["test"] = (6_000, 4_000)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays of cifar16.npz from a file of CIFAR-100.

  Raises:
    ValueError: it is no such file.
  """
  opener = sources.SOURCES["npz:PATH"]  # it says what is wrong with a file
  checked = opener(str(path), ConfigDict({"source": f"npz:{path}"}))
  shape = checked.train.images.shape[1:]
  fine = {name for names in COARSE.values() for name in names.split()}
  if shape != (32, 32, 3) or set(checked.class_names) != fine:
    raise ValueError(
      f"{path} is not CIFAR-100, 32×32×3 pixels and class_names of the {len(fine)} "
      f"fine classes: it has {shape} and {', '.join(checked.class_names[:3])} …"
    )
  needed = {
    "train": COUNTS["train"][0] + COUNTS["calibration"][0],
    "test": COUNTS["test"][0],
  }
  arrays = {}
  with np.load(path) as found:  # as it stands there: what is drawn depends on it
    for split, count in needed.items():
      labels = found[f"{split}_labels"]
      if len(labels) < count:
        raise ValueError(
          f"{path} has {len(labels)} {split} images, and the sets need {count:,}"
        )
      arrays[f"{split}_images"] = halved(found[f"{split}_images"])
      arrays[f"{split}_labels"] = labels
    arrays["class_names"] = found["class_names"]
  return arrays


def halved(images: np.ndarray) -> np.ndarray:
  """uint8 [N H/2 W/2 channels], every 2×2 pixels averaged and rounded."""
  n, height, width, channels = images.shape
  blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels)
  return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def placed_digits(
  images: np.ndarray, labels: np.ndarray, count: int, draws: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
  """Digits enlarged and placed anywhere, in grey: uint8 [count 16 16 3], labels."""
  chosen = np.arange(count) % len(images)
  found = np.zeros((count, SIZE, SIZE), np.uint8)
  large = [
    np.asarray(Image.fromarray(x).resize((DIGIT, DIGIT), Image.Resampling.BILINEAR))
    for x in np.rint(images[..., 0] * (255 / digits.INK)).astype(np.uint8)
  ]
  places = draws.randint(0, SIZE - DIGIT + 1, (count, 2))
  for target, i, (top, left) in zip(found, chosen, places, strict=True):
    target[top : top + DIGIT, left : left + DIGIT] = large[i]
  return np.repeat(found[..., None], 3, axis=-1), labels[chosen]


def populations(cifar: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Arrays of populations.npz from those of cifar16.npz."""
  coarse_of = {
    fine: i for i, fines in enumerate(COARSE.values()) for fine in fines.split()
  }
  coarse = np.array([coarse_of[str(name)] for name in cifar["class_names"]])
  draws, written = np.random.RandomState(0), digits.read("")
  order = draws.permutation(len(cifar["train_labels"]))
  first = COUNTS["train"][0]
  rows = {
    "train": order[:first],
    "calibration": order[first : first + COUNTS["calibration"][0]],
    "test": draws.permutation(len(cifar["test_labels"]))[: COUNTS["test"][0]],
  }
  arrays = {}
  for split, (_, count) in COUNTS.items():
    source = "test" if split == "test" else "train"
    images, labels = placed_digits(
      written[f"{split}_images"], written[f"{split}_labels"], count, draws
    )
    arrays[f"{split}_images"] = np.concatenate(
      [cifar[f"{source}_images"][rows[split]], images]
    )
    arrays[f"{split}_labels"] = np.concatenate(
      [coarse[cifar[f"{source}_labels"][rows[split]]], len(COARSE) + labels]
    )
  names = [*COARSE, *(f"digit {name}" for name in written["class_names"])]
  return arrays | {"class_names": np.array(names)}


def main(arguments=None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("cifar100", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  options = parser.parse_args(arguments)
  with one_line_errors():
    cifar = read(options.cifar100)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in ("cifar16", cifar), ("populations", populations(cifar)):
      path = options.folder / f"{name}.npz"
      files.write_arrays(path, **arrays)
      print(path)


if __name__ == "__main__":
  main()
