"""A network's stages and its `answer` as ONNX models, by jax2onnx.

They compute what those of `export` do. Stage 1 takes `images`, the others
`before_label`, `before_confidence` …: what the stage before returned as `label`,
`confidence`, `logits`, `carry_1` …, in that order. `answer` takes `image` and
returns `label`, `exit`, `confidence`, `logits` and `probabilities`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from l2w_jax.exits import early_exit

OPSET = 21
RESULTS = ("label", "confidence", "logits")


def check() -> None:
  """Raises ValueError where a package that ONNX needs is not installed."""
  for name in ("jax2onnx", "onnx"):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"ONNX needs {name}, which is not installed: pip install 'l2w_jax[onnx]'"
      )


def make_stages(network: early_exit.EarlyExit) -> list[Any]:
  """One `onnx.ModelProto` per stage, with a free batch size B."""
  import jax2onnx

  names = ["images"]
  arguments = [jax.ShapeDtypeStruct((1, *network.backbone.image_shape), np.uint8)]
  models = []
  for k in range(network.backbone.num_exits):

    def stage(*arrays, k=k):
      state = network.stage(
        k, arrays[0] if k == 0 else early_exit.State(*arrays[:3], list(arrays[3:]))
      )
      return (*state[:3], *state.carry)

    found = jax.eval_shape(stage, *arguments)
    outputs = [*RESULTS, *(f"carry_{i}" for i in range(1, len(found) - 2))]
    with _quiet():
      model = jax2onnx.to_onnx(
        stage,
        [jax.ShapeDtypeStruct(("B", *x.shape[1:]), x.dtype) for x in arguments],
        model_name=f"stage_{k + 1}",
        opset=OPSET,
        input_names=names,
      )
    # It gives what a stage hands on unchanged one name, not two.
    for output, name in zip(model.graph.output, outputs, strict=True):
      model.graph.node.add(op_type="Identity", input=[output.name], output=[name])
      output.name = name
    models.append(model)
    names, arguments = [f"before_{name}" for name in outputs], found
  return models


def make_answer(network: early_exit.EarlyExit, stages: list[Any]) -> Any:
  """The `onnx.ModelProto` of `answer`, joined from the stages' models.

  Stage k + 1 is a branch of an `If` after stage k. jax2onnx 0.17.1 converts
  `lax.cond` too, but loses constants that only its branches use.
  """
  import onnx
  from onnx import helper

  integer, real = onnx.TensorProto.INT32, onnx.TensorProto.FLOAT
  num_classes = network.backbone.num_classes
  shapes = {
    "label": (integer, [1]),
    "exit": (integer, [1]),
    "confidence": (real, [1]),
    "logits": (real, [1, num_classes]),
  }

  def outputs(where):
    return [
      helper.make_tensor_value_info(f"{where}/{name}", *shape)
      for name, shape in shapes.items()
    ]

  def identities(before, after):
    return [
      helper.make_node("Identity", [a], [b])
      for a, b in zip(before, after, strict=True)
    ]

  def constant(name, kind, shape, values):
    value = helper.make_tensor(name, kind, shape, values)
    return helper.make_node("Constant", [], [name], value=value)

  def graph(k, inputs):
    """The answer for an image that has come to stage k, ordered as `shapes`."""
    stage = onnx.compose.add_prefix(stages[k], f"stage_{k}/").graph
    found = [x.name for x in stage.output]
    nodes = [*identities(inputs, [x.name for x in stage.input]), *stage.node]
    leave = [
      *identities(found[:3], [f"leave_{k}/{name}" for name in RESULTS]),
      constant(f"leave_{k}/exit", integer, [1], [k + 1]),
    ]
    if k + 1 == network.backbone.num_exits:
      nodes, where = [*nodes, *leave], f"leave_{k}"
    else:
      where = f"answer_{k}"
      nodes += [
        constant(f"threshold_{k}", real, [1], [network.thresholds[k]]),
        helper.make_node(
          "GreaterOrEqual", [found[1], f"threshold_{k}"], [f"leaves_{k}"]
        ),
        helper.make_node(
          "If",
          [f"leaves_{k}"],
          [x.name for x in outputs(where)],
          then_branch=helper.make_graph(
            leave, f"leave_{k}", [], outputs(f"leave_{k}")
          ),
          else_branch=graph(k + 1, found),
        ),
      ]
    return helper.make_graph(nodes, where, [], outputs(where), stage.initializer)

  batch = graph(0, ["images"])
  first = constant("first", onnx.TensorProto.INT64, [1], [0])
  image = (onnx.TensorProto.UINT8, network.backbone.image_shape)
  one = helper.make_graph(
    [
      first,
      helper.make_node("Unsqueeze", ["image", "first"], ["images"]),
      *batch.node,
      *(
        helper.make_node("Squeeze", [x.name, "first"], [name])
        for x, name in zip(batch.output, shapes, strict=True)
      ),
      helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ],
    "answer",
    [helper.make_tensor_value_info("image", *image)],
    [
      helper.make_tensor_value_info(name, kind, shape[1:])
      for name, (kind, shape) in {
        **shapes,
        "probabilities": shapes["logits"],
      }.items()
    ],
    batch.initializer,
  )
  model = helper.make_model(
    one,
    producer_name="l2w_jax",
    ir_version=stages[0].ir_version,
    opset_imports=[helper.make_opsetid("", OPSET)],
  )
  onnx.checker.check_model(model)
  return model


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
  """Without what jax2onnx says of shapes and dtypes that it chooses itself."""
  logger = logging.getLogger("onnx_ir.serde")
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "Explicitly requested dtype float64")
      yield
  finally:
    logger.setLevel(before)
