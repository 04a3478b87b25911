"""A trained network that really stops: each stage runs for who is still there.

    network = early_exit.load("runs/digits")
    answers = network.predict(images)   # uint8 [N H W channels]
    answers.label, answers.exit, answers.probabilities(), answers.top(5)

Images go through the stages in batches of one width. Whoever is confident enough
leaves; the rest of several batches are gathered into full ones for the next
stage, so that late stages run as full as early ones. Only at the end are batches
padded. One width means one program per stage: other widths differ in the last bits,
which could send an image whose confidence is a threshold's another way. So exits
equal those of `simulate`, which runs the same programs without stopping, image for
image. (On one CPU an image's place in its batch moved the last bit of a RANet's
confidence: only an image that stands on a threshold to that bit could tell.)

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

import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from l2w_jax import models
from l2w_jax.data import augment
from l2w_jax.exits import deferral, targets
from l2w_jax.exits import policy as exit_policy
from l2w_jax.models.backbone import Backbone
from l2w_jax.run import directory, files
from l2w_jax.training import checkpoint, identity

# Widths of the batches by backend, others having those of a GPU. All programs of a
# stage, gathering ones included, are at most log2 of the largest width + 1. On a
# CPU the arrays of 32 images stay in its caches.
WIDTHS = {"cpu": (1, 8, 32), "gpu": (1, 16, 256)}
PASSES = {"cpu": 2}  # side by side in a call longer than a batch; others have 1
Numbers = ArrayLike | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a network says of N images, each at the exit where it left.

  Attributes:
    label: int32 [N], the class; `class_name` is its name.
    exit: int32 [N], counted from 1.
    confidence: float32 [N], by the network's measure, which decided to leave.
    logits: float32 [N C].
    macs: float64 [N], cost up to that exit.
    temperature: float32 [N], fitted for that exit, 1 where none was.
    class_names: C names, empty if the network has none.
  """

  label: np.ndarray
  exit: np.ndarray
  confidence: np.ndarray
  logits: np.ndarray
  macs: np.ndarray
  temperature: np.ndarray
  class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.label)

  @property
  def class_name(self) -> np.ndarray:
    """[N] names of the labels; the numbers as text where there are no names."""
    names = self.class_names or [str(c) for c in range(self.logits.shape[1])]
    return np.array(names, object)[self.label]

  def probabilities(self, scaled: bool = False) -> np.ndarray:
    """Softmax of the logits, float32 [N C]; scaled: of logits / temperature."""
    logits = self.logits / self.temperature[:, None] if scaled else self.logits
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)

  def top(self, k: int = 5, scaled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(classes, probabilities) [N k] of the k most likely, the likeliest first."""
    order = np.argsort(-self.logits, -1, kind="stable")[:, :k]
    return order, np.take_along_axis(self.probabilities(scaled), order, -1)


class Calibration(NamedTuple):
  """Scores of the split that chooses thresholds.

  Attributes:
    confidence: [N K].
    correct: bool [N K].
    search: "held_out" or "released", see `exit_policy.find_thresholds`.
    held_out: False if the network was trained on it.
  """

  confidence: np.ndarray
  correct: np.ndarray
  search: str = "held_out"
  held_out: bool = True


class State(NamedTuple):
  """What passes from stage to stage.

  Attributes:
    label: of the exit just passed, the class.
    confidence: of that exit.
    logits: of that exit.
    carry: what later stages need, a list of arrays [W …]; empty at the end.
  """

  label: Int[Array, " W"]
  confidence: Float[Array, " W"]
  logits: Float[Array, "W C"]
  carry: list[Array]


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
    class_names: C names, or none.
    temperatures: [K], see `temperature.fit`; None for 1.
    calibration: confidence and correctness [N K] of the split that chooses
      thresholds, for `with_target`.

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
    temperatures: Numbers | None = None,
    calibration: Calibration | None = None,
  ):
    self.backbone, self.measure = backbone, measure
    self.class_names, self.calibration = class_names, calibration
    self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    self.variables = jax.tree.map(np.asarray, variables)
    _check_finite(self.variables)
    self.thresholds = self._per_exit(thresholds, "thresholds")
    if temperatures is None:
      temperatures = np.ones(backbone.num_exits)
    self.temperatures = self._per_exit(temperatures, "temperatures")
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
    self._single = jax.jit(self.decide)

  def with_thresholds(self, thresholds: Numbers) -> EarlyExit:
    """The same compiled network with other thresholds [K]."""
    other = object.__new__(EarlyExit)
    other.__dict__ = {
      **self.__dict__,
      "thresholds": self._per_exit(thresholds, "thresholds"),
    }
    return other

  def with_target(self, target: str) -> EarlyExit:
    """The same compiled network with the thresholds of a target.

    Args:
      target: such as "accuracy:0.93", see `targets`.

    Raises:
      ValueError: no such target, one that no thresholds reach on the calibration
        split, or a network without that split's scores.
    """
    if self.calibration is None:
      raise ValueError(
        "this network was made without scores of a calibration split, which a "
        "target needs; load an evaluated run, or give thresholds"
      )
    targets.check(target, self.calibration.held_out)
    choice = targets.choose(
      targets.parse(target),
      self.calibration.confidence,
      self.calibration.correct,
      self.backbone.macs,
      self.calibration.search,
      self.measure,
    )
    if choice.note:
      logging.warning("%s", choice.note)
    return self.with_thresholds(choice.thresholds)

  def compilations(self) -> list[int]:
    """[K] programs compiled for each stage so far, gathering included."""
    return [
      stage._cache_size() + gather._cache_size()  # ty: ignore[missing-attribute]
      for stage, gather in zip(self._programs, self._gather, strict=True)
    ]

  def stage(self, k: int, state: Any) -> State:
    """Stage k as a pure function; the state of stage 0 is uint8 images."""
    width = (state if k == 0 else state.label).shape[0]
    if k == 0:
      carry, before = (
        augment.normalize(state, jnp.asarray(self.mean), jnp.asarray(self.std)),
        None,
      )
    else:
      carry, before = state.carry, (state.label, state.confidence)
    logits, carry = self._split(k, width).now(carry)
    label, confidence = exit_policy.exit_confidence(logits, self.measure, before)
    last = k == self.backbone.num_exits - 1
    return State(label, confidence, logits, [] if last else carry)

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

  def predict(
    self,
    images: ArrayLike,
    target: str | None = None,
    thresholds: Numbers | None = None,
  ) -> Answers:
    """Answers for images [N H W channels]; stages stop for who has left.

    On a CPU long calls run in threads, which JAX's context managers of the caller,
    such as `jax.default_device`, do not reach.

    Args:
      images: uint8, of the size the network was trained on.
      target, thresholds: of this call, see `with_target` and `with_thresholds`.

    Raises:
      ValueError: images of another kind, a NaN confidence, or what
        `with_target` and `with_thresholds` raise.
    """
    if target is not None and thresholds is not None:
      raise ValueError("give a target or thresholds, not both")
    if target is not None:
      return self.with_target(target).predict(images)
    if thresholds is not None:
      return self.with_thresholds(thresholds).predict(images)
    images = self._checked(images)
    width = _width(len(images))

    def run(part):
      return _Pass(self, part, width).run()  # label, exit, confidence, logits

    passes = PASSES.get(jax.default_backend(), 1)
    if passes == 1 or len(images) <= width:
      found = run(images)
    else:
      if width not in self._warm:
        self.warm_up(len(images))  # or each pass would compile every program
      with futures.ThreadPoolExecutor(passes) as pool:
        parts = pool.map(run, np.array_split(images, passes))
        found = list(map(np.concatenate, zip(*parts, strict=True)))
    return self._answers(*found)

  def predict_proba(
    self, images: ArrayLike, scaled: bool = False, **options: Any
  ) -> np.ndarray:
    """[N C] probabilities at the exit where each image leaves, see `predict`.

    Args:
      images: see `predict`.
      scaled: by the temperature of that exit.
      **options: `target` or `thresholds`, see `predict`.
    """
    return self.predict(images, **options).probabilities(scaled)

  def _answers(self, label, exits, confidence, logits) -> Answers:
    """Answers, from exits counted from 0."""
    unknown = np.isnan(confidence).sum()
    if unknown:
      raise ValueError(
        f"confidence is NaN for {unknown} of {len(confidence)} images, so they "
        "have no exit; look for huge weights"
      )
    return Answers(
      label,
      exits + 1,
      confidence,
      logits,
      self.backbone.macs[exits],
      self.temperatures[exits],
      self.class_names,
    )

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
    labels, confidences = (
      np.stack(
        [
          np.concatenate([part[i] for part in parts])[: len(images)]
          for parts in found
        ],
        1,
      )
      for i in range(2)
    )
    return labels, confidences

  def answer(self, image: ArrayLike) -> Answers:
    """The answer for one image [H W channels], decided on the device; N = 1.

    Raises:
      ValueError: see `predict`.
    """
    images = self._checked(np.asarray(image)[None])
    return self._answers(*map(np.asarray, self._single(images, self.thresholds)))

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

  def decide(
    self, images: ArrayLike, thresholds: np.ndarray | Array
  ) -> tuple[Array, Array, Array, Array]:
    """(label, exit from 0, confidence, logits) of one image, as a pure function.

    Later stages are branches of `lax.cond`, so the device skips them.

    Args:
      images: uint8 [1 H W channels].
      thresholds: [K].
    """

    def run(k, state):
      state = self.stage(k, state)
      label, confidence, logits, _ = state
      leave = (label, jnp.full_like(label, k), confidence, logits)
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

  def _per_exit(self, values: Numbers, name: str) -> np.ndarray:
    values, num_exits = np.asarray(values, np.float32), self.backbone.num_exits
    if values.shape != (num_exits,) or np.isnan(values).any():
      raise ValueError(
        f"{name} must be [{num_exits}], one number per exit; got {values.tolist()}"
      )
    return values


class _Pass:
  """Images on their way through the stages: who waits where."""

  def __init__(self, network: EarlyExit, images: np.ndarray, width: int):
    num_images, self._num_exits = len(images), network.backbone.num_exits
    self._network, self._images = network, images
    self._width = width
    self._waiting: list[_Waiting | None] = [None] * self._num_exits
    self._label = np.empty(num_images, np.int32)
    self._exit = np.empty(num_images, np.int32)
    self._confidence = np.empty(num_images, np.float32)
    self._logits = np.empty((num_images, network.backbone.num_classes), np.float32)

  def run(self) -> tuple[np.ndarray, ...]:
    """(label, exit from 0, confidence, logits) of the images."""
    everyone, started = np.arange(len(self._images)), None
    for start in range(0, len(self._images), self._width):
      batch = self._images[start : start + self._width]
      state = self._network._programs[0](_padded(batch, self._width))
      # Read the answers of a batch when the device has the next one to work on.
      if started is not None:
        self._leave(0, *started)
      started = (
        state,
        np.arange(len(batch)),
        everyone[start : start + self._width],
      )
    assert started is not None  # there is an image
    self._leave(0, *started)
    for k in range(1, self._num_exits):
      rest, self._waiting[k] = self._waiting[k], None
      if rest is not None:
        self._run_stage(k, *rest)
    return self._label, self._exit, self._confidence, self._logits

  def _run_stage(self, k, state, rows, images) -> None:
    """Stage k for `images`, which are in `rows` of the state."""
    self._leave(k, self._network._programs[k](state), rows, images)

  def _leave(self, k, state, rows, images) -> None:
    """Takes the answers of exit k, and queues who goes on."""
    label, confidence, logits = (np.asarray(x)[rows] for x in state[:3])
    if k == self._num_exits - 1:
      leave = np.ones(len(rows), bool)
    else:
      leave = confidence >= self._network.thresholds[k]
    left = images[leave]
    self._label[left] = label[leave]
    self._exit[left] = k
    self._confidence[left] = confidence[leave]
    self._logits[left] = logits[leave]
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


def load(workdir: str | os.PathLike, target: str | None = None) -> EarlyExit:
  """The network of an evaluated run, with the thresholds of its target.

  Args:
    workdir: of the run.
    target: another one, see `EarlyExit.with_target`.

  Raises:
    ValueError: the workdir is not trained or not evaluated, or was trained on
      after its evaluation; or what `with_target` raises.
  """
  workdir = files.path(workdir)
  config = identity.read_config(workdir)
  results = directory.read_results(workdir)
  backbone = models.build_backbone(
    config.model, results["num_classes"], tuple(results["image_shape"])
  )
  state, info = checkpoint.restore(workdir, config, backbone)
  if int(state.step) != results["step"]:
    raise ValueError(
      f"{workdir / 'results.json'} is of step {results['step']}, the latest "
      f"checkpoint of step {int(state.step)}; run --mode=evaluate again"
    )
  if info["checkpoint"] != results["checkpoint"]:
    raise ValueError(
      f"{workdir / 'results.json'} is of other weights than the latest checkpoint; "
      "run --mode=evaluate again"
    )
  scores = directory.read_scores(workdir, results)
  network = EarlyExit(
    backbone,
    jax.device_get(state.variables),
    np.float32(results["chosen"]["thresholds"]),
    results["mean"],
    results["std"],
    results["confidence"],
    tuple(results["class_names"]),
    [entry["temperature"] for entry in results["temperatures"]],
    Calibration(
      scores["calibration_confidence"],
      scores["calibration_prediction"] == scores["calibration_label"][:, None],
      results["calibration"],
      results["samples"]["calibration"] > 0,
    ),
  )
  return network if target is None else network.with_target(target)
