"""Words of a caption as the official metrics of COCO count them.

coco-caption's tokenizer/ptbtokenizer.py runs Stanford's PTBTokenizer 3.4.1, a Java
program, with -lowerCase, and drops punctuation; its rules are those of the Penn
Treebank (https://nlp.stanford.edu/software/tokenizer.html). Here are those of them that
English captions meet. Not here: SGML, entities, mail addresses.
"""

from collections.abc import Iterator
import re

# coco-caption's list, but for brackets: those are lower-cased before they are looked up
# in it, so that they stay, as "-lrb-".
PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-"}
BRACKETS |= {"}": "-rcb-"}
# Other signs that are written as these.
SIGNS = dict.fromkeys('"“”„«»', "''") | dict.fromkeys("‘’", "'")
SIGNS |= {"£": "#", "½": "1/2", "¼": "1/4", "¾": "3/4", "–": "--", "—": "--"}

_LETTER = r"[^\W\d_]"
_LETTERS = rf"{_LETTER}+"
_APOSTROPHE = r"['’]"
# Abbreviations, whose full stop is theirs; those of states that are words too, only
# with a capital.
_ABBREVIATIONS = (
  "mrs?|ms|drs?|profs?|sens?|reps?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|mt"
  "|capt|ste?|ave|pres|hon|jr|sr|bros|vs|etc|inc|ltd|corp|co|dept|univ|assn|ph|blvd|rd"
  "|ft|sq|est|ct|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thurs?|fri"
  "|ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn"
  "|tenn|va|vt|wisc?|wyo|(?-i:A)rk|(?-i:D)el|(?-i:I)ll|(?-i:L)a|(?-i:M)ass|(?-i:M)iss"
  "|(?-i:O)re|(?-i:P)a|(?-i:T)ex|(?-i:W)ash"
)
# What may follow a word as a token of its own.
_TAIL = rf"(?:{_APOSTROPHE}(?:[msd]|re|ve|ll)|n{_APOSTROPHE}t)(?!{_LETTER})"
_HEADS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta"}
_HEADS |= {"gimme": "gim me", "lemme": "lem me", "wanna": "wan na"}
_HEADS |= {"'tis": "'t is", "'twas": "'t was"}
_SPLIT = "|".join(f"{head}(?!\\w)" for head in _HEADS)

# Of all that fit at a place the longest is taken, of equally long ones the first; of
# that, the group "token".
_RULES = [
  (name, re.compile(rule, re.IGNORECASE))
  for name, rule in (
    ("url", r"(?:https?://|www\.)[^\s\"<>|()]+[^\s\"<>|().,!?;:'-]"),
    ("split", _SPLIT),
    ("negated", rf"(?P<token>{_LETTERS})n{_APOSTROPHE}t(?!{_LETTER})"),
    ("tail", _TAIL),
    ("word", rf"[dol]{_APOSTROPHE}{_LETTER}\w*|[^\W_]+"),
    ("hyphened", r"[^\W_]+(?:-[^\W_]+)+"),
    ("dotted", rf"{_LETTER}[^\W_]*(?:[.!?]{_LETTER}[^\W_]*)+"),
    ("glottal", rf"{_LETTERS}[aeiouy]{_APOSTROPHE}[aeiou]{_LETTER}*"),
    ("named", rf"(?-i:[A-HJ-XZn]){_APOSTROPHE}{_LETTER}{_LETTERS}"),
    ("slashed", r"[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"),
    ("joined", r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)"),
    ("acronym", rf"{_LETTER}(?:\.{_LETTER})+\.?"),
    ("abbreviated", rf"(?:{_ABBREVIATIONS})\."),
    ("initial", rf"{_LETTER}\.(?!\s+(?-i:[A-Z]))"),
    ("numbered", r"(?:nos?|figs?|pp?)\.(?=\s*\d)"),
    ("number", r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"),
    ("share", r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}"),
    ("date", r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    ("years", rf"{_APOSTROPHE}\d0s"),
    ("elided", rf"o{_APOSTROPHE}clock|{_APOSTROPHE}n{_APOSTROPHE}"),
    ("short", rf"{_APOSTROPHE}(?:em|n)(?!{_LETTER})|y{_APOSTROPHE}(?={_LETTER})"),
    ("tag", r"[#@][a-z_]\w*"),
    ("face", r"[<>]?[:;=][-o*']?[()dpo\\{@|[\]](?![a-z])"),
    ("dots", r"\.{3,5}|…|(?:\. ){2,4}\."),
    ("dashes", r"-+"),
    ("exclaimed", r"[?!]+"),
    ("other", r"\S"),
  )
]


def tokenize(caption: str) -> list[str]:
  """The tokens of a caption, lower-cased, without punctuation.

  "A man's dog, (possibly) isn't here."
  -> a man 's dog -lrb- possibly -rrb- is n't here
  """
  return [token for token in _tokens(caption) if token not in PUNCTUATION]


def _tokens(text: str) -> Iterator[str]:
  at = 0
  while at < len(text):
    if text[at].isspace():
      at += 1
      continue
    name, found = _longest(text, at)
    yield from _written(name, found)
    at += len(found)


def _longest(text, at):
  """(name of the rule, what it takes of the text)."""
  matches = ((name, rule.match(text, at)) for name, rule in _RULES)
  found = [(name, match) for name, match in matches if match]
  name, match = max(found, key=lambda pair: pair[1].end())
  return name, match["token"] if "token" in match.groupdict() else match.group()


def _written(name, found):
  """The tokens as the program writes them."""
  token = found.lower()
  if name == "split":
    return _HEADS[token].split()
  if name == "dots":
    return ["..."]
  if name == "dashes":
    return ["--" if 2 <= len(token) <= 4 else token]
  if name == "share":
    # A whole number and its fraction are one token.
    return [token.replace(" ", "\u00a0")]
  if name == "face":
    return ["".join(BRACKETS.get(sign, sign) for sign in token)]
  token = SIGNS.get(token, token).replace("’", "'")
  return [BRACKETS.get(token, token)]
