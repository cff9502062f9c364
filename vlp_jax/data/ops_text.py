"""Words of preprocessing that work on the caption, and the text rules of papers."""

import re

from vlp_jax.data import ops_image

_PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")


def clean(max_words: int = 30) -> ops_image.Op:
  """ALBEF's and BLIP's `pre_caption`: lower case, no punctuation, so many words."""

  def op(example, rng):
    del rng
    return example | {"caption": pre_caption(example["caption"], max_words)}

  return op


def pre_caption(text: str, max_words: int) -> str:
  """A caption as salesforce/ALBEF dataset/utils.py leaves it."""
  text = _plain(text).replace("<person>", "person")
  text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
  return _truncate(text, max_words)


def pre_question(text: str, max_words: int) -> str:
  """A question as salesforce/ALBEF dataset/utils.py leaves it: spaces stay."""
  return _truncate(_plain(text).rstrip(" "), max_words)


def _plain(text):
  text = _PUNCTUATION.sub("", text.lower())
  return text.replace("-", " ").replace("/", " ")


def _truncate(text, max_words):
  words = text.split(" ")
  return " ".join(words[:max_words]) if len(words) > max_words else text
