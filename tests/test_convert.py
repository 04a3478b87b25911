"""Released weights in and back: names, layouts, nesting, and what is refused.

The names of the published networks, in order, are compared in test_golden.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from conftest import enable_x64

import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax import convert
from l2w_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
NETWORKS = {
  "msdnet": dict(num_exits=2),
  "msdnet, no bottleneck": dict(num_exits=2, bottleneck=False),
  "msdnet, imagenet": dict(
    num_exits=2, stem="imagenet", step=3, classifier_width=0
  ),
  "ranet, imagenet": dict(
    blocks=1, block_step=1, stem="imagenet", growth=8, classifier_width=0
  ),
}


def build(name="msdnet", num_classes=5, **deviating):
  model = config_lib.defaults(name.partition(",")[0]).model
  model.update(channels=4, growth=4, classifier_width=6)
  model.update(NETWORKS[name] | deviating)
  return l2w.build_backbone(model, num_classes, (32, 32, 3))


def released(backbone, seed=0):
  """A state_dict of the backbone with a different number everywhere."""
  rng = np.random.default_rng(seed)
  template = convert.export_released(backbone.init(jax.random.key(0)), backbone)
  drawn = {
    name: rng.normal(size=x.shape).astype(np.float32)
    if x.dtype == np.float32
    else x
    for name, x in template.items()
  }
  return {
    name: abs(x) if name.endswith("running_var") else x for name, x in drawn.items()
  }


def assert_equal(ours, theirs):
  assert list(ours) == list(theirs)
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], err_msg=name)
    assert x.dtype == theirs[name].dtype


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back(name):
  backbone = build(name)
  state_dict = released(backbone)
  variables = convert.import_released(state_dict, backbone)
  assert_equal(convert.export_released(variables, backbone), state_dict)


def test_layouts():
  """By hand: a torch kernel is [out in height width], a linear one [out in]."""
  backbone = build()
  state_dict = released(backbone)
  variables = convert.import_released(state_dict, backbone)
  params = variables["params"]
  torch = state_dict["blocks.0.0.layers.1.net.0.weight"]
  ours = params["blocks_0_0"]["layers_1"]["conv"]["kernel"]
  assert ours[0, 2, 3, 5] == torch[5, 3, 0, 2]
  torch = state_dict["classifier.1.linear.weight"]
  assert params["classifier_1"]["linear"]["kernel"][3, 4] == torch[4, 3]
  # Within a bottleneck: 0, 1 are the 1×1 and its BatchNorm, 3, 4 the 3×3's.
  layer = params["blocks_1_0"]["layers_1_conv_down"]
  prefix = "blocks.1.0.layers.1.conv_down.net"
  np.testing.assert_array_equal(
    layer["reduce"]["bn"]["scale"], state_dict[f"{prefix}.1.weight"]
  )
  np.testing.assert_array_equal(
    layer["spatial"]["bn"]["bias"], state_dict[f"{prefix}.4.bias"]
  )
  stats = variables["batch_stats"]["blocks_1_0"]["layers_1_conv_down"]
  np.testing.assert_array_equal(
    stats["spatial"]["bn"]["var"], state_dict[f"{prefix}.4.running_var"]
  )


@pytest.mark.parametrize(
  "wrap",
  [
    lambda weights: {f"module.{name}": x for name, x in weights.items()},
    lambda weights: {"epoch": 3, "state_dict": weights},
    lambda weights: {"model": {f"module.{n}": x for n, x in weights.items()}},
    lambda weights: {n: x for n, x in weights.items() if "num_batc" not in n},
    lambda weights: {f"module._orig_mod.{name}": x for name, x in weights.items()},
    lambda weights: {f"module.module.{name}": x for name, x in weights.items()},
    lambda weights: {
      n.replace("blocks.0.", "blocks.0._orig_mod."): x for n, x in weights.items()
    },
    lambda weights: {
      "state_dict": {f"model.net.{n}": x for n, x in weights.items()}
      | {"criterion.weight": np.ones(3)},
      "epoch": 3,
    },
    lambda weights: {"epoch": 3, "model_state_dict": weights},
    lambda weights: {"a": {"b": {"net": weights}}},
    lambda weights: {
      "net": weights,
      "optimizer": {"state": {0: {"momentum_buffer": np.ones((2, 2))}}},
    },
    lambda weights: dict(sorted(weights.items(), reverse=True)) | {"epoch": 3},
  ],
  ids=[
    "prefix",
    "state_dict",
    "model and prefix",
    "no counters",
    "compiled",
    "twice",
    "a part compiled",
    "Lightning",
    "model_state_dict",
    "deep",
    "optimizer",
    "another order",
  ],
)
def test_how_training_scripts_save(wrap):
  backbone = build()
  state_dict = released(backbone)
  variables = convert.import_released(wrap(state_dict), backbone)
  assert_equal(convert.export_released(variables, backbone), state_dict)


def test_of_two_that_fit_the_first_is_taken_and_named(caplog):
  backbone = build()
  first, second = released(backbone, 1), released(backbone, 2)
  variables = convert.import_released({"ema": first, "model": second}, backbone)
  assert_equal(convert.export_released(variables, backbone), first)
  assert "behind 'ema.' and 'model.'; the first are taken" in caplog.text
  caplog.clear()
  second.popitem()
  second.popitem()
  convert.import_released({"model": second, "ema": first}, backbone)
  assert not caplog.text


def test_a_dictionary_in_itself():
  content = released(build())
  content["self"] = {"again": content}
  assert len(convert._arrays(content)) == sum(
    np.ndim(x) > 0 for x in released(build()).values()
  )


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("given", ["float16", "float32", "float64"])
def test_precision(given, x64):
  backbone = build()
  state_dict = {
    name: x.astype(given) if x.dtype == np.float32 else x
    for name, x in released(backbone).items()
  }
  with enable_x64(x64):
    variables = convert.import_released(state_dict, backbone)
  expected = "float64" if x64 and given == "float64" else "float32"
  assert {x.dtype.name for x in jax.tree.leaves(variables)} == {expected}


def test_names_that_are_missing_or_unknown():
  backbone = build()
  state_dict = released(backbone)
  first = next(iter(state_dict))
  state_dict["fc.weight"] = state_dict.pop(first)
  with pytest.raises(
    ValueError,
    match=(
      rf"1 name\(s\) missing, first {first}; 1 name\(s\) unknown, first "
      r"fc\.weight; check model.name"
    ),
  ):
    convert.import_released(state_dict, backbone)
  with pytest.raises(ValueError, match="missing.*unknown.*check model.name"):
    convert.import_released(released(build("ranet, imagenet")), backbone)


@pytest.mark.parametrize(
  "given, wanted, says", [(3, 2, "1 exits less"), (2, 3, "1 exits more")]
)
def test_other_numbers_of_exits(given, wanted, says):
  with pytest.raises(ValueError, match=f"the config has {says} than it.*num_exits"):
    convert.import_released(
      released(build(num_exits=given)), build(num_exits=wanted)
    )


def test_parameters_without_statistics():
  state_dict = released(build())
  state_dict = {n: x for n, x in state_dict.items() if "running" not in n}
  with pytest.raises(
    ValueError, match=r"named_parameters.*save the state_dict\(\)"
  ):
    convert.import_released(state_dict, build())


@pytest.mark.parametrize("kind", ["complex64", "U3"])
def test_weights_that_are_no_real_numbers(kind):
  state_dict = released(build())
  name = next(iter(state_dict))
  state_dict[name] = state_dict[name].astype(kind)
  with pytest.raises(ValueError, match=r"a weight of shape \(4, 3, 3, 3\), is"):
    convert.import_released(state_dict, build())


@pytest.mark.parametrize(
  "name, value",
  [("weight", np.nan), ("running_mean", np.inf), ("running_var", -0.1)],
)
def test_weights_that_cannot_work(name, value):
  state_dict = released(build())
  name = next(found for found in state_dict if found.endswith(name))
  state_dict[name].flat[0] = value
  with pytest.raises(ValueError, match=f"^{name} holds NaN, infinite or, of a var"):
    convert.import_released(state_dict, build())


@pytest.mark.parametrize("kind", ["int8", "bool"])
def test_weights_that_are_whole_numbers(kind):
  state_dict = released(build())
  name = next(iter(state_dict))
  state_dict[name] = state_dict[name].astype(kind)
  with pytest.raises(ValueError, match=f"^{name}, a weight of shape .* is {kind},"):
    convert.import_released(state_dict, build())


def test_a_pipe_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "pipe.pth")
  with pytest.raises(ValueError, match="pipe.pth is a pipe or a device; copy it"):
    convert.load_torch(tmp_path / "pipe.pth")


def test_other_numbers_of_classes():
  with pytest.raises(
    ValueError,
    match=(
      r"4 shape\(s\) differ, first classifier\.0\.linear\.weight: \(7, 6\) in "
      r"the checkpoint, \(5, 6\) expected; check num_classes"
    ),
  ):
    convert.import_released(released(build(num_classes=7)), build())


def test_other_widths():
  with pytest.raises(
    ValueError,
    match=(
      r"first blocks\.0\.0\.layers\.0\.net\.0\.weight: \(8, 3, 3, 3\) in the "
      r"checkpoint, \(4, 3, 3, 3\) expected; check .*model.channels"
    ),
  ):
    convert.import_released(released(build(channels=8)), build())
  with pytest.raises(
    ValueError, match=(r"first blocks\.0\.1\.layers\.0\.conv_normal.*model.growth")
  ):
    convert.import_released(released(build(growth=2)), build())


def test_export_of_another_networks_variables():
  variables = build(num_classes=7).init(jax.random.key(0))
  with pytest.raises(
    ValueError,
    match=(r"classifier_0/linear/\w+ is \(.*7,?\) and should be \(.*5,?\)"),
  ):
    convert.export_released(variables, build())


def released_wpn(*widths):
  rng = np.random.default_rng(0)
  layers = [
    "first_hidden_layer.fc",
    *(f"rest_hidden_layers.{i}.fc" for i in range(len(widths) - 3)),
    "output_layer",
  ]
  return {
    f"{layer}.{leaf}": rng.normal(size=shape).astype(np.float32)
    for i, layer in enumerate(layers)
    for leaf, shape in (
      ("weight", (widths[i + 1], widths[i])),
      ("bias", (widths[i + 1],)),
    )
  }


@pytest.mark.parametrize("widths", [(5, 7, 5), (10, 7, 6, 8, 5)])
def test_wpn_there_and_back(widths):
  state_dict = released_wpn(*widths)
  params = convert.import_released_wpn(
    {"model": {f"module.{name}": x for name, x in state_dict.items()}}
  )
  assert params["hidden_0"]["kernel"].shape == widths[:2]
  assert params["output"]["kernel"].shape == widths[-2:]
  assert_equal(convert.export_released_wpn(params), state_dict)


def test_what_is_not_a_wpn():
  state_dict = released_wpn(5, 7, 6, 5)
  state_dict["output_layer.weight"] = np.zeros((5, 9), np.float32)
  with pytest.raises(
    ValueError,
    match=(r"output_layer.weight: \(5, 9\) in the checkpoint, \(5, 6\) expected"),
  ):
    convert.import_released_wpn(state_dict)
  with pytest.raises(ValueError, match=r"missing, first first_hidden_layer"):
    convert.import_released_wpn(released(build()))


def tiny_config():
  config = config_lib.load_config(
    str(ROOT / "configs" / "digits.py"),
    {
      "model.num_exits": 2,
      "model.channels": 4,
      "model.growth": 4,
      "model.classifier_width": 6,
    },
  )
  return config, convert.build_backbone(config, 10, 1)


def test_a_run_directory_of_released_weights(tmp_path):
  config, backbone = tiny_config()
  state_dict = released(backbone)
  convert.write_workdir(
    convert.import_released(state_dict, backbone),
    config,
    backbone,
    tmp_path / "run",
  )
  state, info = checkpoint.restore(tmp_path / "run", config, backbone)
  assert info["complete"]
  assert int(state.step) == 0
  assert_equal(
    convert.export_released(
      {"params": state.params, "batch_stats": state.batch_stats}, backbone
    ),
    state_dict,
  )
  with pytest.raises(ValueError, match="holds a run already; name another"):
    convert.write_workdir(
      backbone.init(jax.random.key(0)), config, backbone, tmp_path / "run"
    )


@pytest.mark.parametrize("name", ["msdnet", "msdnet, imagenet", "ranet, imagenet"])
def test_no_images_are_needed(tmp_path, monkeypatch, name):
  """Classes and channels are those of the weights, there and back."""
  config = config_lib.defaults(name.partition(",")[0])
  config.model.update(channels=4, growth=4, classifier_width=6)
  config.model.update(NETWORKS[name])
  config.data.update(source=f"folder:{tmp_path}/nowhere")
  state_dict = released(l2w.build_backbone(config.model, 7, (64, 64, 1)))
  monkeypatch.setattr(convert, "load_torch", lambda path: {"model": state_dict})
  saved = {}
  monkeypatch.setattr(convert, "save_torch", lambda path, x: saved.update(x))
  convert.convert(tmp_path / "x.pth", config, tmp_path / "run")
  convert.export(tmp_path / "run", tmp_path / "out.pth")
  assert_equal(saved, state_dict)


def test_without_pytorch(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "torch", None)  # import raises
  for use in (
    lambda: convert.load_torch(tmp_path / "x.pth"),
    lambda: convert.save_torch(tmp_path / "x.pth", {}),
  ):
    with pytest.raises(ValueError, match=r"pip install 'l2w_jax\[torch\]'"):
      use()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["x.pth", "--config=absent.py", "--workdir=w"], "absent.py"),
    (["x.pth", "--workdir=w"], "give RELEASED.pth.tar with --config"),
    (["--workdir=w"], "give RELEASED.pth.tar with --config"),
    (["x.pth", "--config=configs/digits.py"], "--workdir"),
    (["--export=x.pth", "--workdir=absent"], "absent does not exist"),
  ],
)
def test_the_command_fails_in_one_line(arguments, message):
  done = subprocess.run(
    [sys.executable, "-m", "l2w_jax.convert", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  assert done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert message in line


class TestWithPyTorch:
  """What PyTorch writes and reads; skipped where it is not installed."""

  @pytest.fixture(autouse=True)
  def torch(self):
    self.torch = pytest.importorskip("torch")

  def save(self, path, **content):
    weights = {"weight": self.torch.ones(2)}
    self.torch.save({"state_dict": weights, **content}, path)
    return path

  def test_there_and_back_through_files(self, tmp_path):
    config, backbone = tiny_config()
    state_dict = released(backbone)
    convert.save_torch(tmp_path / "released.pth", state_dict)
    convert.convert(tmp_path / "released.pth", config, tmp_path / "run")
    convert.export(tmp_path / "run", tmp_path / "exported.pth")
    loaded = self.torch.load(tmp_path / "exported.pth", weights_only=True)
    assert_equal({name: x.numpy() for name, x in loaded.items()}, state_dict)

  def imported(self, tmp_path, change):
    """Variables of a file of changed weights, and of the weights themselves."""
    backbone = build()
    weights = {
      name: self.torch.from_numpy(np.array(x))
      for name, x in released(backbone).items()
    }
    self.torch.save(change(weights), tmp_path / "x.pth")
    return tuple(
      convert.import_released(x, backbone)
      for x in (convert.load_torch(tmp_path / "x.pth"), released(backbone))
    )

  def test_bfloat16(self, tmp_path):
    found, given = self.imported(
      tmp_path, lambda weights: {n: x.bfloat16() for n, x in weights.items()}
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
      np.testing.assert_array_equal(x, y.astype("bfloat16").astype("float32"))

  def test_tensors_with_gradients(self, tmp_path):
    parameter = self.torch.nn.Parameter
    found, given = self.imported(
      tmp_path,
      lambda weights: {
        n: parameter(x, requires_grad=x.is_floating_point())
        for n, x in weights.items()
      },
    )
    jax.tree.map(np.testing.assert_array_equal, found, given)

  @pytest.mark.parametrize("kind", ["sparse", "meta", "expanded"])
  def test_what_is_no_plain_tensor(self, tmp_path, kind):
    kinds = {
      "sparse": lambda x: x.to_sparse(),
      "meta": lambda x: x.to("meta"),
      "expanded": lambda x: self.torch.zeros(1).expand(x.shape),
    }
    with pytest.raises(ValueError, match="a weight of shape.*float32 or half"):
      self.imported(
        tmp_path,
        lambda weights: {
          n: kinds[kind](x) if x.ndim == 4 else x for n, x in weights.items()
        },
      )

  @pytest.mark.parametrize("inside", [None, "model"])
  def test_a_whole_module(self, tmp_path, inside):
    module = self.torch.nn.Linear(2, 2)
    self.torch.save({inside: module} if inside else module, tmp_path / "x.pth")
    with pytest.raises(
      ValueError,
      match=(
        r"holds a torch\.nn\.\S*Linear.*x = torch\.load\(.*weights_only=False\).*"
        r"torch\.save\(x\.state_dict\(\).*a whole module.*x\[KEY\]\.state_dict\(\)"
      ),
    ):
      convert.load_torch(tmp_path / "x.pth")

  def test_a_torchscript_archive(self, tmp_path):
    path = tmp_path / "x.pt"
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)
      self.torch.jit.script(self.torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match=r"torch\.jit\.load.*\.state_dict\(\)"):
      convert.load_torch(path)

  def test_numpy_numbers_are_let_in(self, tmp_path):
    path = self.save(tmp_path / "x.pth", best=np.float64(71.5), n=np.int64(3))
    assert convert.load_torch(path)["best"] == 71.5

  def test_anything_else_is_kept_out(self, tmp_path):
    path = self.save(tmp_path / "x.pth", args=argparse.Namespace(lr=0.1))
    with pytest.raises(
      ValueError,
      match=(r"holds a argparse.Namespace.*could run code.*weights_only=False"),
    ):
      convert.load_torch(path)

  @pytest.mark.parametrize(
    "content, message",
    [
      (None, "no file"),
      (b"", "damaged"),
      (b"no checkpoint", "damaged.*no .safetensors, .npz"),
    ],
  )
  def test_damaged_files(self, tmp_path, content, message):
    path = tmp_path / "x.pth"
    if content is not None:
      path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      convert.load_torch(path)

  def test_a_file_without_weights(self, tmp_path):
    self.torch.save({"a": 1}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth holds no weights of a network"):
      convert.load_torch(tmp_path / "x.pth")

  def test_a_file_without_a_state_dict(self, tmp_path):
    self.torch.save(self.torch.ones(3), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds a Tensor and no state_dict"):
      convert.load_torch(tmp_path / "x.pth")
