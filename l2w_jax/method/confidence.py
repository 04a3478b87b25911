"""How sure an exit is of its answer: the measures that thresholds are for.

Shapes: N samples, K exits, C classes. A larger confidence is surer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from l2w_jax.method import losses

MEASURES = ("probability", "margin", "entropy", "patience")


def exit_confidence(
  logits: Float[Array, "B C"],
  measure: str = "probability",
  before: tuple[Int[Array, " B"], Float[Array, " B"]] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """(prediction, confidence) of one exit; a larger confidence is surer.

  probability: largest softmax probability, in (0, 1].
  margin: largest minus second largest softmax probability, in [0, 1].
  entropy: 1 - H / ln C, with H the entropy of the softmax (Teerapittayanon et
    al., BranchyNet, ICPR 2016, leave at small H), in [0, 1].
  patience: at how many exits in a row, up to this one, the prediction has been
    the same (Zhou et al., BERT Loses Patience, NeurIPS 2020), 1, 2, … K.

  Args:
    logits: of this exit.
    measure: one of `MEASURES`.
    before: what this function returned for the exit before, if there is one;
      only patience reads it.

  Raises:
    ValueError: an unknown measure.
  """
  if measure not in MEASURES:
    raise ValueError(
      f"confidence measure {measure!r} is not one of {', '.join(MEASURES)}."
    )
  prediction = logits.argmax(-1).astype(jnp.int32)
  if measure == "probability":
    return prediction, losses.confidence(logits[:, None])[:, 0]
  log_p = jax.nn.log_softmax(
    logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  )
  if measure == "margin":
    first, second = lax.top_k(jnp.exp(log_p), 2)[0].T
    return prediction, first - second
  if measure == "entropy":
    information = (jnp.exp(log_p) * jnp.maximum(log_p, -1e4)).sum(-1)
    return prediction, 1 + information / np.log(logits.shape[-1])
  # NaN logits have no prediction; 0 · them keeps their NaN.
  one = 1 + 0 * log_p[:, 0]
  if before is None:
    return prediction, one
  return prediction, one + jnp.where(prediction == before[0], before[1], 0)


def confidence(
  logits: ArrayLike, measure: str = "probability"
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
  """(predictions, confidences) at every exit, from logits [N K C].

  The same numbers as `exit_confidence` exit by exit, which says what the
  measures are and raises.
  """
  logits, found = jnp.asarray(logits), []
  for k in range(logits.shape[1]):
    before = found[-1] if found else None
    found.append(exit_confidence(logits[:, k], measure, before))
  predictions, confidences = zip(*found, strict=True)
  return jnp.stack(predictions, 1), jnp.stack(confidences, 1)
