"""Fine-tuning for retrieval: the right text among wrong ones of one image.

ViLT (official modules/objectives.py compute_irtr): each image is fused with its own
text and with 15 others, and the scores are a softmax. The score is a linear layer that
the official code starts from the matching head's row of "match".

Shape letters: B images, N wrong texts of each, L text length, P of a pooled pair.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Cross-entropy of the own text among 1 + N.

  Attributes:
    width, pooled_width: of the fused tokens and of a pooled pair, handed in by `build`.
    negatives: N, drawn evenly from the texts of other images in the batch, with
      repetition; the official code draws from all data.
    exclude: "image": no text of the same image; "pair": any but the own (official).
  """

  width: int
  pooled_width: int | None = None
  negatives: int = 15
  exclude: Literal["image", "pair"] = "image"

  def setup(self):
    width = self.pooled_width or self.width
    self.head = linear.Linear("BD,DC->BC", (width, 1), ("embed", None))

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    allowed = mask_lib.negatives_allowed(batch["image_id"], matches=self.exclude)
    even = jnp.zeros(allowed.shape, jnp.float32)
    keys = jax.random.split(self.make_rng("sample"), self.negatives)
    drawn = [mask_lib.draw_negatives(key, even, allowed) for key in keys]
    rows = jnp.stack([index for index, _ in drawn], axis=1)
    own = jnp.arange(rows.shape[0], dtype=rows.dtype)
    rows = jnp.concatenate([own[:, None], rows], axis=1)
    texts = enc.words.replace(x=enc.words.x[rows], mask=enc.words.mask[rows])
    return self.loss(model, enc.image, texts, drawn[0][1], train=train)

  def loss(self, model, image, texts, found, *, train):
    """Loss and metrics; texts are Tokens [B, 1 + N, L, D], the own one first."""
    scores = self.scores(model, image, texts, train=train)
    losses = -jax.nn.log_softmax(scores, axis=1)[:, 0]
    right = jnp.argmax(scores, axis=1) == 0
    return reduce.Mean.of(losses, found), {"accuracy": reduce.Mean.of(right, found)}

  def scores(self, model, image, texts, *, train=False) -> jax.Array:
    """float32 [B, 1 + N] of each image with each of its texts."""
    count = texts.x.shape[1]
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    texts = texts.replace(x=flat(texts.x), mask=flat(texts.mask))
    scores = self.score(model, _repeat(image, count), texts, train=train)
    return scores.reshape(-1, count)

  def score(self, model, image, text, *, train=False) -> jax.Array:
    """float32 [B] of pairs of Tokens: what retrieval ranks by."""
    fused = model.fuse(image, text, train=train)
    return self.head(model.pool_pair(fused)).astype(jnp.float32)[:, 0]


def _repeat(tokens, count):
  """Tokens of which each row stands `count` times."""
  mask = None if tokens.mask is None else jnp.repeat(tokens.mask, count, axis=0)
  return tokens.replace(x=jnp.repeat(tokens.x, count, axis=0), mask=mask)
