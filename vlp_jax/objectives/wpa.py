"""Word-patch alignment: how far the words of a pair are from its patches.

UNITER (Chen 2020, section 3.2, WRA) and ViLT (Kim 2021, section 3.2): the optimal
transport between the fused tokens of text and image, by IPOT; official
vilt/modules/objectives.py compute_itm_wpa. It is a part of the matching objective
(`itm.align`), whose pass it shares: matching pairs are pulled together, others apart.

Shape letters: B batch, L text length, S image tokens, D width.
"""

import jax
import jax.numpy as jnp

from vlp_jax.ops import transport


def distance(text, image, *, special: bool = False) -> jax.Array:
  """float32 [B]: transport distance of the words to the patches, both fused Tokens.

  The first token of each stream and the last one of the text (its end) are no words and
  no patches.

  Args:
    special: they count as words and patches do (UNITER, whose regions have none such;
      official data/itm.py _compute_pad).
  """
  words = text.mask if special else words_of(text.mask)
  patches = image.real
  if not special:
    patches = patches.at[:, 0].set(False)
  plan, cost = transport.plan(text.x, image.x, words, patches)
  return jnp.sum(cost * plan, axis=(1, 2))


def words_of(mask: jax.Array) -> jax.Array:
  """bool [B, L]: the real tokens without the first and the last of them."""
  at = jnp.arange(mask.shape[1])
  last = mask.sum(axis=1, keepdims=True) - 1
  return mask & (at > 0) & (at != last)
