"""An exported network as ONNX, checked against onnxruntime.

Needs an environment of its own, because jax2onnx pins an older Orbax:

    python -m venv onnx && onnx/bin/pip install jax2onnx onnxruntime
    onnx/bin/pip install ml_collections optax && onnx/bin/pip install --no-deps -e .
    onnx/bin/python experiments/export_onnx.py RUN/export OUT.onnx

and, without a run, `--config=configs/cifar100_ranet.py` for random weights. The
file maps float images [B H W channels], normalised, to the logits [B K C] of
every exit; it is checked on batches of 1 and 5.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
import onnxruntime
from flax import traverse_util
from jax2onnx import to_onnx

from l2w_jax import config as config_lib
from l2w_jax import models


def network_of(source, config_file, image_size):
  """(backbone, variables) of an export folder, or random ones of a config."""
  if config_file:
    config = config_lib.load_config(config_file)
    backbone = models.build_backbone(config.model, 100, (image_size, image_size, 3))
    return backbone, backbone.init(jax.random.key(0))
  folder = pathlib.Path(source)
  manifest = json.loads((folder / "manifest.json").read_text())
  config = config_lib.from_dict(json.loads((folder / "config.json").read_text()))
  backbone = models.build_backbone(
    config.model, len(manifest["class_names"]), tuple(manifest["image_shape"])
  )
  with np.load(folder / "variables.npz") as arrays:
    return backbone, traverse_util.unflatten_dict(dict(arrays), sep="/")


def main():
  """Writes the file and prints the largest difference."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("source", nargs="?", help="export folder of a run")
  parser.add_argument("output", help="ONNX file to write")
  parser.add_argument("--config", help="random weights of a config instead")
  parser.add_argument("--image-size", type=int, default=32)
  arguments = parser.parse_args()
  if not (arguments.source or arguments.config):
    parser.error("give an export folder or --config")
  backbone, variables = network_of(
    arguments.source, arguments.config, arguments.image_size
  )
  variables = jax.tree.map(np.asarray, variables)

  def forward(images):
    return backbone.apply(variables, images)

  to_onnx(
    forward,
    [("B", *backbone.image_shape)],
    return_mode="file",
    output_path=arguments.output,
  )
  session = onnxruntime.InferenceSession(
    arguments.output, providers=["CPUExecutionProvider"]
  )
  name = session.get_inputs()[0].name
  for batch in (1, 5):
    images = (
      np.random.default_rng(batch)
      .normal(size=(batch, *backbone.image_shape))
      .astype(np.float32)
    )
    expected = np.asarray(jax.jit(forward)(images))
    found = session.run(None, {name: images})[0]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(
      f"batch {batch}: logits {found.shape}, largest difference {error:.1e} "
      "of the largest logit"
    )
    if found.shape != expected.shape or not error < 1e-4:
      raise SystemExit("the ONNX file does not compute the network")


if __name__ == "__main__":
  main()
