"""BLEU, ROUGE-L and CIDEr of captions, as coco-caption computes them.

The numbers of https://github.com/tylin/coco-caption (commit 3a9afb2): bleu/
bleu_scorer.py with the closest length, rouge/rouge.py, cider/cider_scorer.py, whose
"CIDEr" is CIDEr-D (https://arxiv.org/abs/1411.5726, section 4). METEOR and SPICE are
Java programs with tables of their own, and are not here.

All take the tokens (`ops/ptb.py`) of each image's caption, [image][token], and of its
references, [image][reference][token].
"""

import collections
from collections.abc import Sequence
import math

import numpy as np

Caption = Sequence[str]
ORDERS = 4  # n-grams up to this n
# Of rouge.py: how much more recall counts than precision.
BETA = 1.2
# Of cider_scorer.py: the width of the penalty on a wrong length.
SIGMA = 6.0
# Of bleu_scorer.py: keep what has no n-grams from dividing by zero.
TINY, SMALL = 1e-15, 1e-9


def bleu(
  captions: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> tuple[np.ndarray, np.ndarray]:
  """BLEU-1 … 4: (of the corpus float64 [4], of each image [images, 4]).

  That of the corpus counts n-grams of all captions together; it is no mean.
  """
  right = np.zeros((len(captions), ORDERS))
  guessed = np.zeros((len(captions), ORDERS))
  lengths = np.zeros((len(captions), 2))
  for i, (caption, others) in enumerate(zip(captions, references, strict=True)):
    caption, others = _words(caption), [_words(other) for other in others]
    most = collections.Counter()
    for other in others:
      most |= _ngrams(other)
    for ngram, count in (_ngrams(caption) & most).items():
      right[i, len(ngram) - 1] += count
    guessed[i] = [max(0, len(caption) - n) for n in range(ORDERS)]
    closest = min((abs(len(o) - len(caption)), len(o)) for o in others)[1]
    lengths[i] = len(caption), closest
  sums = (x.sum(axis=0, keepdims=True) for x in (right, guessed, lengths))
  return _bleu(*sums)[0], _bleu(right, guessed, lengths)


def rouge_l(
  captions: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> np.ndarray:
  """ROUGE-L float64 [images]: of the longest common subsequence with a reference.

  The best precision and the best recall may be of two references.
  """
  scores = []
  for caption, others in zip(captions, references, strict=True):
    # As the official code splits it, a text of no words is one empty word.
    caption, others = caption or [""], [other or [""] for other in others]
    common = np.array([_common(caption, other) for other in others], float)
    precision = common.max() / len(caption)
    recall = (common / [len(other) for other in others]).max()
    weighted = recall + BETA**2 * precision
    product = (1 + BETA**2) * precision * recall
    scores.append(product / weighted if product else 0.0)
  return np.array(scores)


def cider(
  captions: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> np.ndarray:
  """CIDEr-D float64 [images], in tenths as usual: its mean is the corpus's.

  An n-gram weighs by how few images have it in a reference.
  """
  counted = [[_ngrams(_words(other)) for other in others] for others in references]
  frequency = collections.Counter(
    ngram for others in counted for ngram in set().union(*others)
  )
  images = math.log(len(references))

  def vector(counts):
    """([{n-gram: weight}] by n, their norms, the length as officially counted)."""
    weights = [{} for _ in range(ORDERS)]
    for ngram, count in counts.items():
      rare = images - math.log(max(1.0, frequency[ngram]))
      weights[len(ngram) - 1][ngram] = count * rare
    norms = [math.sqrt(sum(w * w for w in each.values())) for each in weights]
    # The number of word pairs, one less than of words.
    return weights, norms, sum(c for ngram, c in counts.items() if len(ngram) == 2)

  scores = []
  for caption, others in zip(captions, counted, strict=True):
    weights, norms, length = vector(_ngrams(_words(caption)))
    total = 0.0
    for other in others:
      their_weights, their_norms, their_length = vector(other)
      penalty = math.exp(-((length - their_length) ** 2) / (2 * SIGMA**2))
      for n in range(ORDERS):
        theirs = their_weights[n]
        similarity = sum(
          min(w, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0)
          for ngram, w in weights[n].items()
        )
        if norms[n] and their_norms[n]:
          similarity /= norms[n] * their_norms[n]
        total += similarity * penalty
    scores.append(10.0 * total / ORDERS / len(others))
  return np.array(scores)


def _words(tokens):
  """As the official code splits a line of tokens: at blanks within them too."""
  return " ".join(tokens).split()


def _ngrams(tokens):
  """How often each n-gram of 1 … 4 tokens stands there."""
  return collections.Counter(
    tuple(tokens[i : i + n])
    for n in range(1, ORDERS + 1)
    for i in range(len(tokens) - n + 1)
  )


def _bleu(right, guessed, lengths):
  """[rows, 4] of counts [rows, 4] and lengths [rows, 2], the caption's first."""
  precision = np.cumprod((right + TINY) / (guessed + SMALL), axis=1)
  mean = precision ** (1.0 / np.arange(1, ORDERS + 1))
  ratio = (lengths[:, :1] + TINY) / (lengths[:, 1:] + SMALL)
  return mean * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def _common(a, b):
  """Length of the longest common subsequence."""
  row = [0] * (len(b) + 1)
  for token in a:
    before = 0
    for j, other in enumerate(b, 1):
      here = row[j]
      row[j] = before + 1 if token == other else max(row[j], row[j - 1])
      before = here
  return row[-1]
