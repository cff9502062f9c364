"""Greedy and beam search against a plain port of Hugging Face's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import decode

VOCAB, EOS, PAD, LENGTH = 7, 6, 0, 8
# The next word depends on the last two, and differs for each text.
TABLE = np.random.default_rng(0).normal(size=(3, VOCAB, VOCAB, VOCAB)) * 1.5


def scores_of(row, ids):
  """[V]: what follows the ids of text `row`."""
  return TABLE[row][ids[-2] if len(ids) > 1 else 0][ids[-1]]


def settings(**fields):
  return decode.Settings(
    **(dict(max_length=LENGTH, eos=EOS, pad=PAD, min_length=3) | fields)
  )


def start():
  return jnp.asarray([[1, 2], [3, 1], [5, 4]], jnp.int32)


def ours(how):
  beams = how.beams
  table = jnp.asarray(TABLE, jnp.float32)
  rows = jnp.repeat(jnp.arange(3), beams)

  def next_logits(ids, at, before):
    last = jax.lax.dynamic_index_in_dim(ids, at, axis=1, keepdims=False)
    return table[rows, before[0], last], last[None]

  # The word before the last is what is kept of a text.
  before = jnp.repeat(start()[:, 0], beams)[None]
  run = jax.jit(lambda ids: decode.generate(next_logits, ids, how, before))
  return np.asarray(run(start())).tolist()


def constrained(scores, ids, how):
  scores = scores.copy()
  for i in set(ids):
    factor = how.repetition_penalty
    scores[i] = scores[i] * factor if scores[i] < 0 else scores[i] / factor
  if len(ids) < how.min_length:
    scores[EOS] = -np.inf
  return scores


def log_softmax(x):
  return x - np.log(np.exp(x).sum())


def greedy(row, ids, how):
  while len(ids) < how.max_length and EOS not in ids:
    ids = [*ids, int(np.argmax(constrained(scores_of(row, ids), ids, how)))]
  return ids


def beam(row, ids, how):
  """transformers 4.15 BeamSearchScorer, or the rules since 4.50, for one text."""
  old, given = how.rules == "before_4.50", len(ids)

  def value(total, length, ended):
    length = length if old else length - given + ended
    return total / length**how.length_penalty

  live = [(0.0, list(ids))]
  kept = []
  for length in itertools.count(given):
    options = []
    for total, text in live:
      logp = constrained(log_softmax(scores_of(row, text)), text, how)
      options += [(total + logp[w], [*text, w]) for w in range(VOCAB)]
    options = sorted(options, key=lambda option: -option[0])[: 2 * how.beams]
    onward = []
    for rank, (total, text) in enumerate(options):
      if text[-1] != EOS:
        onward.append((total, text))
      elif rank < how.beams:
        kept = sorted([*kept, (value(total, length, 1), text)], key=lambda k: -k[0])
        kept = kept[: how.beams]
    live = onward[: how.beams]
    if len(kept) == how.beams:
      best = options[0][0] if old else live[0][0]
      bound = value(best, length if old else length + 1, 0)
      if how.early_stopping or kept[-1][0] >= bound:
        break
    if length + 1 == how.max_length:
      kept += [(value(total, how.max_length, 0), text) for total, text in live]
      break
  return max(kept, key=lambda k: k[0])[1]


def padded(ids):
  return ids + [PAD] * (LENGTH - len(ids))


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy(penalty):
  how = settings(repetition_penalty=penalty)
  want = [padded(greedy(i, row, how)) for i, row in enumerate(start().tolist())]
  assert ours(how) == want


@pytest.mark.parametrize("rules", ["before_4.50", "since_4.50"])
@pytest.mark.parametrize(
  "fields",
  [
    dict(beams=3),
    dict(beams=2, length_penalty=2.0, repetition_penalty=1.3),
    dict(beams=3, length_penalty=0.0, min_length=0, early_stopping=True),
  ],
)
def test_beam(rules, fields):
  how = settings(rules=rules, **fields)
  want = [padded(beam(i, row, how)) for i, row in enumerate(start().tolist())]
  assert ours(how) == want


def test_no_end_before_the_least_length():
  ids = jnp.asarray([[1, 2, 0, 0]])
  scores = jnp.zeros((1, VOCAB))
  how = settings(min_length=3)
  assert decode.constrain(scores, ids, 2, how)[0, EOS] == -np.inf
  assert decode.constrain(scores, ids, 3, how)[0, EOS] == 0


def test_what_is_not_there_is_not_repeated():
  """Padding behind the text is no word of it."""
  ids = jnp.asarray([[1, 2, 0, 0]])
  how = settings(repetition_penalty=2.0, min_length=0)
  got = decode.constrain(jnp.full((1, VOCAB), -1.0), ids, 2, how)
  assert got[0].tolist() == [-1.0, -2.0, -2.0, -1.0, -1.0, -1.0, -1.0]


def test_bad_settings_are_told():
  with pytest.raises(ValueError, match="max_length=2 is not more than the 2 ids"):
    decode.generate(None, start(), settings(max_length=2))
  with pytest.raises(ValueError, match=r"beams=0: want 1 \(greedy\) or more"):
    decode.generate(None, start(), settings(beams=0))
