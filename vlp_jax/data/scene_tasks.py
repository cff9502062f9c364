"""Tasks on rendered scenes: questions, two pictures and a statement, entailment.

What the fields' benchmarks ask (VQA, NLVR2, SNLI-VE), of scenes: so that fine-tuning is
tried, from table to score, without their data. Everything is drawn by the generator
that is handed in.
"""

from collections.abc import Callable
import types

import numpy as np

from vlp_jax.data import scenes

# What a question can be answered; their places are the numbers of "answer_scores".
ANSWERS = ("yes", "no", *scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES)
NLVR_CLASSES = ("False", "True")
VE_CLASSES = ("contradiction", "neutral", "entailment")
# What no picture of a scene can tell.
UNTOLD = ("the {a} is heavy", "the {a} was drawn first", "the {a} is soft")


def vqa(described: scenes.Scene, rng: np.random.Generator) -> dict:
  """A question with one answer: {"captions", "answers", "answer_scores"}.

  What colour, shape or size the thing is that has the two other attributes, where only
  one has them; or whether there is such a thing.
  """
  thing = _pick(described.things, rng)
  asked = _pick(("colour", "shape", "size", "there"), rng)
  if asked != "there" and _alone(described, thing, asked):
    question = {
      "colour": f"what color is the {thing.size} {thing.shape}?",
      "shape": f"what shape is the {thing.size} {thing.colour} thing?",
      "size": f"what size is the {thing.colour} {thing.shape}?",
    }[asked]
    answer = getattr(thing, asked)
  else:
    if rng.random() < 0.5:
      thing = _pick([t for t in scenes.THINGS if t not in described.things], rng)
    question = f"is there a {thing}?"
    answer = "yes" if thing in described.things else "no"
  return {
    "captions": [question],
    "answers": {answer: 1.0},
    "answer_scores": {ANSWERS.index(answer): 1.0},
  }


def ve(described: scenes.Scene, rng: np.random.Generator) -> dict:
  """A hypothesis: {"captions", "label"}, a number of VE_CLASSES.

  It is a caption of the scene, or of a scene of the same words bound differently, or
  something that a picture does not tell.
  """
  label = int(rng.integers(len(VE_CLASSES)))
  if VE_CLASSES[label] == "neutral":
    text = _pick(UNTOLD, rng).format(a=_pick(described.things, rng))
  else:
    if VE_CLASSES[label] == "contradiction":
      described = _other(described, rng)
    text = _pick(scenes.captions(described), rng)
  return {"captions": [text], "label": label}


def nlvr(described: scenes.Scene, rng: np.random.Generator) -> dict:
  """A statement on two pictures: {"captions", "label", "second"}.

  `second` is the Scene of the right picture, any other of as many things. The statement
  says of the left or of the right one a thing that only one of them shows.

  The pictures differ in more than in what is bound to what, as NLVR2's do. Where they
  have the same words, nothing short of all bindings tells anything of the label, which
  is the parity of side, statement and pictures: small models find no beginning.
  """
  label, side = int(rng.integers(2)), int(rng.integers(2))
  only = []
  while not only:
    second = _as_many(described, rng)
    told, other = (described, second) if side != label else (second, described)
    only = [thing for thing in told.things if thing not in other.things]
  text = f"{('left', 'right')[side]} picture: a {_pick(only, rng)}"
  return {"captions": [text], "label": label, "second": second}


TASKS: types.MappingProxyType[
  str, Callable[[scenes.Scene, np.random.Generator], dict]
] = types.MappingProxyType({"vqa": vqa, "ve": ve, "nlvr": nlvr})


def _pick(items, rng):
  return items[int(rng.random() * len(items))]


def _other(described, rng):
  """A scene of the same words, or of other ones where there is none."""
  rivals = scenes.rivals(scenes.number_of(described))
  if rivals:
    return scenes.scene(_pick(rivals, rng))
  return _as_many(described, rng)


def _as_many(described, rng):
  """Any other scene of as many things."""
  one = len(described.things) == 1
  low, high = (0, scenes.ONE_COUNT) if one else (scenes.ONE_COUNT, scenes.COUNT)
  while True:
    found = scenes.scene(int(rng.integers(low, high)))
    if found != described:
      return found


def _alone(described, thing, asked):
  """Whether no other thing has the thing's attributes beside the one that is asked."""
  rest = [f for f in ("size", "colour", "shape") if f != asked]
  return all(
    other == thing or any(getattr(other, f) != getattr(thing, f) for f in rest)
    for other in described.things
  )
