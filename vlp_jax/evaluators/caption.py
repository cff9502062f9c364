"""Captions that a model writes, and how they compare with people's.

The protocol of COCO (https://arxiv.org/abs/1504.00325) and its numbers; BLIP's
train_caption.py writes with beam search. METEOR and SPICE, which are Java programs with
tables of their own, are left out: their servers take the file that is written here.
"""

import collections
import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data import evaluation
from vlp_jax.evaluators import placement
from vlp_jax.evaluators import predictions
from vlp_jax.ops import caption_scores
from vlp_jax.ops import decode
from vlp_jax.ops import ptb


@dataclasses.dataclass
class Evaluator:
  """BLEU-1 … 4, ROUGE-L and CIDEr of one caption for each image.

  Examples that share an image id are one image with all their captions.

  Attributes:
    objective: the name of the objective in the config that writes, of objectives/lm.py.
    prompt: what every text begins with; it is no part of the caption. Its pieces and
      the first id are `objectives.lm.prompt` ids in training.
    max_length, min_length: ids of a text, with those it begins with and its end.
    beams: 1 is greedy; length_penalty, repetition_penalty: see `decode.Settings`.
    cache: keeps keys and values of what is written; the same ids without, slower.
  """

  objective: str = "lm"
  prompt: str = ""
  max_length: int = 20
  min_length: int = 5
  beams: int = 3
  length_penalty: float = 1.0
  repetition_penalty: float = 1.0
  cache: bool = True

  def setup(
    self,
    *,
    pretrainer: Any,
    source: Any,
    tokenizer: Any,
    pp: str,
    mesh: jax.sharding.Mesh | None,
    batch_size: int,
    file: pathlib.Path | None = None,
  ) -> None:
    """Binds model and data, and makes the function that is compiled once.

    file: of the captions, a list of {"image_id", "caption"}; None: written nowhere.
    """
    place = placement.of(mesh, batch_size)
    writer = pretrainer.objectives.get(self.objective)
    if not callable(getattr(writer, "generate", None)):
      raise ValueError(
        f"evals (caption): objective={self.objective!r} writes no text; the run has"
        f" {', '.join(pretrainer.objectives)}: name one of objectives/lm.py, or leave"
        " this evaluation out."
      )
    vocab = tokenizer.vocab
    begin = first_ids(tokenizer, self.prompt)
    settings = decode.Settings(
      max_length=self.max_length,
      min_length=self.min_length,
      eos=vocab.sep,
      pad=vocab.pad,
      beams=self.beams,
      length_penalty=self.length_penalty,
      repetition_penalty=self.repetition_penalty,
      cache=self.cache,
    )
    if self.max_length <= len(begin):
      raise ValueError(
        f"evals (caption): max_length={self.max_length} leaves nothing to write behind"
        f" the {len(begin)} ids of prompt={self.prompt!r}: raise it."
      )

    def write(variables, image):
      def call(m, image):
        start = jnp.tile(jnp.asarray(begin, jnp.int32), (image.shape[0], 1))
        tokens = m.model.encode_image(image)
        return m.objectives[self.objective].generate(m.model, tokens, start, settings)

      return pretrainer.apply(variables, image, method=call)

    self._place, self._write = place, place.jit(write)
    self._tokenizer, self._file, self._begin = tokenizer, file, begin
    self._images = lambda: evaluation.eval_images(source, pp, batch_size=batch_size)
    self._texts = lambda: evaluation.eval_texts(
      source, pp, tokenizer, batch_size=batch_size
    )
    self._source = source

  def __call__(self, variables: Any) -> dict[str, float]:
    """In hundredths, as papers have them: "bleu_1" … "bleu_4", "rouge_l", "cider"."""
    captions = self._captions(variables)
    people = collections.defaultdict(list)
    for batch in self._texts():
      for row in np.flatnonzero(batch["valid"]):
        people[int(batch["image_id"][row])].append(batch["caption"][row])
    ours = [ptb.tokenize(text) for text in captions.values()]
    others = [[ptb.tokenize(text) for text in people[image]] for image in captions]
    bleu, _ = caption_scores.bleu(ours, others)
    out = {f"bleu_{n}": 100.0 * float(value) for n, value in enumerate(bleu, 1)}
    out["rouge_l"] = 100.0 * float(caption_scores.rouge_l(ours, others).mean())
    out["cider"] = 100.0 * float(caption_scores.cider(ours, others).mean())
    return out

  def _captions(self, variables):
    """{image id: caption}, in the source's order; and their file."""
    batches = (
      (batch, (self._place.split(batch["image"]),)) for batch in self._images()
    )
    captions, rows = {}, []
    for batch, ids in self._place.run(self._write, variables, batches):
      for row in np.flatnonzero(batch["valid"]):
        image = int(batch["image_id"][row])
        if image not in captions:
          written = ids[row][len(self._begin) :]
          captions[image] = predictions.text(written, self._tokenizer)
          rows.append((int(batch["example_index"][row]), captions[image]))
    if self._file is not None:
      numbers = official_ids(self._source, [index for index, _ in rows])
      texts = (text for _, text in rows)
      predictions.write(
        self._file,
        [
          {"image_id": number, "caption": text}
          for number, text in zip(numbers, texts, strict=True)
        ],
      )
    return captions


def first_ids(tokenizer: Any, prompt: str) -> list[int]:
  """[CLS] and the pieces of a prompt, without [SEP]."""
  vocab = tokenizer.vocab
  if not prompt.strip():
    return [vocab.cls]
  ids, mask = tokenizer.encode([prompt])
  pieces = [int(i) for i in ids[0][mask[0]] if int(i) not in vocab.special]
  return [vocab.cls, *pieces]


def official_ids(source: Any, indices: list[int]) -> list[int | str]:
  """What a data set calls its images: the number at the end of a file's name.

  COCO_val2014_000000391895.jpg is 391895. A name without one stands for itself.
  """
  # One after the other: images come with them.
  raws = (source.read(np.array([index]))[0] for index in indices)
  names = [pathlib.PurePath(raw["key"]).stem for raw in raws]
  numbers = [re.search(r"(\d+)$", name) for name in names]
  return [
    int(found[1]) if found else name for name, found in zip(names, numbers, strict=True)
  ]
