"""Rendered scenes, drawn when they are read. See data/scenes.py for what they show."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from vlp_jax.data import drawing
from vlp_jax.data import scene_regions
from vlp_jax.data import scene_tasks
from vlp_jax.data import scenes


@dataclasses.dataclass(frozen=True)
class Source:
  """Scenes of one split; the same (seed, split, index) is the same picture anywhere.

  Attributes:
    split: "train", "val" or "test". The descriptions of val and test are held out:
      each stands once, and none is in another split.
    size: number of examples; None: 60,000 of train, 500 of val and test.
    res: side of the square picture.
    seed: of everything but the choice of held-out descriptions.
    one: share of scenes with one thing instead of two.
    twins: share of the held-out scenes of two things that come beside another with
      the same words bound differently; see `scenes.split`.
    rivalry: share of train's odd examples that show a rival of the example before
      them, the same words bound differently; for `data.block=2`.
    task: what a scene is for: to be captioned, or a task of data/scene_tasks.py, whose
      question, statement or hypothesis takes the caption's place.
    regions: so many regions of a picture, of which the first are its things, in the
      place of the picture; see data/scene_regions.py. 0: the picture itself.
  """

  split: str = "train"
  size: int | None = None
  res: int = 64
  seed: int = 0
  one: float = 0.2
  twins: float = 0.5
  rivalry: float = 0.0
  task: Literal["pairs", "vqa", "ve", "nlvr"] = "pairs"
  regions: int = 0

  def __post_init__(self):
    scenes.size_of(self.split, self.size)
    if self.res < drawing.MIN_RES:
      raise ValueError(
        f"source.res={self.res}: small shapes look alike below {drawing.MIN_RES}."
      )
    if self.seed < 0:
      raise ValueError(f"source.seed={self.seed}: want 0 or more.")
    if not 0.0 <= self.rivalry <= 1.0:
      raise ValueError(f"source.rivalry={self.rivalry}: a share, want 0 … 1.")
    if self.regions and self.regions < scene_regions.MOST_THINGS:
      raise ValueError(
        f"source.regions={self.regions}: want 0, or {scene_regions.MOST_THINGS} or"
        " more: a scene has as many things."
      )
    _ = self.numbers  # a wrong share is told now, not at the first read

  def __len__(self) -> int:
    return scenes.size_of(self.split, self.size)

  @functools.cached_property
  def numbers(self) -> np.ndarray:
    """int32: the descriptions of the split, see `scenes.split`."""
    return scenes.split(self.split, one=self.one, twins=self.twins)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples: image (PNG bytes), captions, image_id, key; words, or the task's.

    `image_id` is the number of the description: pictures of one description are no
    negatives of each other's caption. `words` are those of the caption that depend on
    the picture, in its order.
    """
    return [self._drawn(index, self._example(index)) for index in indices]

  def captions(self, indices: np.ndarray) -> list[str]:
    """The captions of `read(indices)` without drawing: what a tokenizer trains on."""
    return [self._asked(self._example(index))["captions"][0] for index in indices]

  def _drawn(self, index, example):
    asked = self._asked(example)
    image = self._picture(scenes.scene(example.number), example.rng)
    if "second" in asked:
      asked["image2"] = self._picture(asked.pop("second"), example.rng)
    if self.task == "pairs":
      asked["words"] = scenes.words(example.caption)
    return {
      "image": image,
      "image_id": example.number,
      "key": f"scenes/{self.split}/{int(index)}",
      **asked,
    }

  def _picture(self, described, rng):
    image, boxes = drawing.draw_with_boxes(described, res=self.res, rng=rng)
    if self.regions:
      return scene_regions.file(image, boxes, described, self.regions, rng)
    return drawing.png(image)

  def _asked(self, example):
    """What the task makes of the scene: "captions", and what it needs besides."""
    if self.task == "pairs":
      return {"captions": [example.caption]}
    return scene_tasks.TASKS[self.task](scenes.scene(example.number), example.rng)

  def _example(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"scene {index} of {self.split}: want 0 … {len(self) - 1}.")
    fields = dict(seed=self.seed, one=self.one, rivalry=self.rivalry)
    return scenes.example(self.split, int(index), self.numbers, **fields)
