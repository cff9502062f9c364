"""Word-to-image maps for the report."""

import dataclasses
from typing import Any

import numpy as np

from vlp_jax.explain import attention
from vlp_jax.ops import words as words_lib


@dataclasses.dataclass(frozen=True)
class WordMaps:
  """One caption over its image: uint8 [R, R, 3], words, and a map [h, w] for each."""

  image: np.ndarray
  caption: str
  words: tuple[str, ...]
  maps: np.ndarray  # [words, h, w]


def word_maps(
  pretrainer: Any,
  params: Any,
  batch: dict,
  tokenizer: Any,
  *,
  count: int = 4,
  layer: int | None = None,
  objective: str = "itm",
) -> list[WordMaps]:
  """Grad-CAM maps of the first `count` valid examples of a batch.

  A word of several pieces gets the mean of their maps.

  Args:
    pretrainer, params: the trained model, with a ViT of square patches.
    batch: image uint8 [B, R, R, 3], text, text_mask, and valid.
    tokenizer: that made the text.
    count: of captions.
    layer, objective: see `explain.attention`.
  """
  rows = np.flatnonzero(batch.get("valid", np.ones(len(batch["text"]), bool)))[:count]
  image, ids, mask = (
    np.asarray(batch[k])[rows] for k in ("image", "text", "text_mask")
  )
  weights, gradient = attention.cross_attention(
    pretrainer, params, image, ids, mask, objective=objective
  )
  # A ViT has a square of patches and at most a class token.
  side = int(np.sqrt(weights.shape[-1]))
  maps = attention.word_maps(weights, (side, side), layer=layer, gradient=gradient)
  vocab, out = tokenizer.vocab, []
  for i in range(len(rows)):
    spans = words_lib.spans(ids[i], vocab.special, vocab.continuation)
    texts = tuple(tokenizer.decode(ids[i][span]).strip() for span in spans)
    each = np.stack([maps[i, span].mean(axis=0) for span in spans])
    out.append(WordMaps(image[i], " ".join(texts), texts, each))
  return out
