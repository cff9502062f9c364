"""Beam search as UniLM and VLP run it, which is not that of `decode.py`.

Official pytorch_pretrained_bert/modeling.py BertForSeq2SeqDecoder.beam_search of
LuoweiZhou/VLP: each beam brings its K best words, a text that has ended keeps its place
among the K and is penalised if it goes on, and every text that ends is a candidate.

Shape letters: B batch, K beams, N = B K rows, T length of a text, P of its start,
V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlp_jax.ops import decode

# Added to the score of a text that goes on behind its end, and to an end that comes too
# early.
PENALTY = -10000.0


def generate(
  next_logits: Callable[[jax.Array, jax.Array], jax.Array],
  start: jax.Array,
  *,
  max_length: int,
  eos: int,
  pad: int,
  beams: int,
  length_bonus: float = 0.0,
  min_words: int = 0,
) -> jax.Array:
  """The best text for each row of `start`.

  Args:
    next_logits: (ids int32 [N, T], at int32 []) -> [N, V], of the word behind position
      `at`; ids behind it are padding. Rows of one text's beams are neighbours.
    start: int32 [B, P], P >= 1, what the texts begin with.
    max_length: T, of the whole row, its start included.
    eos: id that ends a text. pad: id behind it.
    beams: K, at most V; 1 is greedy.
    length_bonus: added to a text's log-probability for each word, its end included (the
      official length_penalty).
    min_words: no end among so many first words.

  Returns:
    int32 [B, T]: start, words, `eos`, `pad` …; a text that reaches T has no `eos`.

  Raises:
    ValueError: T leaves nothing to write, or beams < 1.
  """
  batch, given = start.shape
  if max_length <= given:
    raise ValueError(
      f"max_length={max_length} is not more than the {given} ids that the texts begin"
      " with: raise it."
    )
  if beams < 1:
    raise ValueError(f"beams={beams}: want 1 or more.")
  count = max_length - given

  def step(carry, frame):
    ids, totals, ended, best, text, done = carry
    at = given - 1 + frame
    flat = ids.reshape(batch * beams, max_length)
    logp = jax.nn.log_softmax(next_logits(flat, at).astype(jnp.float32), axis=1)
    early = (jnp.arange(logp.shape[1]) == eos) & (frame < min_words)
    logp = jnp.where(early, PENALTY, logp).reshape(batch, beams, -1)
    scores, words = jax.lax.top_k(logp, beams)  # [B, K, K]
    scores = scores + jnp.where(ended, PENALTY, 0.0)[..., None] + totals[..., None]
    totals, which = jax.lax.top_k(scores.reshape(batch, -1), beams)
    word = jnp.take_along_axis(words.reshape(batch, -1), which, axis=1)
    parent = which // beams
    ids = jnp.take_along_axis(ids, parent[..., None], axis=1)
    ids = jax.lax.dynamic_update_index_in_dim(
      ids, word.astype(ids.dtype), at + 1, axis=2
    )
    ended = word == eos
    # Where all have ended the search is over, and at the last word.
    over = ended.all(axis=1)
    last = over | (frame == count - 1)
    candidate = (ended | last[:, None]) & ~done[:, None]
    value = jnp.where(candidate, totals + length_bonus * (frame + 1), -jnp.inf)
    first = jnp.argmax(value, axis=1)[:, None]
    top = jnp.take_along_axis(value, first, axis=1)[:, 0]
    better = top > best
    found = jnp.take_along_axis(ids, first[..., None], axis=1)[:, 0]
    text = jnp.where(better[:, None], found, text)
    best = jnp.where(better, top, best)
    return (ids, totals, ended, best, text, done | over), None

  width = ((0, 0), (0, count))
  start = jnp.pad(start, width, constant_values=pad)
  # The beams begin alike: all but one are out of the race.
  totals = jnp.full((batch, beams), decode.NEVER).at[:, 0].set(0.0)
  carry = (
    jnp.repeat(start[:, None], beams, axis=1),
    totals,
    jnp.zeros((batch, beams), bool),
    jnp.full(batch, -jnp.inf),
    start,
    jnp.zeros(batch, bool),
  )
  carry, _ = jax.lax.scan(step, carry, jnp.arange(count))
  return carry[4]
