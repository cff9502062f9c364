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

# The kind of data that objectives are for which name none.
PAIRS = "pairs"


@flax.struct.dataclass
class Encoded:
  """What all objectives share of a batch: made once, with gradient.

  image, text: Tokens of the two encoders, the image with its keys for the fusion
  (`VLM.remember`); where all objectives read the embeddings alone, no more than those
  are made of. words: the text's Tokens that `fuse` takes
  (`VLM.words`). zimg, ztxt: float32 [B, E], unit norm; None
  where the model has no contrastive space. All of an image, or of a text, are None
  where the batch has none.
  step: int32 [], for ramps.
  """

  image: tokens_lib.Tokens | None
  text: tokens_lib.Tokens | None
  words: tokens_lib.Tokens | None
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
    kinds: {name: kind of data} of objectives that are not for the pairs; of one that is
      for several, "pairs+texts", the loss is the sum over them.
  """

  model: nn.Module
  objectives: Mapping[str, nn.Module]
  weights: Mapping[str, float]
  shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
  kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
        Or {kind: such a batch} of the kinds of data that this step reads: objectives
        for others have no part in it.
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
    given = batch if is_of_kinds(batch) else {PAIRS: batch}
    read = {
      kind: self._read(kind, part, step, teacher_params, train)
      for kind, part in given.items()
    }
    total = jnp.float32(0.0)
    metrics = {}
    for name, objective in self.objectives.items():
      if drawn is not None and name in self.shares and name != drawn:
        continue
      several = self.kinds.get(name, PAIRS).split("+")
      for kind in several:
        if kind not in read:
          continue
        batch, enc, teacher = read[kind]
        loss, extra = objective(self.model, enc, batch, teacher=teacher, train=train)
        total = total + self.weights[name] * loss.value()
        if len(several) == 1:
          metrics[name] = loss
        else:
          before = metrics.get(name, reduce.Mean(jnp.float32(0.0), jnp.float32(1.0)))
          metrics[name] = reduce.Mean(before.total + loss.value(), before.weight)
          extra = {f"{kind}/{key}": value for key, value in extra.items()}
        metrics |= {f"{name}/{key}": value for key, value in extra.items()}
    return reduce.Mean(total, jnp.float32(1.0)), metrics

  def _read(self, kind, batch, step, teacher_params, train):
    """(batch, Encoded, teacher or None) of a batch of one kind."""
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    whole = any(
      getattr(objective, "accumulates", None) != "embeddings"
      for name, objective in self.objectives.items()
      if kind in self.kinds.get(name, PAIRS).split("+")
    )
    enc = encode(self.model, ask_lib.Live(train), batch, step, whole=whole)
    if teacher_params is None:
      return batch, enc, None
    teacher = ask_lib.Teacher(teacher_params)
    seen = encode(self.model, teacher, batch, step, whole=whole)
    return batch, enc, dataclasses.replace(teacher, enc=seen)

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
    embed = lambda ask: _embeddings(encode(self.model, ask, batch, step, whole=False))
    found = dict(live=embed(ask_lib.Live(train)), teacher={})
    if teacher_params is not None:
      found["teacher"] = embed(ask_lib.Teacher(teacher_params))
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
    whole = bool(drawn)
    enc = encode(self.model, ask_lib.Live(train), batch, step, whole=whole)
    teacher = None
    if teacher_params is not None:
      teacher = ask_lib.Teacher(teacher_params)
      teacher = dataclasses.replace(
        teacher, enc=encode(self.model, teacher, batch, step, whole=whole)
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


def is_of_kinds(batch: Mapping[str, Any]) -> bool:
  """Whether it is {kind: batch}, and not a batch."""
  return any(isinstance(part, Mapping) for part in batch.values())


def encode(
  model: nn.Module,
  ask: Callable,
  batch: Mapping[str, jax.Array],
  step: jax.Array,
  *,
  whole: bool = True,
) -> Encoded:
  """The towers over what a batch has, by the live model or by the teacher.

  whole: all tokens are wanted; else the embeddings alone are right, and towers that can
  make no more than those need.
  """
  size = (batch["image_size"],) if "image_size" in batch else ()
  image = text = words = zimg = ztxt = None
  if "image" in batch:
    image = ask(model, "encode_image", batch["image"], *size, whole=whole)
  if "text" in batch:
    text = ask(model, "encode_text", batch["text"], batch["text_mask"], whole=whole)
    words = ask(model, "words", batch["text"], batch["text_mask"], text)
  if image is not None:
    zimg = ask(model, "embed_image", image)
    image = ask(model, "remember", image)
  if text is not None:
    ztxt = ask(model, "embed_text", text)
  return Encoded(image, text, words, zimg, ztxt, step)
