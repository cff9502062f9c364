"""One model, several objectives: encodes a batch once and adds up the losses."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import ask as ask_lib
from vlp_jax.ops import reduce


@flax.struct.dataclass
class Encoded:
  """What all objectives share of a batch: made once, with gradient.

  image, text: Tokens of the two encoders. words: the text's Tokens that `fuse` takes
  (`VLM.words`). zimg, ztxt: float32 [B, E], unit norm; None
  where the model has no contrastive space.
  step: int32 [], for ramps.
  """

  image: tokens_lib.Tokens
  text: tokens_lib.Tokens
  words: tokens_lib.Tokens
  zimg: jax.Array | None
  ztxt: jax.Array | None
  step: jax.Array


class Pretrainer(nn.Module):
  """Model and objectives; the loss is their weighted sum.

  Attributes:
    model: see `models/vlm.py`.
    objectives: {name: module}; each is called as
      `objective(model, enc, batch, teacher=None, train=False) -> (Mean, {name: Mean})`.
    weights: {name: float}.
    shares: {name: float} of objectives of which a step has one, drawn by these shares
      (UNITER's task sampling); those that are not named are in every step.
  """

  model: nn.Module
  objectives: Mapping[str, nn.Module]
  weights: Mapping[str, float]
  shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __call__(
    self,
    batch: Mapping[str, jax.Array],
    *,
    step: jax.Array | int = 0,
    teacher_params: Mapping[str, Any] | None = None,
    train: bool = False,
    drawn: str | None = None,
  ) -> tuple[reduce.Mean, dict[str, reduce.Mean]]:
    """The loss of a global batch.

    Args:
      batch: image uint8 or float [B, R, R, 3], text int32 [B, L], text_mask bool
        [B, L], image_id int32 [B]; image_size int32 [B, 2] where images are padded.
      step: of the run, for ramps.
      teacher_params: averaged parameters, or None where there is no teacher.
      train: dropout on; the caller passes rngs "dropout", "mask" and "sample".
      drawn: the one of `shares` whose turn it is; the others have no part in the loss,
        and cost nothing. None: all have.

    Returns:
      (loss with weight 1, {"itc": …, "itc/…": …}): every objective's own loss, without
      its weight, and its metrics.
    """
    step = jnp.asarray(step, jnp.int32)
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    enc = encode(self.model, ask_lib.Live(train), batch, step)
    teacher = None
    if teacher_params is not None:
      teacher = ask_lib.Teacher(teacher_params)
      teacher = dataclasses.replace(
        teacher, enc=encode(self.model, teacher, batch, step)
      )
    total = jnp.float32(0.0)
    metrics = {}
    for name, objective in self.objectives.items():
      if drawn is not None and name in self.shares and name != drawn:
        continue
      loss, extra = objective(self.model, enc, batch, teacher=teacher, train=train)
      total = total + self.weights[name] * loss.value()
      metrics[name] = loss
      metrics |= {f"{name}/{key}": value for key, value in extra.items()}
    return reduce.Mean(total, jnp.float32(1.0)), metrics


def encode(
  model: nn.Module, ask: Callable, batch: Mapping[str, jax.Array], step: jax.Array
) -> Encoded:
  """Both towers over a batch, by the live model or by the teacher."""
  size = (batch["image_size"],) if "image_size" in batch else ()
  image = ask(model, "encode_image", batch["image"], *size)
  text = ask(model, "encode_text", batch["text"], batch["text_mask"])
  return Encoded(
    image=image,
    text=text,
    words=ask(model, "words", batch["text"], batch["text_mask"], text),
    zimg=ask(model, "embed_image", image),
    ztxt=ask(model, "embed_text", text),
    step=step,
  )
