"""The accuracy of an answer to a question of VQA, by ten people's answers.

VQA (https://arxiv.org/abs/1505.00468, section 5) and its official code, GT-Vision-Lab/
VQA PythonEvaluationTools/vqaEvaluation/vqaEval.py (commit a013f00), with its quirks.
"""

from collections.abc import Sequence
import re

NUMBERS = {"none": "0", "zero": "0"} | {
  word: str(number)
  for number, word in enumerate(
    "one two three four five six seven eight nine ten".split(), 1
  )
}
ARTICLES = frozenset(("a", "an", "the"))
# What is taken out, or made a blank.
MARKS = tuple(';/[]"{}()=+\\_-><@`,?!')
# The official patterns. The first was to spare "3.5"; its "<=" makes it no look behind.
FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA = re.compile(r"(\d)(,)(\d)")
# re.UNICODE is handed to `sub` as its count.
MOST_STOPS = int(re.UNICODE)

# Right spellings; a word that lacks one of its apostrophes is mended to them.
_SPELLINGS = (
  "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't"
  " hadn't've hasn't haven't he'd he'd've he's how'd how'll how's I'd've I'm I've"
  " isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've"
  " needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've"
  " somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's"
  " something'd something'd've something'll that's there'd there'd've there're"
  " there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've"
  " weren't what'll what're what's what've when's where'd where's where've who'd"
  " who'd've who'll who's who've why'll why're why's won't would've wouldn't"
  " wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()


def _mended() -> dict[str, str]:
  """{spelling without one of its apostrophes: right spelling}, as officially."""
  found = {}
  for word in _SPELLINGS:
    for at in (i for i, letter in enumerate(word) if letter == "'"):
      found[word[:at] + word[at + 1 :]] = word
  # As the official table has them.
  return found | {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
  }


MENDED = _mended()


def clean_marks(text: str) -> str:
  """The official `processPunctuation`: marks go, or leave a blank between words."""
  apart = COMMA.search(text) is not None
  out = text
  for mark in MARKS:
    bare = apart or f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if bare else " ")
  return FULL_STOP.sub("", out, count=MOST_STOPS)


def clean_words(text: str) -> str:
  """The official `processDigitArticle`: digits, no articles, apostrophes."""
  words = (NUMBERS.get(word, word) for word in text.lower().split())
  return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, given: Sequence[str]) -> float:
  """How right an answer is, 0 to 1: the mean over the people who were asked of min(1,
  how many of the others say so / 3).

  Args:
    answer: of the model.
    given: of each person. Where all are the same, nothing is cleaned.
  """
  answer, *given = (_stripped(text) for text in (answer, *given))
  if len(set(given)) > 1:
    answer, *given = (clean_words(clean_marks(text)) for text in (answer, *given))
  same = sum(text == answer for text in given)
  each = [min(1.0, (same - (text == answer)) / 3.0) for text in given]
  return sum(each) / len(each)


def _stripped(text):
  return text.replace("\n", " ").replace("\t", " ").strip()
