"""Does the model read masked words from the image? With the image, and without.

Shape letters: R rows (one masking of one caption), L length.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data import evaluation
from vlp_jax.evaluators import pairs
from vlp_jax.evaluators import placement
from vlp_jax.ops import words as words_lib


@dataclasses.dataclass
class Evaluator:
  """Accuracy of MLM on chosen words, with the image and with it blanked.

  A blank image is the mean colour, zero once normalised. A word of several pieces is
  right if all are. Of an example with several captions, the first counts.

  Attributes:
    words: "attributes" takes those that the source's examples list as `words`; "all"
      takes every word; or the words themselves.
    mask: "one" hides one word at a time, "together" all the chosen words of a caption.
    rate: share of the chosen words that are tried, drawn by (seed, example).
    kinds: {kind: words}; accuracies of each kind are reported too.
    objective: the name of the MLM objective in the config.
    seed: of the draw.
    pairs: rows that are fused in one step; bounds memory.
  """

  words: str | tuple[str, ...] = "attributes"
  mask: Literal["one", "together"] = "one"
  rate: float = 1.0
  kinds: Mapping[str, tuple[str, ...]] | None = None
  objective: str = "mlm"
  seed: int = 0
  pairs: int = 256

  def setup(
    self,
    *,
    pretrainer: Any,
    source: Any,
    tokenizer: Any,
    pp: str,
    mesh: jax.sharding.Mesh | None,
    batch_size: int,
  ) -> None:
    """Binds model and data, and makes the functions that are compiled once."""
    place = placement.of(mesh, batch_size)
    pairs.check("mlm", self.pairs, self.objective, pretrainer, "predict")
    if isinstance(self.words, str) and self.words not in ("attributes", "all"):
      raise ValueError(
        f'evals (mlm): words="{self.words}": want "attributes", "all" or a list.'
      )
    if self.mask not in ("one", "together"):
      raise ValueError(f'evals (mlm): mask="{self.mask}": want "one" or "together".')
    if not 0.0 < self.rate <= 1.0:
      raise ValueError(f"evals (mlm): rate={self.rate}: want more than 0, at most 1.")
    self._source, self._tokenizer = source, tokenizer
    self._batches = lambda: evaluation.eval_pairs(
      source, pp, tokenizer, batch_size=batch_size
    )
    columns = ("example_index", "text", "text_mask")
    self._encode = pairs.image_encoder(pretrainer, place, columns=columns)
    self._place, self._batch_size = place, batch_size

    def predict(m, images, texts):
      ids, mask = texts
      logits = m.objectives[self.objective].predict(m.model, ids, mask, images)
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    self._predict = pairs.fuser(pretrainer, place, predict, step=self.pairs)
    self._listed = {}

  def __call__(self, variables: Any) -> dict[str, float]:
    """Percentages "accuracy", "accuracy_blank" and their difference "gain", and the
    same under "{kind}/"."""
    examples, shape = self._examples(variables)
    rows = self._rows(examples)
    if not rows.example.size:
      raise ValueError(
        f"evals (mlm): words={self.words!r}: none of them is in a caption of the data."
      )
    per_image = int(np.unique(rows.example, return_counts=True)[1].min())
    texts = (rows.ids, examples["text_mask"][rows.example])
    order = np.arange(len(rows.example))
    seen = self._predict(
      variables, examples["tokens"], texts, rows.example, order, per_image=per_image
    )
    # Same table shape as above, so that nothing is compiled anew.
    blank = self._predict(
      variables,
      self._blank(variables, shape),
      texts,
      np.zeros_like(rows.example),
      order,
      per_image=per_image,
    )
    right = {"accuracy": [], "accuracy_blank": []}
    for row, span in rows.hidden:
      want = examples["text"][rows.example[row], span]
      for name, got in (("accuracy", seen), ("accuracy_blank", blank)):
        right[name].append(bool(np.all(got[row, span] == want)))
    right = {name: np.array(values) for name, values in right.items()}
    out = _percent(right, np.ones(len(rows.hidden), bool))
    for kind, members in (self.kinds or {}).items():
      chosen = np.isin(np.array(rows.words), [word.lower() for word in members])
      if chosen.any():
        out |= {f"{kind}/{k}": v for k, v in _percent(right, chosen).items()}
    return out

  def _examples(self, variables):
    """(columns and image tokens of the whole set, shape of an image)."""
    shapes = []

    def watched():
      for batch in self._batches():
        shapes.append(batch["image"].shape[1:])
        yield batch

    return self._encode(variables, watched()), shapes[0]

  def _blank(self, variables, shape):
    # The mean of all images; of regions, none.
    image = np.zeros((self._batch_size, *shape), np.float32)
    _, tokens = self._encode.encode(variables, self._place.split(image))
    return placement.take(jax.device_get(tokens), np.arange(1))

  def _rows(self, examples):
    """What to hide: captions with masks, sorted by example, and the words to check."""
    vocab = self._tokenizer.vocab
    source, ids, hidden, texts = [], [], [], []
    for i, row in enumerate(examples["text"]):
      index = int(examples["example_index"][i])
      spans = words_lib.spans(row, vocab.special, vocab.continuation)
      keep = np.random.default_rng((self.seed, index)).random(len(spans)) < self.rate
      chosen = self._chosen(index)
      found = []
      for span, kept in zip(spans, keep, strict=True):
        word = self._tokenizer.decode(row[span]).strip().lower()
        if kept and (chosen is None or word in chosen):
          found.append((span, word))
      together = self.mask == "together"
      for group in [found] if together and found else [[each] for each in found]:
        masked = row.copy()
        for span, word in group:
          masked[span] = vocab.mask
          hidden.append((len(ids), span))
          texts.append(word)
        source.append(i)
        ids.append(masked)
    ids = np.array(ids, np.int32).reshape(-1, examples["text"].shape[1])
    return _Rows(np.array(source, int), ids, hidden, texts)

  def _chosen(self, index):
    """The words that may be hidden in this example; None: all."""
    if self.words == "all":
      return None
    if self.words != "attributes":
      return {word.lower() for word in self.words}
    if index not in self._listed:
      # Once for all evaluations.
      every = self._source.read(np.arange(len(self._source)))
      if "words" not in every[index]:
        raise ValueError(
          'evals (mlm): words="attributes", but the examples of this data source list'
          ' no `words`: set words="all", or give a list of words.'
        )
      for i, example in enumerate(every):
        self._listed[i] = {str(word).lower() for word in example["words"]}
    return self._listed[index]


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Masked captions: example int [R], ids int32 [R, L]; and for each hidden word its
  (row, positions) and its text."""

  example: np.ndarray
  ids: np.ndarray
  hidden: list[tuple[int, list[int]]]
  words: list[str]


def _percent(right, chosen):
  out = {name: 100.0 * float(np.mean(values[chosen])) for name, values in right.items()}
  return out | {"gain": out["accuracy"] - out["accuracy_blank"]}
