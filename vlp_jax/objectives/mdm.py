"""Masked data modelling: what was hidden, of an image, of a text, or of a pair.

BEiT-3 (Wang et al. 2022, section 2.2 of https://arxiv.org/abs/2208.10442): one task on
all data, and the same heads for it. A head is a linear layer (the released files'
`mlm_head` and `mim_head`).

Shape letters: B batch, L length, P patches, D width, V words, C codes, M predicted
positions of a row.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.objectives import mim
from vlp_jax.objectives import mlm
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Sum of the losses of words and of codes, of those that the batch has.

  Say kind="pairs+images+texts" to have it on all. Wants model.image.mask_token=True,
  and of a fusion both streams ("experts", "merged", "bridged").

  Attributes:
    vocab, width: of the tokenizer and of the fused tokens, handed in by `build`.
    codes, patches, targets, blocks: as of `mim`. rate_image: its `rate`.
    rate: chance of a piece of a text alone to be predicted. rate_pair: of a pair's.
    max_masked: M, as of `mlm`.
  """

  vocab: Any
  width: int
  codes: int = 8192
  patches: int = 196
  targets: Literal["column", "codebook"] = "column"
  rate_image: float = 0.4
  blocks: int = 16
  rate: float = 0.15
  rate_pair: float = 0.5
  max_masked: int | None = None

  READS = ()

  def setup(self):
    self.words = mlm.Objective(
      self.vocab,
      self.width,
      rate=self.rate,
      max_masked=self.max_masked,
      tied=False,
      transformed=False,
    )
    self.codebook = mim.Objective(
      self.width,
      self.codes,
      self.patches,
      self.targets,
      self.rate_image,
      self.blocks,
      transformed=False,
    )

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    del res
    return {"codes": ((self.patches,), "int32")} if self.targets == "column" else {}

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    del teacher
    call = ask.Live(train)
    image = text = codes = words = None
    if enc.image is not None:
      codes = self.codebook.codes_of(model, batch), self.codebook.hide(len(enc.image.x))
      image = call(model, "encode_image", batch["image"], None, codes[1])
    if enc.text is not None:
      rate = self.rate if image is None else self.rate_pair
      ids, predicted = self.words.corrupt(batch, rate)
      words = batch["text"], predicted
      read = "encode_text" if image is None else "words"
      text = call(model, read, ids, batch["text_mask"])
    if image is not None and text is not None:
      text = call(model, "fuse", image, text)
      image = model.fused_image(text)
    return self.loss(image, text, codes=codes, words=words)

  def loss(self, image, text, *, codes, words):
    """Losses of tokens that have seen what was not hidden.

    Args:
      image, text: Tokens, or None. codes: (int32 [B, P], bool [B, P], the hidden).
      words: (int32 [B, L] what stood there, bool [B, L] what is predicted).
    """
    total, metrics = jnp.float32(0.0), {}
    if image is not None:
      loss, extra = self.codebook.loss(image.x, *codes)
      total = total + loss.value()
      metrics |= {"image": loss, "image_accuracy": extra["accuracy"]}
    if text is not None:
      labels, predicted = words
      at, weight = mlm.positions(predicted, self.max_masked)
      labels = jnp.take_along_axis(labels, at, axis=1)
      logits = self.word_logits(jnp.take_along_axis(text.x, at[..., None], axis=1))
      logp = jax.nn.log_softmax(logits, axis=-1)
      losses = -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
      right = jnp.argmax(logits, axis=-1) == labels
      loss = reduce.Mean.of(losses, weight)
      total = total + loss.value()
      metrics |= {"text": loss, "text_accuracy": reduce.Mean.of(right, weight)}
    return reduce.Mean(total, jnp.float32(1.0)), metrics

  def word_logits(self, x: jax.Array) -> jax.Array:
    """float32 [B, M, V] of fused or encoded text [B, M, D]."""
    return self.words.scores(x) + self.words.offset()
