"""Slow NumPy restatements of the method, written from its definition.

Nothing here imports the package, and nothing is clever: loops, one sample at a
time, ties broken by the lowest index because it is met first.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def proportions(q: Fraction, num_exits: int) -> list[Fraction]:
  """p_k ∝ q^k in exact arithmetic."""
  powers = [q**k for k in range(1, num_exits + 1)]
  return [power / sum(powers) for power in powers]


def allocate(confidence: np.ndarray, counts) -> np.ndarray:
  """The exit of each sample: exits pick their most confident, one by one."""
  num_samples, num_exits = confidence.shape
  exit_of_sample = np.full(num_samples, num_exits - 1)
  left = list(range(num_samples))
  for k in range(num_exits - 1):
    for _ in range(min(int(counts[k]), len(left))):
      best = left[0]
      for i in left:
        if confidence[i, k] > confidence[best, k]:
          best = i
      exit_of_sample[best] = k
      left.remove(best)
  return exit_of_sample


def meta_loss(losses: np.ndarray, exit_of_sample: np.ndarray) -> float:
  """Means over the samples of an exit, summed over the exits that have any."""
  total = 0.0
  for k in range(losses.shape[1]):
    own = [losses[i, k] for i in range(len(losses)) if exit_of_sample[i] == k]
    if own:
      total += sum(own) / len(own)
  return total


def thresholds(
  confidence: np.ndarray, counts, close_short_exits: bool = True
) -> np.ndarray:
  """The threshold search on one split, for one vector of counts."""
  num_samples, num_exits = confidence.shape
  found = np.full(num_exits, np.inf, confidence.dtype)
  left = list(range(num_samples))
  for k in range(num_exits - 1):
    due = int(counts[k])
    if due > len(left) and not close_short_exits:
      due = len(left)
    if 0 < due <= len(left):
      found[k] = sorted((confidence[i, k] for i in left), reverse=True)[due - 1]
    left = [i for i in left if confidence[i, k] < found[k]]
  found[-1] = -np.inf
  return found


def budgeted(
  confidence: np.ndarray, correct: np.ndarray, macs, found: np.ndarray
) -> tuple[float, float, np.ndarray]:
  """Accuracy, mean cost and samples per exit, walking samples through exits."""
  num_samples, num_exits = confidence.shape
  right, cost, per_exit = 0, 0.0, np.zeros(num_exits, int)
  for i in range(num_samples):
    k = 0
    while k < num_exits - 1 and confidence[i, k] < found[k]:
      k += 1
    right += bool(correct[i, k])
    cost += float(macs[k])
    per_exit[k] += 1
  return right / num_samples, cost / num_samples, per_exit


def softmax(logits: np.ndarray) -> np.ndarray:
  """Softmax over the last axis."""
  exponentials = np.exp(logits - logits.max(-1, keepdims=True))
  return exponentials / exponentials.sum(-1, keepdims=True)


def linear_losses(weight, x, labels):
  """Exits that are linear in the image: ℓ, confidence and dℓ/d logits.

  weight is [K d C] and x [B d]. Gives losses [B K], confidence [B K] and the
  logit gradient softmax - onehot, [B K C].
  """
  logits = np.einsum("bd,kdc->bkc", x, weight)
  probability = softmax(logits)
  onehot = np.eye(weight.shape[2])[labels][:, None]
  losses = -np.log((probability * onehot).sum(-1))
  return losses, probability.max(-1), probability - onehot, logits


class Mlp:
  """The WPN by hand: ReLU hidden layer, tanh output, and its backward pass."""

  def __init__(self, params):
    self.hidden, self.output = params["hidden_0"], params["output"]

  def forward(self, features):
    self.features = features
    pre = features @ self.hidden["kernel"] + self.hidden["bias"]
    self.h = np.maximum(pre, 0)
    self.u = np.tanh(self.h @ self.output["kernel"] + self.output["bias"])
    return self.u

  def backward(self, du):
    dpre = du * (1 - self.u**2)
    dh = (dpre @ self.output["kernel"].T) * (self.h > 0)
    return {
      "hidden_0": {"kernel": self.features.T @ dh, "bias": dh.sum(0)},
      "output": {"kernel": self.h.T @ dpre, "bias": dpre.sum(0)},
    }


CENTRED_AXES = {"exits": 1, "batch": 0, "all": None}


def centred(u, center_over):
  """U minus its mean over one axis of [B K]; its own transpose."""
  return u - u.mean(axis=CENTRED_AXES[center_over], keepdims=True)


def tree_map(function, *trees):
  """Applies a function to the leaves of nested dictionaries."""
  if isinstance(trees[0], dict):
    return {
      name: tree_map(function, *(tree[name] for tree in trees)) for name in trees[0]
    }
  return function(*trees)


def l2w_half_step(state, train_half, meta_half, lr, wpn_lr, c):
  """Eqs. 7, 8, 9 on linear exits, every derivative written out by hand.

  state: weight and momentum [K d C], mean [K C] (a running mean of the
  logits), wpn and Adam moments m, v with count t. Halves are (x, labels).
  c: momentum, weight_decay, wpn_weight_decay, epsilon, center_over, inputs,
  counts (samples due at each exit). Returns (state, what was computed).
  """
  (x, labels), (meta_x, meta_labels) = train_half, meta_half
  num = len(x)
  losses, confidence, dlogits, logits = linear_losses(state["weight"], x, labels)
  features = {
    "loss": losses,
    "confidence": confidence,
    "both": np.concatenate([losses, confidence], 1),
  }[c["inputs"]]

  def weights_of(mlp):
    return 1 + c["epsilon"] * centred(mlp.forward(features), c["center_over"])

  def gradient(weights):
    total = np.zeros_like(state["weight"])
    for i in range(num):
      for k in range(weights.shape[1]):
        total[k] += weights[i, k] / num * np.outer(x[i], dlogits[i, k])
    return total

  def buffer(weights):
    return (
      c["momentum"] * state["momentum"]
      + gradient(weights)
      + c["weight_decay"] * state["weight"]
    )

  # Eq. 7
  mlp = Mlp(state["wpn"])
  pseudo = state["weight"] - lr * buffer(weights_of(mlp))
  # The meta loss and v, its gradient at the pseudo parameters.
  meta_losses, meta_confidence, meta_dlogits, _ = linear_losses(
    pseudo, meta_x, meta_labels
  )
  exit_of_sample = allocate(meta_confidence, c["counts"])
  v = np.zeros_like(pseudo)
  for i, k in enumerate(exit_of_sample):
    share = 1 / np.sum(exit_of_sample == k)
    v[k] += share * np.outer(meta_x[i], meta_dlogits[i, k])
  # Eq. 8: dL/dw[i,k] = -lr/B <grad of loss[i,k], v>, then through the WPN.
  dw = np.array(
    [
      [
        -lr / num * np.sum(np.outer(x[i], dlogits[i, k]) * v[k])
        for k in range(len(v))
      ]
      for i in range(num)
    ]
  )
  wpn_gradient = mlp.backward(c["epsilon"] * centred(dw, c["center_over"]))
  t = state["t"] + 1
  decayed = tree_map(
    lambda g, p: g + c["wpn_weight_decay"] * p, wpn_gradient, state["wpn"]
  )
  m = tree_map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], decayed)
  second = tree_map(lambda v, g: 0.999 * v + 0.001 * g**2, state["v"], decayed)
  wpn = tree_map(
    lambda p, m, v: (
      p - wpn_lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    ),
    state["wpn"],
    m,
    second,
  )
  # Eq. 9
  weights = weights_of(Mlp(wpn))
  momentum = buffer(weights)
  return {
    "weight": state["weight"] - lr * momentum,
    "momentum": momentum,
    "mean": 0.9 * state["mean"] + 0.1 * logits.mean(0),
    "wpn": wpn,
    "m": m,
    "v": second,
    "t": t,
  }, {
    "weights": weights,
    "losses": losses,
    "wpn_gradient": wpn_gradient,
    "meta_loss": meta_loss(meta_losses, exit_of_sample),
    "exit_of_sample": exit_of_sample,
  }


def confidence(logits: np.ndarray, measure: str) -> np.ndarray:
  """The measures of confidence, [N K], one sample and exit at a time."""
  num_samples, num_exits, num_classes = logits.shape
  found = np.zeros((num_samples, num_exits))
  for i in range(num_samples):
    for k in range(num_exits):
      p = sorted(softmax(logits[i, k].astype(np.float64)), reverse=True)
      if measure == "probability":
        found[i, k] = p[0]
      elif measure == "margin":
        found[i, k] = p[0] - p[1]
      elif measure == "entropy":
        entropy = -sum(x * np.log(x) for x in p if x > 0)
        found[i, k] = 1 - entropy / np.log(num_classes)
      else:
        j = k
        while j >= 0 and logits[i, j].argmax() == logits[i, k].argmax():
          found[i, k] += 1
          j -= 1
  return found


def at_most(count: int, n: int, p: float) -> float:
  """P(Binomial(n, p) <= count), summed in exact arithmetic."""
  p = Fraction(p)
  return float(
    sum(math.comb(n, b) * p**b * (1 - p) ** (n - b) for b in range(count + 1))
  )


def calibration_error(confidence, correct, num_bins: int) -> float:
  """Expected calibration error of one exit, bin by bin."""
  total = 0.0
  for m in range(num_bins):
    inside = [
      i for i, c in enumerate(confidence) if m / num_bins < c <= (m + 1) / num_bins
    ]
    if inside:
      accuracy = np.mean([bool(correct[i]) for i in inside])
      mean = np.mean([confidence[i] for i in inside])
      total += len(inside) * abs(accuracy - mean)
  return total / len(confidence)
