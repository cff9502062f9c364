"""Captioning: each next word of the text, given the image and the words before it.

BLIP (Li 2022, https://arxiv.org/abs/2201.12086, section 3.2; official models/med.py
BertLMHeadModel), CoCa (Yu 2022, https://arxiv.org/abs/2205.01917, equation 4; CoCaLoss
of open_clip), CapPa (Tschannen 2023, https://arxiv.org/abs/2306.07915, section 3: a
share of the captions is predicted in parallel, from the image and nothing else).

Shape letters: B batch, L length, T = L - 1 predicted positions, D width, V vocabulary,
K beams, P pieces.
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import decode
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce

# Bytes of float32 logits on a device, above which a text is scored piece by piece. Of
# SigLIP 2's 128 texts on a chip and 256,000 words, all would be 7.7 GiB.
MOST_LOGITS = 1 << 30


class Objective(nn.Module):
  """Cross-entropy of the text's tokens 1 …, read from the left; padding does not count.

  The head is BERT's of masked words by default: dense, activation, norm, the table of
  words and a bias.

  Attributes:
    vocab, width: of the tokenizer and of the fused tokens, handed in by `build`.
    smoothing: share of the target that is spread over the whole vocabulary (BLIP: 0.1).
    prompt: so many of the first tokens, [CLS] with them, are given and not predicted
      (BLIP's "a picture of " in fine-tuning: 4).
    parallel: chance of a text to be predicted in parallel in training: [MASK] at every
      position, all of which see each other (CapPa: 0.75).
    transform: the head has its dense layer, activation (`act`) and norm.
    tied: words are scored by the text encoder's table, else by a matrix of the head.
    bias: the head adds a bias for each word.
    writer: what reads the image and writes: the model's fusion, on top of its text
      encoder, or its decoder, which has words of its own (LocCa, SigLIP 2).
    pieces: so many parts of a text are scored one after another, and their logits made
      once more in the backward pass; None: as few as keep those of a device below
      1 GiB. The numbers are the same.
  """

  vocab: Any
  width: int
  smoothing: float = 0.0
  prompt: int = 1
  parallel: float = 0.0
  transform: bool = True
  tied: bool = True
  bias: bool = True
  act: block.Activation = "gelu"
  norm_eps: float = 1e-12
  init_std: float | None = 0.02
  writer: Literal["fusion", "decoder"] = "fusion"
  pieces: int | None = None

  # How it takes part in accumulation (`training/accumulate.py`).
  accumulates = "rows"

  def setup(self):
    if self.prompt < 1:
      raise ValueError(f"objectives.lm.prompt={self.prompt}: want 1 ([CLS]) or more.")
    if self.pieces is not None and self.pieces < 1:
      raise ValueError(f"objectives.lm.pieces={self.pieces}: want 1 or more, or None.")
    if self.parallel and self.vocab.mask is None:
      raise ValueError(
        f"objectives.lm.parallel={self.parallel} hides words, but this tokenizer's"
        " vocabulary has no piece that masks: set it to 0, or use wordpiece."
      )
    width, words = self.width, self.vocab.size
    if self.transform:
      self.dense = linear.Linear(
        "BLD,DE->BLE", (width, width), ("embed", "proj"), init_std=self.init_std
      )
      self.norm = linear.LayerNorm(self.norm_eps)
    if not self.tied:
      self.out = linear.Linear(
        "BLD,DV->BLV",
        (width, words),
        ("embed", "vocab"),
        bias=False,
        init_std=self.init_std,
      )
    if self.bias:
      zeros = axes.boxed(nn.initializers.zeros_init(), "vocab")
      self.offset = self.param("bias", zeros, (words,))

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    drawn = self.draw(model, enc, batch, teacher=teacher, train=train)
    return self.rows(model, enc, batch, drawn, teacher=teacher, train=train)

  def together(self, rows: int) -> int:
    """So many neighbours have to stay in one microbatch of `rows`: none."""
    del rows
    return 1

  def draw(self, model, enc, batch, *, teacher=None, train=False):
    """What is random, of each row: {name: [B, …]}; "weight": how much it counts."""
    del model, enc, teacher
    weight = self.counted(batch["text_mask"]).sum(axis=1, dtype=jnp.float32)
    drawn = dict(weight=weight)
    if self.parallel and train:
      draw = jax.random.uniform(self.make_rng("mask"), weight.shape)
      drawn["parallel"] = draw < self.parallel
    return drawn

  def rows(self, model, enc, batch, drawn, *, teacher=None, train=False):
    """Loss and metrics of some rows, with what was drawn for them."""
    del teacher
    ids, mask = batch["text"], batch["text_mask"]
    if "parallel" in drawn:
      given, seen, attention = self.blank(ids[:, :-1], drawn["parallel"])
      x = self.read(model, enc.image, given, seen, None, attention, train=train)
    else:
      x = self.read(model, enc.image, ids, mask, enc.text, "causal", train=train)
      x = x[:, :-1]
    losses, right = self.scores(model, x, ids[:, 1:])
    counted = self.counted(mask)
    return reduce.Mean.of(losses, counted), {"accuracy": reduce.Mean.of(right, counted)}

  def blank(self, ids, rows):
    """Ids of which `rows` bool [B] are hidden: (ids [B, T], mask, attention [B, T, T]).

    All positions of a hidden row see each other, padding too: how many words there are
    is not told (big_vision's cappa.py).
    """
    length = ids.shape[1]
    left = jnp.tril(jnp.ones((length, length), bool))
    ids = jnp.where(rows[:, None], self.vocab.mask, ids)
    return ids, jnp.ones(ids.shape, bool), left | rows[:, None, None]

  def counted(self, mask):
    """bool [B, T] of mask [B, L]: the tokens that are predicted and count."""
    return mask[:, 1:] & (jnp.arange(1, mask.shape[1]) >= self.prompt)

  def scores(self, model, x, labels):
    """(losses float32 [B, T], right bool [B, T]) of labels [B, T], by x [B, T, D]."""
    length = labels.shape[1]
    pieces = self.pieces or self._fewest_pieces(labels.shape)
    pieces = 1 if self.is_initializing() else min(pieces, length)
    if pieces == 1:
      return self.losses(self.head(model, x), labels)

    own, of_model = ask.free(self), ask.free(model)

    @jax.checkpoint
    def of_a_piece(piece):
      x, labels = piece
      return own("losses", own("head", of_model.bound(), x), labels)

    out = jax.lax.map(of_a_piece, (_cut(x, pieces), _cut(labels, pieces)))
    return tuple(_join(a)[:, :length] for a in out)

  def _fewest_pieces(self, shape):
    """So many that the logits of one stay below `MOST_LOGITS` on each device."""
    devices = axes.devices_along("batch") * axes.devices_along("vocab")
    most = 4 * math.prod(shape) * self.vocab.size / devices
    return math.ceil(most / MOST_LOGITS)

  def losses(self, logits, labels):
    """(losses float32 [B, T], right bool [B, T]) of float32 logits [B, T, V]."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    if self.smoothing:
      spread = -jnp.mean(logp, axis=-1)
      losses = (1.0 - self.smoothing) * losses + self.smoothing * spread
    return losses, jnp.argmax(logits, axis=-1) == labels

  def logits(
    self, model, image, ids, mask, *, encoded=None, attention="causal", train=False
  ):
    """float32 [B, L, V]: at each position, of the word after it.

    encoded: the ids as the text encoder has encoded them, which serves where it reads
    from the left itself (CoCa).
    """
    x = self.read(model, image, ids, mask, encoded, attention, train=train)
    return self.head(model, x)

  def read(self, model, image, ids, mask, encoded, attention, *, train=False):
    """[B, L, D]: the ids as the writer has read them, each given the image."""
    if self.writer == "decoder":
      return model.decode(ids, mask, image, attention=attention, train=train).x
    text = model.words(ids, mask, encoded, attention, train=train)
    return model.fuse(image, text, attention=attention, train=train).x

  def head(self, model, x):
    """[B, L, D] -> float32 [B, L, V]."""
    if self.transform:
      x = self.norm(block.ACTIVATIONS[self.act](self.dense(x)))
    if not self.tied:
      logits = self.out(x).astype(jnp.float32)
    elif self.writer == "decoder":
      logits = model.decoded_logits(x)
    else:
      logits = model.word_logits(x)
    return logits + self.offset if self.bias else logits

  def generate(
    self,
    model: nn.Module,
    image: Any,
    start: jax.Array,
    settings: decode.Settings,
  ) -> jax.Array:
    """Writes a text for each image.

    Args:
      model: the VLM. image: Tokens of B images.
      start: int32 [B, P], what each text begins with: [CLS] (or [DEC], which takes its
        place where the vocabulary has one) and the prompt.
      settings: greedy or beam search, and how.

    Returns:
      int32 [B, settings.max_length], `start` included, padded.
    """
    repeat = functools.partial(jnp.repeat, repeats=settings.beams)
    images = jax.tree.map(functools.partial(repeat, axis=0), image)

    def read_anew(ids, at, kept):
      # What is behind `at` is not seen from there: reading is from the left.
      logits = self.logits(model, images, ids, jnp.ones(ids.shape, bool))
      return jax.lax.dynamic_index_in_dim(logits, at, axis=1, keepdims=False), kept

    if not settings.cache:
      return decode.generate(read_anew, start, settings)

    def read(model, image, ids, at):
      writing = mask_lib.Writing(jnp.asarray(at), settings.max_length)
      return self.read(model, image, ids, jnp.ones(ids.shape, bool), None, writing)

    writer = ask.writer(model, read)
    _, *kept = writer.begin(image, start, 0)
    given, written = jax.tree.map(functools.partial(repeat, axis=1), kept)

    def go_on(ids, at, written):
      word = jax.lax.dynamic_slice_in_dim(ids, at, 1, axis=1)
      x, written = writer.go_on(given, written, images, word, at)
      return self.head(model, x)[:, 0], written

    return decode.generate(go_on, start, settings, written)


def _cut(x, pieces):
  """[B, T, …] -> [P, B, S, …], S long each; the last is filled up with zeros."""
  length = -(-x.shape[1] // pieces)
  fill = [(0, 0), (0, pieces * length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, fill).reshape(x.shape[0], pieces, length, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _join(x):
  """[P, B, S] -> [B, P S]."""
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
