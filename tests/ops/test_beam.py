"""Beam search by UniLM's rules against a slow search that keeps lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import beam

EOS, PAD, LENGTH, WORDS = 3, 0, 6, 7


def tables(seed, batch):
  """Log-probabilities by row of the batch, position and last word."""
  logits = np.random.default_rng(seed).normal(size=(batch, LENGTH, WORDS, WORDS)) * 2
  logits = logits.astype(np.float32)
  return np.array(jax.nn.log_softmax(logits, axis=-1))


def slow(table, first, *, beams, bonus, least):
  """The text of one row: modeling.py beam_search, hypothesis by hypothesis."""
  found = [(0.0, [first])]
  best, text = -np.inf, None
  for frame in range(LENGTH - 1):
    longer = []
    for score, ids in found:
      logp = table[frame, ids[-1]].copy()
      if frame < least:
        logp[EOS] = -10000.0
      behind = -10000.0 if ids[-1] == EOS and len(ids) > 1 else 0.0
      order = np.argsort(-logp, kind="stable")[:beams]
      longer += [(score + behind + logp[word], [*ids, int(word)]) for word in order]
    found = sorted(longer, key=lambda item: -item[0])[:beams]
    over = all(ids[-1] == EOS for _, ids in found)
    for score, ids in found:
      if ids[-1] == EOS or over or frame == LENGTH - 2:
        value = score + bonus * (frame + 1)
        if value > best:
          best, text = value, ids
    if over:
      break
  return text + [PAD] * (LENGTH - len(text))


@pytest.mark.parametrize(
  "beams, bonus, least", [(1, 0.0, 0), (3, 0.0, 0), (3, 1.5, 3), (4, 0.5, 1)]
)
def test_against_lists(beams, bonus, least):
  batch = 8
  table = tables(0, batch)
  start = np.full((batch, 1), 5, np.int32)

  def next_logits(ids, at):
    rows = jnp.repeat(jnp.arange(batch), beams)
    return jnp.asarray(table)[rows, at, ids[jnp.arange(batch * beams), at]]

  got = beam.generate(
    next_logits,
    jnp.asarray(start),
    max_length=LENGTH,
    eos=EOS,
    pad=PAD,
    beams=beams,
    length_bonus=bonus,
    min_words=least,
  )
  want = [slow(x, 5, beams=beams, bonus=bonus, least=least) for x in table]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fields", [dict(max_length=1), dict(beams=0)])
def test_what_cannot_be_written_is_told(fields):
  given = dict(max_length=4, eos=EOS, pad=PAD, beams=2) | fields
  with pytest.raises(ValueError, match=next(iter(fields))):
    beam.generate(lambda ids, at: ids, jnp.ones((2, 1), jnp.int32), **given)
