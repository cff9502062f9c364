"""Writing text word by word: greedy and beam search, compiled as one scan.

The same ids as Hugging Face's `generate` without sampling. Its beam search has two sets
of rules: those of transformers before 4.50 (BLIP's official code uses 4.15) and those
since (open_clip's CoCa); see `Settings.rules`.

Shape letters: B batch, K beams, N = B K rows, T length of a text, P of its start,
V vocabulary.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

# Of a hypothesis that is none; finite, so that it can be added to.
NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a text is written.

  Attributes:
    max_length: T, of the whole row, its start included.
    eos: id that ends a text. pad: id behind it.
    min_length: no end before so many ids, the start included.
    beams: K; 1 is greedy.
    length_penalty: sums of log-probabilities are divided by length to this power.
    repetition_penalty: scores of ids that the text has already are divided by it where
      positive, and multiplied where negative (Keskar 2019).
    early_stopping: a search ends with K finished texts, else when no text that is not
      finished could still win.
    rules: "before_4.50": the length is that of the whole row without its end.
      "since_4.50": it is that of what was written, with its end.
    cache: keys and values of what is written are kept; else the whole text is read anew
      for each word. The ids are the same. For who makes `next_logits`.
  """

  max_length: int
  eos: int
  pad: int
  min_length: int = 0
  beams: int = 1
  length_penalty: float = 1.0
  repetition_penalty: float = 1.0
  early_stopping: bool = False
  rules: Literal["before_4.50", "since_4.50"] = "before_4.50"
  cache: bool = True


NextLogits = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def generate(
  next_logits: NextLogits, start: jax.Array, settings: Settings, kept: Any = None
) -> jax.Array:
  """The best text for each row of `start`.

  Args:
    next_logits: (ids int32 [N, T], at int32 [], kept) -> ([N, V], kept), of the word
      behind position `at`; ids behind it are padding. Rows of one text's beams are
      neighbours.
    start: int32 [B, P], P >= 1, what the texts begin with.
    settings: how.
    kept: what `next_logits` wants back: a tree of [any, N, …], whose rows go where
      their texts go.

  Returns:
    int32 [B, T]: start, words, `eos`, `pad` …; a text that reaches T has no `eos`.

  Raises:
    ValueError: T leaves nothing to write, or beams < 1.
  """
  if settings.max_length <= start.shape[1]:
    raise ValueError(
      f"max_length={settings.max_length} is not more than the {start.shape[1]} ids that"
      " the texts begin with: raise it."
    )
  if settings.beams < 1:
    raise ValueError(f"beams={settings.beams}: want 1 (greedy) or more.")
  search = _greedy if settings.beams == 1 else _beam
  return search(next_logits, start, settings, kept)


def constrain(scores: jax.Array, ids: jax.Array, length, settings: Settings):
  """Scores [N, V] under the repetition penalty and the least length.

  ids int32 [N, T], of which the first `length` are there.
  """
  if settings.repetition_penalty != 1.0:
    rows = jnp.arange(ids.shape[0])[:, None]
    there = jnp.arange(ids.shape[1]) < length
    # Ids that are not there go to a column that is cut off.
    at = jnp.where(there, ids, scores.shape[1])
    seen = jnp.zeros((scores.shape[0], scores.shape[1] + 1), bool)
    seen = seen.at[rows, at].set(True)[:, :-1]
    penalty = settings.repetition_penalty
    scaled = jnp.where(scores < 0, scores * penalty, scores / penalty)
    scores = jnp.where(seen, scaled, scores)
  barred = (jnp.arange(scores.shape[1]) == settings.eos) & (
    length < settings.min_length
  )
  return jnp.where(barred, -jnp.inf, scores)


def _padded(start, settings):
  width = settings.max_length - start.shape[1]
  return jnp.pad(start, ((0, 0), (0, width)), constant_values=settings.pad)


def _greedy(next_logits, start, settings, kept):
  def step(carry, at):
    ids, done, kept = carry
    logits, kept = next_logits(ids, at, kept)
    scores = constrain(logits.astype(jnp.float32), ids, at + 1, settings)
    word = jnp.argmax(scores, axis=1)
    word = jnp.where(done, settings.pad, word).astype(ids.dtype)
    ids = jax.lax.dynamic_update_index_in_dim(ids, word, at + 1, axis=1)
    return (ids, done | (word == settings.eos), kept), None

  at = jnp.arange(start.shape[1] - 1, settings.max_length - 1)
  none = jnp.zeros(start.shape[0], bool)
  (ids, _, _), _ = jax.lax.scan(step, (_padded(start, settings), none, kept), at)
  return ids


def _beam(next_logits, start, settings, memory):
  batch, given = start.shape
  beams, most = settings.beams, settings.max_length
  old = settings.rules == "before_4.50"

  def normalise(total, length, ended):
    """Score of texts of `length` ids, the end not counted."""
    if not old:
      length = length - given + ended
    return total / jnp.asarray(length, jnp.float32) ** settings.length_penalty

  def keep_best(kept, new):
    """The K best of two lots of (scores [B, K'], ids [B, K', T])."""
    scores = jnp.concatenate([kept[0], new[0]], axis=1)
    ids = jnp.concatenate([kept[1], new[1]], axis=1)
    scores, at = jax.lax.top_k(scores, beams)
    return scores, jnp.take_along_axis(ids, at[..., None], axis=1)

  def finished(kept, best, length):
    """bool [B]: whether nothing that is not finished can still win."""
    full = kept[0][:, -1] > NEVER
    if settings.early_stopping:
      return full
    bound = normalise(best, length, ended=0)
    return full & (kept[0][:, -1] >= bound)

  def step(carry, at):
    ids, totals, kept, done, memory = carry  # ids [B, K, T], totals [B, K]
    length = at + 1
    flat = ids.reshape(batch * beams, most)
    logits, memory = next_logits(flat, at, memory)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
    logp = constrain(logp, flat, length, settings)
    vocab = logp.shape[1]
    scores = (logp + totals.reshape(-1, 1)).reshape(batch, beams * vocab)
    # With one end among the ids, 2 K candidates hold K that go on.
    best, which = jax.lax.top_k(scores, 2 * beams)
    word, parent = which % vocab, which // vocab
    rows = jnp.take_along_axis(ids, parent[..., None], axis=1)
    longer = jax.lax.dynamic_update_index_in_dim(
      rows, word.astype(ids.dtype), length, axis=2
    )
    ends = word == settings.eos
    # An end below the K best candidates is not counted.
    ended = ends[:, :beams] & ~done[:, None]
    value = normalise(best[:, :beams], length, ended=1)
    new = (jnp.where(ended, value, NEVER), longer[:, :beams])
    kept = keep_best(kept, new)
    # The K best that go on, in order.
    onward, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), beams)
    going = jnp.take_along_axis(longer, order[..., None], axis=1)
    if old:
      now = finished(kept, best.max(axis=1), length)
    else:
      now = finished(kept, onward[:, 0], length + 1)
    hold = done[:, None]
    ids = jnp.where(hold[..., None], ids, going)
    totals = jnp.where(hold, totals, onward)
    # A text that is done goes on with another's memory, and counts no more.
    origin = jnp.take_along_axis(parent, order, axis=1)
    origin = (origin + beams * jnp.arange(batch)[:, None]).reshape(-1)
    memory = jax.tree.map(lambda x: jnp.take(x, origin, axis=1), memory)
    return (ids, totals, kept, done | now, memory), None

  ids = jnp.repeat(_padded(start, settings)[:, None], beams, axis=1)
  # The beams begin alike: all but one are out of the race.
  totals = jnp.full((batch, beams), NEVER).at[:, 0].set(0.0)
  kept = (jnp.full((batch, beams), NEVER), ids)
  done = jnp.zeros(batch, bool)
  at = jnp.arange(given - 1, most - 1)
  carry = (ids, totals, kept, done, memory)
  (ids, totals, kept, done, _), _ = jax.lax.scan(step, carry, at)
  # What was cut off at T competes with what has ended.
  open_ = jnp.where(done[:, None], NEVER, normalise(totals, most, ended=0))
  _, best = keep_best(kept, (open_, ids))
  return best[:, 0]
