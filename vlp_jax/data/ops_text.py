"""Words of the pp string that work on the caption, and the text rules of papers."""

import re
from typing import Literal

from vlp_jax.data.ops_image import Op

Paper = Literal["albef", "blip"]
SIDES = {"left": "right", "right": "left"}


def clean(max_words: int = 30, paper: Paper = "albef") -> Op:
  """`pre_caption` of ALBEF or BLIP: lower case, less punctuation, so many words."""
  if max_words < 1:
    raise ValueError(f"max_words={max_words}: want 1 or more.")

  def op(example, rng):
    del rng
    return example | {
      "caption": pre_caption(example["caption"], max_words, paper=paper)
    }

  return op


def prompt(text: str) -> Op:
  """Puts words before the caption: BLIP's captioner has "a picture of "."""

  def op(example, rng):
    del rng
    return example | {"caption": text + example["caption"]}

  return op


def swap_sides(p: float = 0.5) -> Op:
  """By chance p the second image first, and "left" in the caption "right" (NLVR2).

  salesforce/BLIP data/nlvr_dataset.py. A word is what stands between two spaces, so
  this comes behind `clean`. The images change places when both are made
  (`records.in_order`): here the example is told "swapped".
  """
  if not 0 <= p <= 1:
    raise ValueError(f"p={p}: a probability, want 0 … 1.")

  def op(example, rng):
    if rng.random() >= p:
      return example
    words = [SIDES.get(word, word) for word in example["caption"].split(" ")]
    return example | {"caption": " ".join(words), "swapped": True}

  return op


def pre_caption(text: str, max_words: int, *, paper: Paper = "albef") -> str:
  """A caption as salesforce/ALBEF dataset/utils.py or BLIP data/utils.py leaves it."""
  if paper == "blip":
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
  else:
    text = _albef(text).replace("<person>", "person")
  text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
  return _truncate(text, max_words)


def pre_question(text: str, max_words: int, *, paper: Paper = "albef") -> str:
  """A question as the same files leave it: inner spaces stay."""
  if paper == "blip":
    text = re.sub(r"[.!\"()*#:;~]", "", text.lower())
  else:
    text = _albef(text)
  return _truncate(text.rstrip(" "), max_words)


def _albef(text):
  text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
  return text.replace("-", " ").replace("/", " ")


def _truncate(text, max_words):
  # At single spaces: an empty word between two of them counts, as it does there.
  return " ".join(text.split(" ")[:max_words])
