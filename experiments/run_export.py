"""JAX alone: `python run_export.py EXPORT_FOLDER IMAGES.npy`, uint8 [N H W c]."""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
from jax import export


def read(folder):
  """(manifest, stages as bytes) of an export folder that SHA256SUMS agrees with."""
  files = {}
  try:
    for line in pathlib.Path(folder, "SHA256SUMS").read_text().splitlines():
      digest, name = line.split()
      files[name] = pathlib.Path(folder, name).read_bytes()
      if hashlib.sha256(files[name]).hexdigest() != digest:
        raise ValueError(f"{name} is not what was exported")
    manifest = json.loads(files["manifest.json"])
    if manifest["stages"][0].endswith(".onnx"):
      sys.exit(f"{folder} is for onnxruntime; JAX reads --format=stablehlo")
    return manifest, [files[name] for name in manifest["stages"]]
  except (OSError, ValueError, KeyError) as error:
    sys.exit(f"{folder} is no whole export ({error}); copy it or export it again")


def load(folder):
  """(manifest, one function per stage) of an export folder."""
  manifest, data = read(folder)
  try:
    stages = [jax.jit(export.deserialize(stage).call) for stage in data]
    predict(manifest, stages, np.zeros((1, *manifest["image_shape"]), np.uint8))
    return manifest, stages
  except Exception as error:  # an older jax cannot read, or only not run it
    made = f"this export of jax {manifest['versions']['jax']}"
    sys.exit(f"cannot read {made}; use that version or a newer one ({error})")


def predict(manifest, stages, images, largest=256):
  """[N 3] label, exit counted from 1, confidence; stages stop for who has left."""
  answers = np.zeros((len(images), 3))
  for start in range(0, len(images), largest):
    rows = np.arange(len(images))[start : start + largest]
    arrays = [images[rows]]
    for k, stage in enumerate(stages):
      if n := len(rows):
        padded = np.arange(1 << (n - 1).bit_length()) % n  # to a power of two
        arrays = [np.asarray(x)[:n] for x in stage([x[padded] for x in arrays])]
        answers[rows] = np.stack([arrays[0], np.full(n, k + 1), arrays[1]], 1)
        stay = ~(arrays[1] >= np.float32(manifest["thresholds"][k]))
        rows, arrays = rows[stay], [x[stay] for x in arrays]
  return answers


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  manifest, stages = load(sys.argv[1])
  shape = tuple(manifest["image_shape"])
  try:
    images = np.load(sys.argv[2])
    if (images.dtype, images.shape[1:]) != (np.uint8, shape):
      raise ValueError(f"it is {images.dtype} {images.shape}")
  except (OSError, ValueError) as error:
    sys.exit(f"want a .npy file of uint8 [N, *{shape}]; {sys.argv[2]}: {error}")
  np.savetxt(sys.stdout, predict(manifest, stages, images), "%.9g")
