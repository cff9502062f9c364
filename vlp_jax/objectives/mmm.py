"""Masked multimodal modelling, with matching on the same pass.

FLAVA (Singh et al. 2022, section 3.2 of https://arxiv.org/abs/2112.04482); transformers
modeling_flava.py FlavaForPreTraining: patches and words are masked together, the fused
tokens say what stood there, and the class token whether the pair belongs together.
Pairs that do not match count for matching alone.

Shape letters: B batch, L length, P patches, D width, V words, C codes.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.objectives import mim
from vlp_jax.objectives import mlm
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Sum of three losses, each by its weight, on one fused pass of masked pairs.

  Wants model.image.mask_token=True and a fusion that returns both streams and a pooled
  pair ("bridged", "merged").

  Attributes:
    vocab, width: of the tokenizer and of the fused tokens, handed in by `build`.
    codes, patches, targets, rate_image, blocks: as of `mim`.
    rate: chance of a piece of text to be predicted.
    match, text, image: weights of the three.
    replaced: share of the pairs that get the image of another row; 0: all match.
    norm_eps: of both heads.
  """

  vocab: Any
  width: int
  codes: int = 8192
  patches: int = 196
  targets: Literal["column", "codebook"] = "column"
  rate_image: float = 0.4
  blocks: int = 0
  rate: float = 0.15
  match: float = 1.0
  text: float = 1.0
  image: float = 1.0
  replaced: float = 0.5
  norm_eps: float = 1e-12

  def setup(self):
    if not 0 <= self.replaced < 1:
      raise ValueError(
        f"objectives.mmm.replaced={self.replaced}: wants a share, 0 or more and less"
        " than 1."
      )
    self.words = mlm.Objective(
      self.vocab, self.width, rate=self.rate, tied=False, norm_eps=self.norm_eps
    )
    self.codebook = mim.Objective(
      self.width,
      self.codes,
      self.patches,
      self.targets,
      self.rate_image,
      self.blocks,
      norm_eps=self.norm_eps,
    )
    self.pooler = pool_lib.TanhPool(self.width, name="pool")
    self.head = linear.Linear("BD,DC->BC", (self.width, 2), ("embed", None))

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    del res
    return {"codes": ((self.patches,), "int32")} if self.targets == "column" else {}

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    del teacher
    rows, matched, found = self.pair(batch["image_id"])
    ids, predicted = self.words.corrupt(batch)
    hidden = self.codebook.hide(len(rows))
    call = ask.Live(train)
    image = call(model, "encode_image", batch["image"][rows], None, hidden)
    text = call(model, "words", ids, batch["text_mask"])
    fused = call(model, "fuse", image, text)
    return self.loss(
      fused,
      matched=matched,
      found=found,
      words=(batch["text"], predicted),
      codes=(self.codebook.codes_of(model, batch)[rows], hidden),
    )

  def pair(self, image_ids):
    """(row of each text's image int32 [B], matched bool [B], found bool [B])."""
    batch = image_ids.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)
    if not self.replaced:
      return rows, jnp.ones(batch, bool), jnp.ones(batch, bool)
    allowed = mask_lib.negatives_allowed(image_ids, group=None, matches="image")
    key, order = jax.random.split(self.make_rng("sample"))
    even = jnp.zeros(allowed.shape, jnp.float32)
    other, found = mask_lib.draw_negatives(key, even, allowed)
    kept = batch - int(batch * self.replaced)
    matched = jax.random.permutation(order, rows) < kept
    return jnp.where(matched, rows, other), matched, matched | found

  def loss(self, fused, *, matched, found, words, codes):
    """Losses of masked pairs.

    Args:
      fused: Fused. matched: bool [B]. found: bool [B], rows that count for matching.
      words: (int32 [B, L] what stood there, bool [B, L] what is predicted).
      codes: (int32 [B, P], bool [B, P]).
    """
    # Where no pair matches, all count for the masked parts, as officially.
    counted = matched | ~matched.any()
    logits = self.matches(fused)
    logp = jax.nn.log_softmax(logits, axis=1)
    right = matched.astype(jnp.int32)
    of_match = reduce.Mean.of(
      -jnp.take_along_axis(logp, right[:, None], axis=1)[:, 0], found
    )
    labels, predicted = words
    predicted = predicted & counted[:, None]
    logp = jax.nn.log_softmax(self.word_logits(fused), axis=-1)
    of_words = reduce.Mean.of(
      -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0], predicted
    )
    of_codes, extra = self.codebook.loss(
      fused.image.x, codes[0], codes[1] & counted[:, None]
    )
    total = self.match * of_match.value() + self.text * of_words.value()
    total = total + self.image * of_codes.value()
    return reduce.Mean(total, jnp.float32(1.0)), {
      "itm": of_match,
      "itm_accuracy": reduce.Mean.of(jnp.argmax(logits, axis=1) == right, found),
      "text": of_words,
      "image": of_codes,
      "image_accuracy": extra["accuracy"],
    }

  def matches(self, fused):
    """float32 [B, 2]: logits of "does not match" and "matches"."""
    return self.head(self.pooler(fused.pooled[:, None])).astype(jnp.float32)

  def word_logits(self, fused):
    """float32 [B, L, V] of the fused text."""
    x = self.words.transform(fused.x)
    return self.words.scores(x) + self.words.offset()
