"""A trained network that really stops: each stage runs for who is still there.

    network = early_exit.load("runs/digits")
    labels, exits, confidences = network.predict(images)   # uint8 [N H W channels]

Images go through the stages in batches of one width. Whoever is confident enough
leaves; the rest of several batches are gathered into full ones for the next
stage, so that late stages run as full as early ones. Only at the end are batches
padded. One width means one program per stage, and the same arithmetic for every
image of a call: widths differ in the last bits, which could send an image whose
confidence is a threshold's another way. So exits equal those of `simulate`, which
runs the same programs without stopping, image for image.

XLA:CPU runs one program at a time for each thread that asks, and the small late
stages do not keep two cores busy. So on a CPU a long call is two passes side by
side.

`answer` is for one image: one program, in which the device decides.

A stage computes only what its exit's logits need; the rest of its work, on the
finer scales, waits in the queue and is done for those who go on. The weights are
constants of the programs, which XLA:CPU runs faster than arguments. Shapes: N
images, K exits, W the width.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from l2w_jax import models
from l2w_jax.data import augment
from l2w_jax.exits import deferral
from l2w_jax.exits import policy as exit_policy
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import directory
from l2w_jax.training import checkpoint

# Widths of the batches by backend, others having those of a GPU. All programs of a
# stage, gathering ones included, are at most log2 of the largest width + 1. On a
# CPU the arrays of 32 images stay in its caches.
WIDTHS = {"cpu": (1, 8, 32), "gpu": (1, 16, 256)}
PASSES = {"cpu": 2}  # side by side in a call longer than a batch; others have 1
Numbers = ArrayLike | Sequence[float]


class Answers(NamedTuple):
  """label int32 [N], exit int32 [N] counted from 0, confidence float32 [N]."""

  label: np.ndarray
  exit: np.ndarray
  confidence: np.ndarray


class State(NamedTuple):
  """What passes from stage to stage.

  carry: what later stages need, a list of arrays [W …]; empty at the end.
  label, confidence: answer of the exit just passed.
  """

  carry: list[Array]
  label: Int[Array, " W"]
  confidence: Float[Array, " W"]


class _Waiting(NamedTuple):
  """Rows of a state whose images are due at a stage, and which images."""

  state: State
  rows: np.ndarray
  images: np.ndarray


class EarlyExit:
  """A network with thresholds.

  Args:
    backbone, variables: the trained network.
    thresholds: [K]; an image leaves at the first exit where its confidence is
      at least the threshold. The last is not read.
    mean, std: [channels] pixel statistics the network was trained with.
    measure: confidence, one of `exit_policy.MEASURES`.
    class_names: C names, for those who export the network.

  Raises:
    ValueError: weights that are not finite, or thresholds that do not fit.
  """

  def __init__(
    self,
    backbone: Backbone,
    variables: PyTree,
    thresholds: Numbers,
    mean: Numbers,
    std: Numbers,
    measure: str = "probability",
    class_names: tuple[str, ...] = (),
  ):
    self.backbone, self.measure = backbone, measure
    self.class_names = class_names
    self.mean, self.std = np.float32(mean), np.float32(std)
    self.variables = jax.tree.map(np.asarray, variables)
    _check_finite(self.variables)
    self.thresholds = self._checked_thresholds(thresholds)
    self._splits: dict[tuple[int, Any], deferral.Split] = {}
    self._examples: dict[tuple[int, Any], PyTree] = {}
    self._warm: set[int] = set()  # widths whose programs are compiled
    # Stages of one pass are jitted apart: the carry decides the shapes.
    self._programs = [
      jax.jit(functools.partial(self.stage, k)) for k in range(backbone.num_exits)
    ]
    # Each stage gathers by a function of its own, so that each can count.
    self._gather = [
      jax.jit(functools.partial(_gather)) for _ in range(backbone.num_exits)
    ]
    self._single = jax.jit(self._nested)

  def with_thresholds(self, thresholds: Numbers) -> EarlyExit:
    """The same compiled network with other thresholds [K]."""
    other = object.__new__(EarlyExit)
    other.__dict__ = {
      **self.__dict__,
      "thresholds": self._checked_thresholds(thresholds),
    }
    return other

  def compilations(self) -> list[int]:
    """[K] programs compiled for each stage so far, gathering included."""
    return [
      stage._cache_size() + gather._cache_size()
      for stage, gather in zip(self._programs, self._gather, strict=True)
    ]

  def stage(self, k: int, state: ArrayLike | State) -> State:
    """Stage k as a pure function; the state of stage 0 is uint8 images."""
    width = (state if k == 0 else state.label).shape[0]
    if k == 0:
      carry, before = (
        augment.normalize(state, jnp.asarray(self.mean), jnp.asarray(self.std)),
        None,
      )
    else:
      carry, *before = state
    logits, carry = self._split(k, width).now(carry)
    label, confidence = exit_policy.exit_confidence(
      logits, self.measure, before and tuple(before)
    )
    last = k == self.backbone.num_exits - 1
    return State([] if last else carry, label, confidence)

  def _split(self, k: int, width: Any) -> deferral.Split:
    """Stage k, behind what stage k - 1 left to do; cut at the logits."""
    if (k, width) not in self._splits:
      if k == 0:
        shape = (width, *self.backbone.image_shape)
        example, before = jax.ShapeDtypeStruct(shape, np.float32), lambda x: x
      else:
        earlier = self._split(k - 1, width)
        _, example = jax.eval_shape(earlier.now, self._examples[k - 1, width])
        before = earlier.later
      self._examples[k, width] = example
      self._splits[k, width] = deferral.split(
        lambda x: self.backbone.stage(self.variables, k, before(x)), example
      )
    return self._splits[k, width]

  def predict(self, images: ArrayLike) -> Answers:
    """Answers for images [N H W channels]; stages stop for who has left.

    On a CPU long calls run in threads, which JAX's context managers of the caller,
    such as `jax.default_device`, do not reach.

    Raises:
      ValueError: not uint8 images of the size the network was trained on, or a
        NaN confidence.
    """
    images = self._checked(images)
    width = _width(len(images))

    def run(part):
      return _Pass(self, part, width).run()

    passes = PASSES.get(jax.default_backend(), 1)
    if passes == 1 or len(images) <= width:
      answers = run(images)
    else:
      if width not in self._warm:
        self.warm_up(len(images))  # or each pass would compile every program
      with futures.ThreadPoolExecutor(passes) as pool:
        parts = pool.map(run, np.array_split(images, passes))
        answers = Answers(*map(np.concatenate, zip(*parts, strict=True)))
    _refuse_nan(answers.confidence)
    return answers

  def warm_up(self, num_images: int) -> None:
    """Compiles every program that a call with so many images can need."""
    width = _width(num_images)
    state = np.zeros((width, *self.backbone.image_shape), np.uint8)
    index = np.zeros(width, np.int32)
    for k, program in enumerate(self._programs):
      if k and width > 1:
        self._gather[k](state, state, index)
      state = program(state)
    self._warm.add(width)

  def simulate(self, images: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, confidences) [N K] at every exit, by predict's programs."""
    images = self._checked(images)
    width = _width(len(images))
    found = [[] for _ in self._programs]
    for start in range(0, len(images), width):
      state = _padded(images[start : start + width], width)
      for k, program in enumerate(self._programs):
        state = program(state)
        found[k].append((np.asarray(state.label), np.asarray(state.confidence)))
    return tuple(
      np.stack(
        [
          np.concatenate([part[i] for part in parts])[: len(images)]
          for parts in found
        ],
        1,
      )
      for i in range(2)
    )

  def answer(self, image: ArrayLike) -> Answers:
    """The answer for one image [H W channels], decided on the device; N = 1.

    Raises:
      ValueError: see `predict`.
    """
    images = self._checked(np.asarray(image)[None])
    answers = Answers(*map(np.asarray, self._single(images, self.thresholds)))
    _refuse_nan(answers.confidence)
    return answers

  def simulate_one(self, image: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, confidences) [K] at every exit, by answer's program."""
    images = self._checked(np.asarray(image)[None])
    found = []
    for k in range(self.backbone.num_exits):
      stop = np.where(np.arange(self.backbone.num_exits) < k, np.inf, -np.inf)
      found.append(self._single(images, np.float32(stop)))
    return (
      np.concatenate([a[0] for a in found]),
      np.concatenate([a[2] for a in found]),
    )

  def _nested(self, images, thresholds):
    def run(k, state):
      state = self.stage(k, state)
      leave = (state.label, jnp.full_like(state.label, k), state.confidence)
      if k == self.backbone.num_exits - 1:
        return leave
      return lax.cond(
        state.confidence[0] >= thresholds[k],
        lambda state: leave,
        functools.partial(run, k + 1),
        state,
      )

    return run(0, images)

  def _checked(self, images: ArrayLike) -> np.ndarray:
    images, shape = np.asarray(images), self.backbone.image_shape
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
      raise ValueError(
        f"this network takes uint8 images [N {' '.join(map(str, shape))}], "
        f"as it was trained on, at least one; got {images.dtype} "
        f"{list(images.shape)}"
      )
    return images

  def _checked_thresholds(self, thresholds: Numbers) -> np.ndarray:
    thresholds = np.asarray(thresholds, np.float32)
    num_exits = self.backbone.num_exits
    if thresholds.shape != (num_exits,) or np.isnan(thresholds).any():
      raise ValueError(
        f"thresholds must be [{num_exits}], one number per exit; "
        f"got {thresholds.tolist()}"
      )
    return thresholds


class _Pass:
  """Images on their way through the stages: who waits where."""

  def __init__(self, network: EarlyExit, images: np.ndarray, width: int):
    num_images, self._num_exits = len(images), network.backbone.num_exits
    self._network, self._images = network, images
    self._width = width
    self._waiting: list[_Waiting | None] = [None] * self._num_exits
    self._answers = Answers(
      np.empty(num_images, np.int32),
      np.empty(num_images, np.int32),
      np.empty(num_images, np.float32),
    )

  def run(self) -> Answers:
    everyone, started = np.arange(len(self._images)), None
    for start in range(0, len(self._images), self._width):
      batch = self._images[start : start + self._width]
      state = self._network._programs[0](_padded(batch, self._width))
      # Read the answers of a batch when the device has the next one to work on.
      if started:
        self._leave(0, *started)
      started = (
        state,
        np.arange(len(batch)),
        everyone[start : start + self._width],
      )
    self._leave(0, *started)
    for k in range(1, self._num_exits):
      rest, self._waiting[k] = self._waiting[k], None
      if rest is not None:
        self._run_stage(k, *rest)
    return self._answers

  def _run_stage(self, k, state, rows, images) -> None:
    """Stage k for `images`, which are in `rows` of the state."""
    self._leave(k, self._network._programs[k](state), rows, images)

  def _leave(self, k, state, rows, images) -> None:
    """Takes the answers of exit k, and queues who goes on."""
    label, confidence = (
      np.asarray(x)[rows] for x in (state.label, state.confidence)
    )
    if k == self._num_exits - 1:
      leave = np.ones(len(rows), bool)
    else:
      leave = confidence >= self._network.thresholds[k]
    left = images[leave]
    self._answers.label[left] = label[leave]
    self._answers.exit[left] = k
    self._answers.confidence[left] = confidence[leave]
    if not leave.all():
      self._wait(k + 1, state, rows[~leave], images[~leave])

  def _wait(self, k, state, rows, images) -> None:
    """Queues images for stage k, and runs it once it is full."""
    width, old = self._width, self._waiting[k]
    if old is None:
      if len(rows) < width:
        self._waiting[k] = _Waiting(state, rows, images)
      else:
        self._run_stage(k, state, rows, images)
      return
    index = np.zeros(width, np.int32)
    both = np.concatenate([old.rows, width + rows])[:width]
    index[: len(both)] = both
    joined = self._network._gather[k](old.state, state, index)
    images = np.concatenate([old.images, images])
    over = len(images) - width
    if over < 0:
      self._waiting[k] = _Waiting(joined, np.arange(len(images)), images)
      return
    self._waiting[k] = (
      _Waiting(state, rows[-over:], images[width:]) if over else None
    )
    self._run_stage(k, joined, np.arange(width), images[:width])


def _gather(old: State, new: State, index: Int[Array, " W"]) -> State:
  """Rows of two states: index i < W takes old's row i, else new's i - W."""

  def take(a, b):
    from_old = (index < len(a)).reshape(-1, *[1] * (a.ndim - 1))
    return jnp.where(from_old, a[index % len(a)], b[index % len(a)])

  return jax.tree.map(take, old, new)


def _width(num_images: int) -> int:
  widths = WIDTHS.get(jax.default_backend(), WIDTHS["gpu"])
  return next((w for w in widths if w >= num_images), widths[-1])


def _padded(images: np.ndarray, width: int) -> np.ndarray:
  missing = width - len(images)
  return np.pad(images, [(0, missing)] + [(0, 0)] * 3) if missing else images


def _check_finite(variables: PyTree) -> None:
  broken = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, x in jax.tree_util.tree_leaves_with_path(variables)
    if not np.isfinite(x).all()
  ]
  if broken:
    raise ValueError(
      f"the network's weights are not finite in {len(broken)} arrays, such as "
      f"{broken[0]}, so images would have no exit; use a checkpoint from before "
      "its training diverged"
    )


def _refuse_nan(confidence: np.ndarray) -> None:
  unknown = np.isnan(confidence).sum()
  if unknown:
    raise ValueError(
      f"confidence is NaN for {unknown} of {len(confidence)} images, so they "
      "have no exit; look for huge weights"
    )


def load(workdir: pathlib.Path | str) -> EarlyExit:
  """The network of an evaluated run, with the thresholds of its target.

  Raises:
    ValueError: the workdir is not trained or not evaluated, or was trained on
      after its evaluation.
  """
  workdir = pathlib.Path(workdir)
  config = directory.read_config(workdir)
  results = directory.read_results(workdir)
  backbone = models.build_backbone(
    config.model, results["num_classes"], tuple(results["image_shape"])
  )
  state, _ = checkpoint.restore(workdir, config, backbone)
  if int(state.step) != results["step"]:
    raise ValueError(
      f"{workdir / 'results.json'} is of step {results['step']}, the latest "
      f"checkpoint of step {int(state.step)}; run --mode=evaluate again"
    )
  return EarlyExit(
    backbone,
    jax.device_get(state.variables),
    np.float32(results["chosen"]["thresholds"]),
    results["mean"],
    results["std"],
    results["confidence"],
    tuple(results["class_names"]),
  )
