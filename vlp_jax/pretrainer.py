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


# What `across` reads of a batch: little beside the images.
ACROSS = ("text", "text_mask", "image_id")


class Pretrainer(nn.Module):
  """Model and objectives; the loss is their weighted sum.

  Attributes:
    model: see `models/vlm.py`.
    objectives: {name: module}; each is called as
      `objective(model, enc, batch, teacher=None, train=False) -> (Mean, {name: Mean})`.
      Those that take part in accumulation have an attribute `accumulates`: with
      "embeddings", that call reads of `enc` the embeddings alone; with "rows", it is
      `objective.rows(model, enc, batch, drawn, …)` with
      `drawn = objective.draw(model, enc, batch, …)`, where `draw` reads the embeddings
      alone and gives arrays [B, …], of which "weight" is how much a row counts, and
      `rows` is of any rows that hold `objective.together(count)` neighbours together.
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

  # --- The same in three parts, for accumulation (`training/accumulate.py`) ---

  def embed(
    self,
    batch: Mapping[str, jax.Array],
    *,
    step: jax.Array,
    teacher_params: Mapping[str, Any] | None = None,
    train: bool = False,
  ) -> dict[str, dict[str, jax.Array]]:
    """Embeddings of any rows: {"live": {"zimg": [B, E], "ztxt": [B, E]}, "teacher": …}.

    Without a contrastive space, or a teacher, the dict is empty.
    """
    enc = encode(self.model, ask_lib.Live(train), batch, step)
    found = dict(live=_embeddings(enc), teacher={})
    if teacher_params is not None:
      teacher = ask_lib.Teacher(teacher_params)
      found["teacher"] = _embeddings(encode(self.model, teacher, batch, step))
    return found

  def across(
    self,
    batch: Mapping[str, jax.Array],
    embedded: Mapping[str, Mapping[str, jax.Array]],
    *,
    step: jax.Array,
    train: bool = False,
  ) -> tuple[jax.Array, tuple[dict[str, reduce.Mean], dict[str, Any]]]:
    """What looks across the global batch: its embeddings, and what is drawn for it.

    Args:
      batch: the columns `ACROSS`. embedded: of all rows, as `embed` made them.

    Returns:
      (weighted loss of these objectives, (metrics, {objective by rows: drawn})).
    """
    enc = _only(embedded["live"], step)
    teacher = None
    if embedded["teacher"]:
      teacher = ask_lib.Teacher({}, enc=_only(embedded["teacher"], step))
    total, metrics, drawn = jnp.float32(0.0), {}, {}
    for name, objective in self.objectives.items():
      given = (self.model, enc, batch)
      if objective.accumulates == "rows":
        drawn[name] = objective.draw(*given, teacher=teacher, train=train)
        continue
      loss, extra = objective(*given, teacher=teacher, train=train)
      total = total + self.weights[name] * loss.value()
      metrics[name] = loss
      metrics |= {f"{name}/{key}": value for key, value in extra.items()}
    return total, (metrics, drawn)

  def rows(
    self,
    batch: Mapping[str, jax.Array],
    drawn: Mapping[str, Any],
    *,
    step: jax.Array,
    teacher_params: Mapping[str, Any] | None = None,
    train: bool = False,
  ) -> tuple[dict[str, jax.Array], dict[str, reduce.Mean]]:
    """(live embeddings, metrics of the objectives by rows) of some rows.

    Args:
      batch: these rows, all columns. drawn: for these rows, as `across` drew it.
    """
    enc = encode(self.model, ask_lib.Live(train), batch, step)
    teacher = None
    if teacher_params is not None:
      teacher = ask_lib.Teacher(teacher_params)
      teacher = dataclasses.replace(
        teacher, enc=encode(self.model, teacher, batch, step)
      )
    metrics = {}
    for name, own in drawn.items():
      objective = self.objectives[name]
      loss, extra = objective.rows(
        self.model, enc, batch, own, teacher=teacher, train=train
      )
      metrics[name] = loss
      metrics |= {f"{name}/{key}": value for key, value in extra.items()}
    return _embeddings(enc), metrics


def _embeddings(enc):
  return {} if enc.zimg is None else dict(zimg=enc.zimg, ztxt=enc.ztxt)


def _only(embeddings, step):
  """A batch of which only the embeddings are there."""
  zimg, ztxt = embeddings.get("zimg"), embeddings.get("ztxt")
  return Encoded(image=None, text=None, words=None, zimg=zimg, ztxt=ztxt, step=step)


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
