"""What is asked of a scene has the answer that the scene gives."""

import collections

import numpy as np
import pytest

from vlp_jax.data import scene_tasks
from vlp_jax.data import scenes
from vlp_jax.data.sources import scenes as source

SCENES = [
  scenes.scene(n) for n in np.random.default_rng(0).integers(0, scenes.COUNT, 400)
] + [scenes.scene(n) for n in range(0, scenes.ONE_COUNT, 7)]


def draw(task, described):
  rng = np.random.default_rng(scenes.number_of(described))
  return scene_tasks.TASKS[task](described, rng)


def phrases(text):
  """(size, colour, shape) of a text, None where it does not say."""
  words = text.rstrip("?").split()
  found = lambda names: next((w for w in words if w in names), None)
  return found(scenes.SIZES), found(scenes.COLOURS), found(scenes.SHAPES)


@pytest.mark.parametrize("described", SCENES[::3], ids=str)
def test_a_question_has_one_answer(described):
  out = draw("vqa", described)
  (question,) = out["captions"]
  ((answer, weight),) = out["answers"].items()
  assert weight == 1.0
  assert out["answer_scores"] == {scene_tasks.ANSWERS.index(answer): 1.0}
  size, colour, shape = phrases(question)
  fitting = [
    t
    for t in described.things
    if size in (None, t.size)
    and colour in (None, t.colour)
    and shape in (None, t.shape)
  ]
  if question.startswith("is there"):
    assert (answer == "yes") == bool(fitting)
  else:
    (thing,) = fitting
    asked = {"color": "colour"}.get(question.split()[1], question.split()[1])
    assert answer == getattr(thing, asked)


def test_all_is_asked():
  kinds = collections.Counter(
    draw("vqa", d)["captions"][0].split(" the ")[0] for d in SCENES
  )
  assert {"what color is", "what shape is", "what size is"} <= set(kinds)
  answers = collections.Counter(a for d in SCENES for a in draw("vqa", d)["answers"])
  assert {"yes", "no"} <= set(answers)
  assert len(answers) == len(scene_tasks.ANSWERS)


def test_what_is_entailed():
  labels = collections.Counter()
  for described in SCENES:
    out = draw("ve", described)
    label = scene_tasks.VE_CLASSES[out["label"]]
    labels[label] += 1
    told = out["captions"][0] in scenes.captions(described)
    assert told == (label == "entailment")
    if label == "neutral":
      assert any(str(thing) in out["captions"][0] for thing in described.things)
  assert min(labels.values()) > len(SCENES) / 5


def test_two_pictures():
  labels = collections.Counter()
  for described in SCENES:
    out = draw("nlvr", described)
    side, text = out["captions"][0].split(" picture: ")
    shown = {"left": described, "right": out["second"]}
    assert len(out["second"].things) == len(described.things)
    there = {s: text in [f"a {t}" for t in shown[s].things] for s in shown}
    assert sum(there.values()) == 1 and there[side] == bool(out["label"])
    labels[side, out["label"]] += 1
  assert len(labels) == 4
  assert min(labels.values()) > len(SCENES) / 8


def test_a_source_of_them():
  made = {t: source.Source(size=8, res=48, task=t) for t in scene_tasks.TASKS}
  for task, given in made.items():
    rows = given.read(np.arange(8))
    assert [r["captions"][0] for r in rows] == given.captions(np.arange(8)), task
    assert all(row["image"].startswith(b"\x89PNG") for row in rows)
    assert ("image2" in rows[0]) == (task == "nlvr")
  again = source.Source(size=8, res=48, task="nlvr").read(np.array([5]))[0]
  assert again == made["nlvr"].read(np.array([5]))[0]
