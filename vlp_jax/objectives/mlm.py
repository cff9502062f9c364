"""Masked language modelling conditioned on the image.

BERT's corruption (Devlin 2019) and head, soft labels of the teacher as in ALBEF
(Li 2021, eq. 7; official models/xbert.py BertForMaskedLM).

Shape letters: B batch, L length, M predicted positions of a row, D width, V vocabulary.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce
from vlp_jax.ops import schedule


class Objective(nn.Module):
  """Predicts masked pieces of the text from the rest and from the image.

  Attributes:
    vocab, width: of the tokenizer and of the fused tokens, handed in by `build`.
    rate: chance of a piece (or word) to be predicted.
    whole_word: masks all pieces of a word together.
    distill, distill_ramp: alpha of the teacher's distribution, as in ITC.
    max_masked: M, at most so many predictions a row, which alone go through the
      vocabulary's matrix; None: any number, and the matrix sees every position.
    act, norm_eps: of the head.
    tied: scores words against the text encoder's table (BERT, ALBEF); False: against a
      matrix of its own (ViLT, METER).
    causal: share of the rows that are read from the left, each word from the image and
      the words before it (VLP, Zhou 2020, section 3.2: 0.75); wants
      model.fusion.type="stream". They teach the head to write: `next_logits`.
    end: the [SEP] that ends a text is masked and predicted as words are (VLP).
    smoothing: share of the target that lies on the other words, padding aside; the
      loss is the divergence from it (VLP's --label_smoothing).
    drop_worst: share of the batch's rows, those of the greatest loss, that does not
      count (VLP's --drop_worst_ratio).
    transformed: the head has a layer, activation and norm before its matrix.
  """

  vocab: Any
  width: int
  rate: float = 0.15
  whole_word: bool = False
  distill: float = 0.0
  distill_ramp: schedule.Duration = 0
  max_masked: int | None = None
  act: block.Activation = "gelu"
  norm_eps: float = 1e-12
  init_std: float | None = 0.02
  tied: bool = True
  causal: float = 0.0
  end: bool = False
  smoothing: float = 0.0
  drop_worst: float = 0.0
  transformed: bool = True

  # How it takes part in accumulation (`training/accumulate.py`).
  accumulates = "rows"

  def setup(self):
    for name in ("smoothing", "drop_worst"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(
          f"objectives.mlm.{name}={getattr(self, name)}: a share, want 0 … below 1."
        )
    if self.vocab.mask is None:
      raise ValueError(
        "objectives.mlm: this tokenizer's vocabulary has no piece that masks: use one"
        " of BERT's (wordpiece) or train one (sentencepiece)."
      )
    width = self.width
    self.dense = linear.Linear(
      "BLD,DE->BLE", (width, width), ("embed", "proj"), init_std=self.init_std
    )
    self.norm = linear.LayerNorm(self.norm_eps)
    if not self.tied:
      self.decoder = linear.Linear(
        "BLD,DV->BLV",
        (width, self.vocab.size),
        ("embed", "vocab"),
        bias=False,
        init_std=self.init_std,
      )
    zeros = axes.boxed(nn.initializers.zeros_init(), "vocab")
    self.bias = self.param("bias", zeros, (self.vocab.size,))

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    drawn = self.draw(model, enc, batch, teacher=teacher, train=train)
    return self.rows(model, enc, batch, drawn, teacher=teacher, train=train)

  def together(self, rows: int) -> int:
    """So many neighbours have to stay in one microbatch of `rows`: none.

    Raises:
      ValueError: the loss is not one of each row.
    """
    if self.drop_worst:
      raise ValueError(
        f"config: objectives.mlm.drop_worst={self.drop_worst} compares the losses of"
        f" the whole batch, of which a microbatch of {rows} rows knows nothing: set it"
        " to 0, or accumulate to 1."
      )
    return 1

  def draw(self, model, enc, batch, *, teacher=None, train=False):
    """What is random, of each row: {name: [B, …]}; "weight": how much it counts."""
    del model, enc, teacher, train
    ids, predicted = self.corrupt(batch)
    weight = positions(predicted, self.max_masked)[1].sum(axis=1)
    drawn = dict(ids=ids, predicted=predicted, weight=weight)
    if self.causal:
      draw = jax.random.uniform(self.make_rng("mask"), ids.shape[:1])
      drawn["causal"] = draw < self.causal
    return drawn

  def rows(self, model, enc, batch, drawn, *, teacher=None, train=False):
    """Loss and metrics of some rows, with what was drawn for them."""
    return self.loss(
      model,
      enc,
      drawn["ids"],
      batch["text_mask"],
      batch["text"],
      drawn["predicted"],
      teacher,
      attention=drawn.get("causal", "bidirectional"),
      train=train,
    )

  def corrupt(self, batch, rate=None):
    """(corrupted ids int32 [B, L], predicted bool [B, L]) of a batch.

    rate: chance to be predicted; None: the own.
    """
    ids = batch["text"]
    special = jnp.isin(ids, jnp.asarray(self.vocab.special))
    if self.end:
      special = special & (ids != self.vocab.sep)
    continuation = None
    if self.whole_word:
      continuation = jnp.isin(ids, jnp.asarray(self.vocab.continuation))
    return mask_lib.mlm_corrupt(
      self.make_rng("mask"),
      ids,
      batch["text_mask"] & ~special,
      rate=self.rate if rate is None else rate,
      mask_id=self.vocab.mask,
      vocab_size=self.vocab.size,
      continuation_BL=continuation,
      max_masked=self.max_masked,
    )

  def loss(
    self,
    model,
    enc,
    ids,
    mask,
    labels,
    predicted,
    teacher,
    *,
    attention="bidirectional",
    train,
  ):
    """Mean cross-entropy of the predicted positions, and its metrics.

    attention: as of the model's fusion.
    """
    if self.distill and teacher is None and train:
      raise ValueError(
        "objectives.mlm.distill wants a teacher: set ema_decay, e.g. 0.995."
      )
    at, weight = positions(predicted, self.max_masked)
    labels = jnp.take_along_axis(labels, at, axis=1)
    text = ids, mask, at, attention
    logits = self._read(ask.Live(train), model, enc.image, *text)
    logp = jax.nn.log_softmax(logits, axis=-1)
    hard = -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    losses = self._smoothed(logp, hard) if self.smoothing else hard
    if self.distill and teacher is not None:
      soft = self._read(teacher, model, teacher.enc.image, *text)
      distilled = -jnp.sum(jax.nn.softmax(soft, axis=-1) * logp, axis=-1)
      alpha = schedule.ramp(enc.step, self.distill, self.distill_ramp)
      losses = (1.0 - alpha) * losses + alpha * distilled
    counted = weight
    if self.drop_worst:
      counted = weight * keep_best(losses * weight, 1.0 - self.drop_worst)[:, None]
    right = jnp.argmax(logits, axis=-1) == labels
    return reduce.Mean.of(losses, counted), {
      "accuracy": reduce.Mean.of(right, weight),
      "hard": reduce.Mean.of(hard, weight),
    }

  def _smoothed(self, logp, hard):
    """float32 [B, M]: KL divergence of logp [B, M, V] from the smoothed target."""
    share, others = self.smoothing, self.vocab.size - 2
    rest = -logp.sum(axis=-1) + logp[..., self.vocab.pad] - hard
    entropy = -(1.0 - share) * math.log(1.0 - share) - share * math.log(share / others)
    return (1.0 - share) * hard + share / others * rest - entropy

  def predict(self, model, ids, mask, image, *, attention="bidirectional"):
    """float32 [B, L, V]: logits at every position of (masked) ids, given the image."""
    at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return self._read(ask.Live(), model, image, ids, mask, at, attention)

  def next_logits(self, model, image, ids, at):
    """float32 [B, V] of the word behind position `at` of ids int32 [B, L].

    A [MASK] stands there, which sees the image and the words before it (VLP, section
    3.3; official BertForSeq2SeqDecoder): for `ops/beam.py`.
    """
    ids = ids.at[:, at + 1].set(self.vocab.mask)
    where = jnp.broadcast_to(at + 1, (ids.shape[0], 1))
    mask = jnp.ones(ids.shape, bool)
    return self._read(ask.Live(), model, image, ids, mask, where, "causal")[:, 0]

  def _read(self, call, model, image, ids, mask, at, attention="bidirectional"):
    """float32 [B, M, V] at positions `at`, by the live modules or by the teacher."""
    text = call(model, "words", ids, mask)
    x = call(model, "fuse", image, text, attention=attention).x
    x = call(self, "transform", jnp.take_along_axis(x, at[..., None], axis=1))
    scored = call(model, "word_logits", x) if self.tied else call(self, "scores", x)
    return scored + call(self, "offset")

  def transform(self, x):
    """[B, M, D] -> [B, M, D]: BERT's dense layer, activation and norm."""
    if not self.transformed:
      return x
    return self.norm(block.ACTIVATIONS[self.act](self.dense(x)))

  def scores(self, x):
    """[B, M, D] -> float32 [B, M, V], where the word table is not used."""
    return self.decoder(x).astype(jnp.float32)

  def offset(self):
    """float32 [V], the bias of each word."""
    return self.bias


def keep_best(losses: jax.Array, share: float) -> jax.Array:
  """float32 [B], 1 for this share of the rows [B, M], those of the smallest sums."""
  worse = jnp.argsort(jnp.argsort(losses.sum(axis=1)))
  return (worse < int(len(losses) * share)).astype(jnp.float32)


def positions(predicted: jax.Array, most: int | None) -> tuple[jax.Array, jax.Array]:
  """(int32 [B, M] positions, float32 [B, M] weights): the predicted ones first."""
  length = predicted.shape[1]
  if most is None or most >= length:
    at = jnp.broadcast_to(jnp.arange(length), predicted.shape)
    return at, predicted.astype(jnp.float32)
  # A stable sort keeps the order of the text.
  at = jnp.argsort(~predicted, axis=1, stable=True)[:, :most]
  return at, jnp.take_along_axis(predicted, at, axis=1).astype(jnp.float32)
