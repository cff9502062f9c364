"""Words of the pp string that work on the caption, and the text rules of papers."""

import re
from typing import Literal

from vlp_jax.data.ops_image import Op

Paper = Literal["albef", "blip"]


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
