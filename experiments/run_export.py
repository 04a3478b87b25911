"""JAX alone: `python run_export.py EXPORT_FOLDER IMAGES.npy`, uint8 [N H W c]."""

import json
import pathlib
import sys

import jax
import numpy as np
from jax import export


def load(folder):
  """(manifest, one function per stage) of an export folder."""
  manifest = json.loads(pathlib.Path(folder, "manifest.json").read_text())
  data = [pathlib.Path(folder, name).read_bytes() for name in manifest["stages"]]
  black = np.zeros((1, *manifest["image_shape"]), np.uint8)
  try:
    stages = [jax.jit(export.deserialize(stage).call) for stage in data]
    predict(manifest, stages, black)  # some versions read but cannot run it
    return manifest, stages
  except Exception as error:  # an older jax fails in ways of its own
    reason = (
      f"cannot read this export of jax {manifest['jax']}; use that version or"
    )
    sys.exit(f"jax {jax.__version__} {reason} a newer one ({error})")


def predict(manifest, stages, images):
  """(labels, exits counted from 1, confidences), each [N]; who leaves, stops."""
  answers = np.zeros((3, len(images)))
  rows, arrays = np.arange(len(images)), [images]
  for k, stage in enumerate(stages):
    arrays = [np.asarray(x) for x in stage(arrays)]
    leave = arrays[1] >= np.float32(manifest["thresholds"][k])
    answers[:, rows] = arrays[0], np.full(len(rows), k + 1), arrays[1]
    rows, arrays = rows[~leave], [x[~leave] for x in arrays]
    if not len(rows) or k + 1 == len(stages):
      return answers[0].astype(int), answers[1].astype(int), answers[2]


if __name__ == "__main__":
  found = predict(*load(sys.argv[1]), np.load(sys.argv[2]))
  np.savetxt(sys.stdout, np.transpose(found), "%.9g")
