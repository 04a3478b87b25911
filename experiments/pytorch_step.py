"""The uniform and the L2W step in plain PyTorch, for benchmark.py --pytorch.

    python experiments/pytorch_step.py FOLDER

is the other side of a comparison: a process of its own, because both libraries
keep threads. It reads the weights, the batch and the settings in FOLDER, runs what
standard input names, one word a line, and answers each with the seconds it took. A
word that ends in "?" asks for one step from the weights as they were read, and puts
what it made into FOLDER.

The step is the paper's, as one writes it from Eqs. 7, 8 and 9: the gradient of
Eq. 7 keeps its graph, and the meta loss is differentiated through it. Shapes are
PyTorch's, [B C H W]; B samples, K exits.
"""

from __future__ import annotations

import copy
import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812


class ConvBNReLU(nn.Module):
  """Convolution of the shape of a weight [O I k k], BatchNorm, ReLU."""

  def __init__(self, weight, stride=1, bias=False):
    super().__init__()
    features, inputs, kernel, _ = weight.shape
    self.conv = nn.Conv2d(inputs, features, kernel, stride, kernel // 2, bias=bias)
    self.bn = nn.BatchNorm2d(features)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)))


class Stem(nn.Module):
  """Image -> one feature map per scale, finest first."""

  def __init__(self, weights):
    super().__init__()
    first = weights["layers_0.conv.weight"]
    self.pool = first.shape[-1] == 7  # ImageNet
    self.layers_0 = ConvBNReLU(
      first, 2 if self.pool else 1, "layers_0.conv.bias" in weights
    )
    i = 1
    while (name := f"layers_{i}") + ".conv.weight" in weights:
      self.add_module(name, ConvBNReLU(weights[f"{name}.conv.weight"], 2))
      i += 1

  def forward(self, x):
    features = []
    for name, layer in self.named_children():
      x = layer(x)
      if name == "layers_0" and self.pool:
        x = F.max_pool2d(x, 3, 2, 1)
      features.append(x)
    return features


class GridLayer(nn.Module):
  """A layer of the grid; drops the finest scales that it has no weights for."""

  def __init__(self, weights):
    super().__init__()
    for name in {key.split(".")[0] for key in weights}:
      own = _under(weights, name)
      stride = 2 if name.endswith("down") else 1
      layers = (
        []
        if "reduce.conv.weight" not in own
        else [("reduce", ConvBNReLU(own["reduce.conv.weight"]))]
      )
      layers.append(("spatial", ConvBNReLU(own["spatial.conv.weight"], stride)))
      self.add_module(name, _sequence(layers))
    self.scales = sum(name.endswith("normal") for name, _ in self.named_children())

  def forward(self, features):
    dropped, outputs = len(features) - self.scales, []
    for i in range(self.scales):
      parts = [features[dropped + i]]
      if hasattr(self, down := f"layers_{i}_conv_down"):
        parts.append(getattr(self, down)(features[dropped + i - 1]))
      parts.append(getattr(self, f"layers_{i}_conv_normal")(parts[0]))
      outputs.append(torch.cat(parts, 1))
    return outputs


class Transition(nn.Module):
  """1×1 ConvBNReLU on every scale."""

  def __init__(self, weights):
    super().__init__()
    for i in range(len({key.split(".")[0] for key in weights})):
      self.add_module(f"convs_{i}", ConvBNReLU(weights[f"convs_{i}.conv.weight"]))

  def forward(self, features):
    return [layer(x) for layer, x in zip(self.children(), features, strict=True)]


class Classifier(nn.Module):
  """Two strided ConvBNReLU, global mean, linear."""

  def __init__(self, weights):
    super().__init__()
    self.convs_0 = ConvBNReLU(weights["convs_0.conv.weight"], 2)
    self.convs_1 = ConvBNReLU(weights["convs_1.conv.weight"], 2)
    classes, width = weights["linear.weight"].shape
    self.linear = nn.Linear(width, classes)

  def forward(self, x):
    return self.linear(self.convs_1(self.convs_0(x)).mean((2, 3)))


class MSDNet(nn.Module):
  """The network that a set of weights is for; images -> logits [B K C]."""

  def __init__(self, weights):
    super().__init__()
    names = dict.fromkeys(key.split(".")[0] for key in weights)
    blocks = sorted(
      (tuple(map(int, name.split("_")[1:])), name)
      for name in names
      if name.startswith("blocks")
    )
    for (k, i), name in blocks:
      own = _under(weights, name)
      kind = (
        Stem
        if k == i == 0
        else Transition
        if "convs_0.conv.weight" in own
        else GridLayer
      )
      self.add_module(name, kind(own))
    self.num_exits = 1 + blocks[-1][0][0]
    for k in range(self.num_exits):
      self.add_module(
        f"classifier_{k}", Classifier(_under(weights, f"classifier_{k}"))
      )
    self.load_state_dict(weights)

  def forward(self, x):
    features, logits = x, []
    for k in range(self.num_exits):
      for name, layer in self.named_children():
        if name.startswith(f"blocks_{k}_"):
          features = layer(features)
      logits.append(getattr(self, f"classifier_{k}")(features[-1]))
    return torch.stack(logits, 1)


def _sequence(layers):
  sequence = nn.Sequential()
  for name, layer in layers:
    sequence.add_module(name, layer)
  return sequence


def _under(weights, name):
  return {
    key[len(name) + 1 :]: x
    for key, x in weights.items()
    if key.startswith(f"{name}.")
  }


class WPN(nn.Module):
  """Hidden layers with ReLU, then tanh."""

  def __init__(self, weights):
    super().__init__()
    for name in dict.fromkeys(key.split(".")[0] for key in weights):
      features, inputs = weights[f"{name}.weight"].shape
      self.add_module(name, nn.Linear(inputs, features))
    self.load_state_dict(weights)

  def forward(self, x):
    *hidden, output = self.children()
    for layer in hidden:
      x = F.relu(layer(x))
    return torch.tanh(output(x))


class Training:
  """Networks, optimizers and the two steps.

  Args:
    weights, wpn_weights: state_dicts.
    settings: learning_rate, momentum, weight_decay of the backbone, those of
      the WPN under "meta" with epsilon, center_over, inputs; proportions [K].
  """

  def __init__(self, weights, wpn_weights, settings):
    self.network, self.settings = MSDNet(weights), settings
    self.network.to(next(iter(weights.values())))  # its device and type
    self.network.load_state_dict(weights)  # not through float32
    self.optimizer = torch.optim.SGD(
      self.network.parameters(),
      settings["learning_rate"],
      settings["momentum"],
      weight_decay=settings["weight_decay"],
    )
    if wpn_weights:
      self.wpn = WPN(wpn_weights).to(next(iter(wpn_weights.values())))
      self.wpn.load_state_dict(wpn_weights)
      self.wpn_optimizer = torch.optim.Adam(
        self.wpn.parameters(),
        settings["meta"]["learning_rate"],
        weight_decay=settings["meta"]["weight_decay"],
      )

  def forward(self, images, labels):
    """Logits of all images."""
    with torch.no_grad():
      self.network.eval()
      logits = self.network(images)
      self.network.train()
    return {"logits": logits}

  def uniform(self, images, labels):
    """One update on each half; the sum of exit losses."""
    return _both(self._uniform_half, images, labels)

  def l2w(self, images, labels):
    """Eqs. 7, 8 and 9 on each half, the other being the meta half."""
    return _both(self._l2w_half, images, labels)

  def _uniform_half(self, images, labels, *unused_meta_half):
    losses = _losses(self.network(images), labels)
    self._real_update(losses.mean(0).sum())
    return {"losses": losses.detach()}

  def _real_update(self, loss):
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()

  def _l2w_half(self, images, labels, meta_images, meta_labels):
    # Eq. 7, with a graph from the weights to the look-ahead parameters.
    losses = _losses(
      self._look(dict(self.network.named_parameters()), images), labels
    )
    loss = (self._weights(losses) * losses).mean(0).sum()
    gradients = torch.autograd.grad(
      loss, list(self.network.parameters()), create_graph=True
    )
    pseudo = self._pseudo_update(gradients)
    # Eq. 8.
    logits = self._look(pseudo, meta_images)
    allocated = _allocate(
      logits.detach().softmax(-1).amax(-1), self.settings["proportions"]
    )
    counts = allocated.sum(0).clamp(min=1)
    meta_loss = ((_losses(logits, meta_labels) * allocated).sum(0) / counts).sum()
    wpn_gradient = torch.autograd.grad(meta_loss, list(self.wpn.parameters()))
    for p, gradient in zip(self.wpn.parameters(), wpn_gradient, strict=True):
      p.grad = gradient
    self.wpn_optimizer.step()
    # Eq. 9; this forward pass keeps its running statistics.
    losses = _losses(self.network(images), labels)
    with torch.no_grad():
      weights = self._weights(losses)
    self._real_update((weights * losses).mean(0).sum())
    return {
      "losses": losses.detach(),
      "weights": weights,
      "meta_loss": meta_loss.detach(),
      **{
        f"gradient.{name}": gradient
        for (name, _), gradient in zip(
          self.wpn.named_parameters(), wpn_gradient, strict=True
        )
      },
    }

  def _look(self, params, images):
    """Training logits with given parameters; running statistics stay."""
    buffers = {name: b.clone() for name, b in self.network.named_buffers()}
    return functional_call(self.network, {**params, **buffers}, (images,))

  def _weights(self, losses):
    meta = self.settings["meta"]
    u = self.wpn(losses.detach())
    axes = {"exits": 1, "batch": 0, "all": (0, 1)}[meta["center_over"]]
    return 1 + meta["epsilon"] * (u - u.mean(axes, keepdim=True))

  def _pseudo_update(self, gradients):
    """Θ̂ by the optimizer's own rule, which has no buffer before its first step."""
    s, pseudo = self.settings, {}
    for (name, p), gradient in zip(
      self.network.named_parameters(), gradients, strict=True
    ):
      update = gradient + s["weight_decay"] * p
      buffer = self.optimizer.state[p].get("momentum_buffer")
      if buffer is not None:
        update = update + s["momentum"] * buffer
      pseudo[name] = p - s["learning_rate"] * update
    return pseudo


def _both(half, images, labels):
  (x_1, x_2), (y_1, y_2) = images.chunk(2), labels.chunk(2)
  first, second = half(x_1, y_1, x_2, y_2), half(x_2, y_2, x_1, y_1)
  return {name: torch.stack([first[name], second[name]]) for name in first}


def _losses(logits, labels):
  """Cross-entropy [B K]."""
  return F.cross_entropy(
    logits.transpose(1, 2),
    labels[:, None].expand(logits.shape[:2]),
    reduction="none",
  )


def _allocate(confidence, proportions):
  """[B K], one True per row: exits choose in order, the last takes the rest."""
  size = len(confidence)
  free = torch.ones(size, dtype=torch.bool, device=confidence.device)
  allocated = torch.zeros_like(confidence, dtype=torch.bool)
  for k, share in enumerate(proportions):
    due = size if k == len(proportions) - 1 else int(size * share)
    order = (-confidence[:, k]).sort(stable=True).indices
    chosen = order[free[order]][:due]
    allocated[chosen, k] = True
    free[chosen] = False
  return allocated


def read(folder: pathlib.Path) -> tuple[Training, tuple]:
  """(what trains, (images, labels)) of a folder that benchmark.py wrote."""
  settings = json.loads((folder / "settings.json").read_text())

  def tensors(name):
    with np.load(folder / name) as arrays:
      return {
        key: torch.from_numpy(arrays[key]).to(settings["device"]) for key in arrays
      }

  batch = tensors("batch.npz")
  training = Training(tensors("weights.npz"), tensors("wpn.npz"), settings)
  return training, (batch["image"], batch["label"])


def main(folder: pathlib.Path) -> None:
  """Answers the words on standard input."""
  torch.backends.cudnn.benchmark = True  # XLA chooses algorithms by time, too
  fresh, batch = read(folder)
  training = copy.deepcopy(fresh)
  print(
    json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}),
    flush=True,
  )
  for word in map(str.strip, sys.stdin):
    if word.endswith("?"):
      one = copy.deepcopy(fresh)
      result = getattr(one, word[:-1])(*batch)
      result |= {f"network.{k}": x for k, x in one.network.state_dict().items()}
      result |= {f"wpn.{k}": x for k, x in one.wpn.state_dict().items()}
      np.savez(
        folder / f"{word[:-1]}.npz",
        **{k: x.cpu().numpy() for k, x in result.items()},
      )
      print("{}", flush=True)
      continue
    began = time.perf_counter()
    getattr(training, word)(*batch)
    if batch[0].is_cuda:
      torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
