"""Golden fixtures of the released code: rebuild their inputs, compare results.

Weights and images are not stored; they follow from names and seeds (`value`,
`images`). The tests compare the fixtures in tests/golden, and
experiments/check_golden.py those in a folder. All comparisons need x64.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import l2w_jax as l2w
from l2w_jax import config as config_lib
from l2w_jax import convert
from l2w_jax.method import losses
from l2w_jax.training import step as train_step

CENTER_OVER = {"col": "exits", "row": "batch", "mat": "all"}
INPUTS = {"loss": "loss", "conf": "confidence", "both": "both"}


def value(name, shape, suffix=""):
  """The deterministic tensor of a torch name, float32."""
  rng = np.random.RandomState(zlib.crc32((name + suffix).encode()) & 0x7FFFFFFF)
  if name.endswith("num_batches_tracked"):
    return np.zeros(shape, np.int64)
  if name.endswith("running_mean"):
    x = 0.1 * rng.standard_normal(shape)
  elif name.endswith("running_var"):
    x = 1 + 0.5 * rng.random_sample(shape)
  elif name.endswith("bias"):
    x = 0.1 * rng.standard_normal(shape)
  elif len(shape) >= 2:
    x = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
  else:
    x = 1 + 0.1 * rng.standard_normal(shape)
  return x.astype(np.float32)


def images(seed, batch, size):
  """[B H W 3] float32, from the rule's [B 3 H W]."""
  x = np.random.RandomState(1234 + seed).standard_normal((batch, 3, size, size))
  return x.astype(np.float32).transpose(0, 2, 3, 1)


def model_of(c):
  """(our model config, number of classes) of a forward fixture's."""

  def numbers(text):
    return tuple(map(int, text.split("-")))

  config = config_lib.defaults(c["arch"]).model
  imagenet = c["data"].lower() == "imagenet"
  config.update(
    stem="imagenet" if imagenet else "cifar",
    classifier_width=0 if imagenet else 128,
    channels=c["nChannels"],
    growth=c["growthRate"],
    growth_factors=numbers(c["grFactor"]),
    bottleneck_factors=numbers(c["bnFactor"]),
    reduction=c["reduction"],
    step=c["step"],
    step_mode=c["stepmode"],
  )
  if c["arch"] == "msdnet":
    config.update(
      num_exits=c["nBlocks"],
      base=c["base"],
      prune=c["prune"],
      bottleneck=c["bottleneck"],
    )
  else:
    config.update(
      blocks=c["nBlocks"],
      block_step=c["block_step"],
      scales=numbers(c["scale_list"]),
      compress=c["compress_factor"],
    )
  return config, {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[
    c["data"].lower()
  ]


def backbone_of(c):
  """The backbone of a forward fixture."""
  config, num_classes = model_of(c)
  return l2w.build_backbone(config, num_classes, (c["image"], c["image"], 3))


def compare_cost(fixture):
  """Whether cost, parameters and state_dict names and order are the same."""
  c = json.loads(str(fixture["config"]))
  backbone = backbone_of(c)
  np.testing.assert_array_equal(backbone.macs, fixture["flops"])
  np.testing.assert_array_equal(backbone.params_to_exit, fixture["params_cum"])
  variables = jax.eval_shape(backbone.init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
  exported = convert.export_released(zeros, backbone)
  assert [[name, list(x.shape)] for name, x in exported.items()] == json.loads(
    str(fixture["state_names_shapes"])
  )


def forward_case(fixture):
  """(backbone, variables, images, evaluation, training) of a forward fixture."""
  c = json.loads(str(fixture["config"]))
  backbone = backbone_of(c)
  released = {
    name: value(name, tuple(shape), c["suffix"])
    for name, shape in json.loads(str(fixture["state_names_shapes"]))
  }
  x = images(c["seed"], c["batch"], c["image"])
  np.testing.assert_allclose(
    x.sum(dtype=np.float64), fixture["input_sum"], rtol=1e-12
  )

  def evaluate(variables, x):
    return jnp.moveaxis(backbone.apply(variables, x), 1, 0)

  def train(variables, x):
    logits, stats = backbone.apply(variables, x, train=True)
    return jnp.moveaxis(logits, 1, 0), stats

  return (
    backbone,
    convert.import_released(released, backbone),
    x,
    jax.jit(evaluate),
    jax.jit(train),
  )


def compare_forward(fixture):
  """{quantity: largest relative error} of logits and statistics, float64."""
  backbone, variables, x, evaluate, train = forward_case(fixture)
  variables, x = double((variables, x))
  logits, stats = train(variables, x)
  errors = {
    "eval": relative(evaluate(variables, x), fixture["eval_logits_f64"]),
    "train": relative(logits, fixture["train_logits_f64"]),
  }
  after = convert.export_released(
    {"params": variables["params"], "batch_stats": stats}, backbone
  )
  norm = {"mean": np.mean, "l2": np.linalg.norm}
  errors["running statistics"] = max(
    relative(
      [
        norm[which](after[f"{name}.running_{of}"])
        for name in json.loads(str(fixture["bn_names"]))
      ],
      fixture[f"bn_after_{of}_{which}_f64"],
    )
    for of in ("mean", "var")
    for which in norm
  )
  return errors


def compare_forward_float32(fixture):
  """{quantity: largest relative error} of logits in float32."""
  _, variables, x, evaluate, train = forward_case(fixture)
  return {
    "eval, float32": relative(evaluate(variables, x), fixture["eval_logits_f32"]),
    "train, float32": relative(train(variables, x)[0], fixture["train_logits_f32"]),
  }


def config_of(c):
  """Our config of a step fixture's."""
  config = config_lib.defaults("msdnet")
  config.epochs = c["epochs"]
  config.model.update(
    num_exits=c["nBlocks"],
    channels=c["nChannels"],
    growth=c["growthRate"],
    classifier_width=c["cls_width"],
  )
  config.optimizer.update(
    learning_rate=c["lr"], momentum=c["momentum"], weight_decay=c["weight_decay"]
  )
  config.meta.update(
    learning_rate=c["meta_lr"],
    weight_decay=c["meta_weight_decay"],
    epsilon=c["epsilon"],
    q=c["target_p_index"] / 20,
    interval=c["meta_interval"],
    hidden=c["hidden"],
    layers=c["wpn_layers"],
    center_over=CENTER_OVER[c["constraint_dimension"]],
    inputs=INPUTS[c["meta_net_input_type"]],
  )
  return config_lib.validate(config)


def double(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def initial_state(fixture, c, config, backbone):
  """The fixture's state before the first half, in float64."""
  template = l2w.init_state(jax.random.key(0), backbone, config)
  names = convert.export_released(template.variables, backbone)
  variables = convert.import_released(
    {name: value(name, x.shape, c["suffix"]) for name, x in names.items()}, backbone
  )
  wpn = convert.import_released_wpn(
    {
      name: value(name, tuple(shape), c["suffix"])
      for name, shape in zip(
        json.loads(str(fixture["wpn_names"])),
        json.loads(str(fixture["wpn_shapes"])),
        strict=True,
      )
    }
  )
  return template.replace(
    step=jnp.asarray(c["epoch"] * 3, jnp.int32),
    params=double(variables["params"]),
    batch_stats=double(variables["batch_stats"]),
    wpn_params=double(wpn),
  )


def flat(names, state_dict):
  """Torch tensors one after the other, as the fixtures store them."""
  return np.concatenate([np.ravel(state_dict[name]) for name in names])


def summary(names, state_dict):
  """Per tensor: sum, L2 norm, dot with its probe."""
  rows = []
  for name in names:
    x = np.asarray(state_dict[name], np.float64)
    probe = np.random.RandomState(
      zlib.crc32((name + "/probe").encode()) & 0x7FFFFFFF
    ).standard_normal(x.shape)
    rows.append([x.sum(), np.linalg.norm(x), (x * probe).sum()])
  return np.array(rows)


def relative(ours, theirs):
  """Largest difference relative to the largest entry of the array."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-300))


def compare_step(fixture, halves_alone=False):
  """{quantity: largest relative error over the six halves}.

  What a step reports is compared after every half, states after every loader
  batch (halves 1, 3 and 5), and where halves_alone after the others too: the
  first half of each batch is then also run by itself. "allocation" counts
  samples at another exit.
  """
  c = json.loads(str(fixture["config"]))
  num_classes = {"cifar10": 10, "cifar100": 100}[c["data"]]
  config = config_of(c)
  backbone = l2w.build_backbone(config.model, num_classes, (32, 32, 3))
  state = initial_state(fixture, c, config, backbone)
  step = l2w.make_train_step(backbone, config, steps_per_epoch=3)
  first_half = jax.jit(
    train_step.make_half_step(backbone, config, steps_per_epoch=3),
    static_argnames="update_wpn",
  )
  param_names, mean_names, var_names, wpn_names = (
    json.loads(str(fixture[key]))
    for key in ("param_names", "bn_mean_names", "bn_var_names", "wpn_names")
  )
  errors = {"allocation": 0}

  def check(name, ours, theirs):
    errors[name] = max(errors.get(name, 0.0), relative(ours, theirs))

  def torch_wpn(tree):
    return flat(wpn_names, convert.export_released_wpn(tree))

  def check_metrics(metrics, h):
    check("weights", metrics["weights"], fixture[f"f64/h{h}/weight"])
    check("losses", metrics["losses"], fixture[f"f64/h{h}/ce"])
    if not fixture["meta_done"][h]:
      assert "meta_loss" not in metrics
      return
    check("meta loss", metrics["meta_loss"], fixture[f"f64/h{h}/meta_loss"])
    check(
      "meta-gradient",
      torch_wpn(metrics["wpn_gradient"]),
      fixture[f"f64/h{h}/meta_grad"],
    )
    errors["allocation"] += int(
      np.sum(np.argmax(metrics["allocated"], 1) != fixture[f"f64/h{h}/alloc_exit"])
    )

  def check_state(state, h):
    variables = convert.export_released(state.variables, backbone)
    momentum = convert.export_released(
      {"params": state.opt_state[1].trace, "batch_stats": state.batch_stats},
      backbone,
    )
    adam = state.wpn_opt_state[1]
    for name, ours, theirs in (
      ("WPN", torch_wpn(state.wpn_params), "wpn"),
      ("Adam m", torch_wpn(adam.mu), "adam_m"),
      ("Adam v", torch_wpn(adam.nu), "adam_v"),
      ("running mean", flat(mean_names, variables), "bn_mean"),
      ("running var", flat(var_names, variables), "bn_var"),
    ):
      check(name, ours, fixture[f"f64/h{h}/{theirs}"])
    assert adam.count == fixture[f"f64/h{h}/adam_step"]
    for name, tensors, short, whole in (
      ("backbone", variables, "param", "params"),
      ("momentum", momentum, "mom", "momentum"),
    ):
      ours = summary(param_names, tensors)
      theirs = fixture[f"f64/h{h}/{short}_summ"]
      # A sum or dot product may nearly cancel: relative to the tensor's norm.
      scale = np.maximum(theirs[:, 1:2], 1e-300)
      errors[name] = max(
        errors.get(name, 0.0), float(np.abs((ours - theirs) / scale).max())
      )
      if f"f64/h{h}/{whole}" in fixture:
        check(name, flat(param_names, tensors), fixture[f"f64/h{h}/{whole}"])

  for t, size in enumerate(c["batch"]):
    batch = {
      "image": jnp.asarray(images(c["seed0"] + t, size, 32), jnp.float64),
      "label": jnp.asarray(fixture[f"targets_{t}"]),
    }
    if halves_alone:
      cut = (size + 1) // 2
      after_half, metrics = first_half(
        state,
        {name: x[:cut] for name, x in batch.items()},
        {name: x[cut:] for name, x in batch.items()},
        np.zeros(2, np.uint32),  # draws nothing
        update_wpn=bool(fixture["meta_done"][2 * t]),
      )
      check_metrics(metrics, 2 * t)
      check_state(after_half, 2 * t)
    state, metrics = step(state, batch)
    for h in range(2):
      check_metrics(
        jax.tree.map(
          lambda x, h=h: x[h], metrics, is_leaf=lambda x: isinstance(x, tuple)
        ),
        2 * t + h,
      )
    check_state(state, 2 * t + 1)
  return errors


def compare_allocation(fixture):
  """Samples at another exit, up to twins, and the error of the meta loss.

  Two samples with the same logits are twins: the released sort is not stable,
  so which of them an exit takes first follows no rule. Ours takes the first.
  """
  errors = {"samples at another exit": 0, "meta loss": 0.0}
  for i in range(len(json.loads(str(fixture["cases"])))):
    logits, labels, shares, exits, loss = (
      fixture[f"c{i}/{name}"]
      for name in (
        "logits",
        "targets",
        "target_probs",
        "exit_of_sample",
        "meta_loss_f64",
      )
    )
    logits = jnp.moveaxis(jnp.asarray(logits), 0, 1)
    allocated = l2w.allocation.allocate(losses.confidence(logits), shares)
    _, groups = np.unique(
      np.asarray(logits).reshape(len(labels), -1), axis=0, return_inverse=True
    )
    ours = sorted(zip(groups.ravel(), np.argmax(allocated, 1), strict=True))
    theirs = sorted(zip(groups.ravel(), exits, strict=True))
    errors["samples at another exit"] += sum(
      a != b for a, b in zip(ours, theirs, strict=True)
    )
    cross_entropy = losses.cross_entropy(
      logits.astype(jnp.float64), jnp.asarray(labels)
    )
    released = exits[:, None] == np.arange(len(shares))
    errors["meta loss"] = max(
      errors["meta loss"],
      relative(l2w.allocation.meta_loss(cross_entropy, released), loss),
    )
  return errors


def compare_thresholds(fixture):
  """Thresholds and exit counts that differ, error of accuracy and mean cost."""
  errors = {
    "thresholds that differ": 0,
    "exit counts that differ": 0,
    "accuracy": 0.0,
    "mean cost": 0.0,
  }
  scores = {}
  for split in ("val", "test"):
    softmax = fixture[split] * np.float32(fixture["scale"])
    scores[split] = (
      softmax.max(-1).T,
      (softmax.argmax(-1) == fixture[f"{split}_targets"]).T,
    )
  found = l2w.exit_policy.find_thresholds(scores["val"][0], fixture["target_probs"])
  ours = np.where(np.isinf(found), 1e8 * np.sign(found), found)
  errors["thresholds that differ"] = int((ours != fixture["T"]).sum())
  for split, (confidence, correct) in scores.items():
    result = l2w.exit_policy.budgeted(confidence, correct, fixture["flops"], found)
    counts = np.rint(np.asarray(result.exits) * len(correct))
    errors["exit counts that differ"] += int(
      (counts != fixture[f"exit_counts_{split}"]).sum()
    )
    for name, theirs in (
      ("accuracy", fixture[f"acc_{split}"] / 100),
      ("mean cost", fixture[f"exp_flops_{split}_exact"]),
    ):
      ours = {"accuracy": result.accuracy, "mean cost": result.macs}[name]
      errors[name] = max(errors[name], relative(ours, theirs))
  return errors
