"""Attention masks, masked-language corruption and hard-negative draws.

Shape letters: B batch, L text or query length, S key length, V vocabulary.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

Attention = Literal["bidirectional", "causal", "prefix"]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["at"], meta_fields=["length"]
)
@dataclasses.dataclass(frozen=True)
class Writing:
  """A kind of attention: the words that come now of a text that is being written.

  They see each other from the left, and all words before them, of which the layers
  keep keys and values (`nn/attention.py`).

  Attributes:
    at: int32 [], the place of the first of them. length: places of the whole text.
  """

  at: jax.Array
  length: int

  def places(self, count: int) -> jax.Array:
    """int32 [count] of the words that come now."""
    return self.at + jnp.arange(count)

  def seen(self, count: int) -> jax.Array:
    """bool [1, 1, count, length]."""
    before = jnp.arange(self.length)[None, :] <= self.places(count)[:, None]
    return before[None, None]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["real"]
)
@dataclasses.dataclass(frozen=True)
class First:
  """A mask of rows that are all as long: what stands behind is there for its layout.

  real: places that every query sees, from the first.
  """

  real: int

  def seen(self, count: int) -> jax.Array:
    """bool [1, 1, 1, count]."""
    return (jnp.arange(count) < self.real)[None, None, None]


def begin(ids_BL: jax.Array, first: int, kind: "Attention | Writing") -> jax.Array:
  """The ids with `first` at the first place of the text."""
  if isinstance(kind, Writing):
    return jnp.where(kind.places(ids_BL.shape[1]) == 0, first, ids_BL)
  return ids_BL.at[:, 0].set(first)


def attention(
  mask_BL: jax.Array | None,
  kind: Attention | jax.Array,
  *,
  prefix_B: jax.Array | None = None,
) -> jax.Array | None:
  """bool [B, 1, L or 1, S]: which key each query may see; None means all.

  Args:
    mask_BL: bool [B, L], false at padding; None where there is none.
    kind: "bidirectional" all keys; "causal" none after the query; "prefix" as
      causal, but the first `prefix_B` keys are seen by all (UniLM, PaliGemma). Or the
      answer itself, bool [B, L, S], to which `mask_BL` is added.
    prefix_B: int32 [B], wanted by "prefix" only.

  Examples, L = 3 (rows are queries):
    bidirectional   causal   prefix (1, of length 2)
    111             100      110
    111             110      110
    111             111      111
  """
  if isinstance(kind, Writing):
    raise ValueError(
      "this part of the model reads whole texts, and keeps nothing of what it has read:"
      " write with cache=False."
    )
  keys = None if mask_BL is None else mask_BL[:, None, None, :]
  if not isinstance(kind, str):
    return kind[:, None] if keys is None else kind[:, None] & keys
  if kind == "bidirectional":
    return keys
  if mask_BL is None:
    raise ValueError(f'attention="{kind}" needs a text mask to know the length.')
  at = jnp.arange(mask_BL.shape[1])
  seen = at[None, :] <= at[:, None]  # [L, S]
  seen = seen[None, None]
  if kind == "prefix":
    if prefix_B is None:
      raise ValueError('attention="prefix" needs prefix_B, the prefix lengths.')
    seen = seen | (at[None, :] < prefix_B[:, None])[:, None, None, :]
  elif kind != "causal":
    raise ValueError(f'attention="{kind}": want bidirectional, causal or prefix.')
  return seen & keys


def mlm_corrupt(
  key: jax.Array,
  ids_BL: jax.Array,
  maskable_BL: jax.Array,
  *,
  rate: float,
  mask_id: int,
  vocab_size: int,
  continuation_BL: jax.Array | None = None,
  max_masked: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """BERT's corruption: 80 % [MASK], 10 % a random id, 10 % left as it is.

  Args:
    key: PRNG key; the draw is a function of it and the global batch shape alone.
    ids_BL: int32 [B, L].
    maskable_BL: bool [B, L], false at padding and special ids.
    rate: chance of each position (or whole word) to be predicted.
    mask_id: id that stands for [MASK].
    vocab_size: random ids are drawn from 0 … vocab_size - 1, as the official code.
    continuation_BL: bool [B, L], true at a piece that continues a word: the pieces
      of a word are then chosen together (whole-word masking).
    max_masked: at most so many predictions a row (BERT's max_predictions_per_seq);
      the ones beyond are neither corrupted nor predicted.

  Returns:
    (corrupted ids int32 [B, L], predicted bool [B, L]).
  """
  pick_key, kind_key, word_key = jax.random.split(key, 3)
  draw = jax.random.uniform(pick_key, ids_BL.shape)
  if continuation_BL is not None:
    # Each piece takes the draw of the first piece of its word.
    at = jnp.arange(ids_BL.shape[1])
    first = jax.lax.cummax(jnp.where(continuation_BL, 0, at[None, :]), axis=1)
    draw = jnp.take_along_axis(draw, first, axis=1)
  predicted = maskable_BL & (draw < rate)
  if max_masked is not None:
    predicted = predicted & (jnp.cumsum(predicted, axis=1) <= max_masked)
  kind = jax.random.uniform(kind_key, ids_BL.shape)
  word = jax.random.randint(word_key, ids_BL.shape, 0, vocab_size, ids_BL.dtype)
  corrupted = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, word, ids_BL))
  return jnp.where(predicted, corrupted, ids_BL).astype(ids_BL.dtype), predicted


def hide_some(key: jax.Array, real_BN: jax.Array, rate: float) -> jax.Array:
  """bool [B, N]: each real one is hidden by chance, and of each row at least one.

  UNITER's (official data/mrm.py _get_img_mask); a row without a real one hides none.

  Args:
    key: PRNG key. real_BN: bool, false at padding.
    rate: chance of each.
  """
  draw = jnp.where(real_BN, jax.random.uniform(key, real_BN.shape), jnp.inf)
  # The least of a row's draws is any of its real ones, evenly.
  least = draw == draw.min(axis=1, keepdims=True)
  return real_BN & ((draw < rate) | least)


def negatives_allowed(
  ids_B: jax.Array, *, group: int | None = None, matches: Literal["image", "pair"]
) -> jax.Array:
  """bool [B, B]: whether candidate column may be a negative of the row.

  Args:
    ids_B: int32 [B] image ids; captions of one image are no negatives of it.
    group: negatives come from the same run of `group` rows only (ALBEF mines within
      the 64 pairs of one GPU); None means the whole global batch.
    matches: "image" excludes all pairs of the same image, "pair" the diagonal alone
      (ALBEF's pretraining code).
  """
  rows = jnp.arange(ids_B.shape[0])
  allowed = rows[:, None] != rows[None, :]
  if matches == "image":
    allowed = allowed & (ids_B[:, None] != ids_B[None, :])
  if group is not None:
    allowed = allowed & (rows[:, None] // group == rows[None, :] // group)
  return allowed


def draw_negatives(
  key: jax.Array, logits_BB: jax.Array, allowed_BB: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One negative per row, drawn from softmax(logits) over the allowed columns.

  A masked-logit categorical in float32: no probability is ever normalised by a sum
  that can be zero, which is what crashes `torch.multinomial` in ALBEF's code.

  Returns:
    (index int32 [B], found bool [B]); `found` is false where a row allows none
    (a batch of one), and its index is then the row itself.
  """
  logits = jnp.where(allowed_BB, logits_BB.astype(jnp.float32), -jnp.inf)
  found = allowed_BB.any(axis=1)
  rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
  # A row of -inf has no distribution: it gets one that picks the row itself.
  own = jnp.where(rows[:, None] == rows[None, :], 0.0, -jnp.inf)
  logits = jnp.where(found[:, None], logits, own)
  return jax.random.categorical(key, logits, axis=1).astype(jnp.int32), found
