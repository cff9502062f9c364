"""Accuracy of a classifier over text and image: entailment, two images.

ALBEF's VE.py and NLVR.py, `evaluate`.
"""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from vlp_jax.data import columns as columns_lib
from vlp_jax.data import evaluation
from vlp_jax.data import pp as pp_lib
from vlp_jax.evaluators import placement


@dataclasses.dataclass
class Evaluator:
  """Share of examples whose likeliest class is the right one; every example counts.

  Attributes:
    objective: the name of the objective in the config, of objectives/classify.py.
  """

  objective: str = "classify"

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
    """Binds model and data, and makes the function that is compiled once."""
    place = placement.of(mesh, batch_size)
    if self.objective not in pretrainer.objectives:
      raise ValueError(
        f"evals (classify): objective={self.objective!r}: the run has"
        f" {', '.join(pretrainer.objectives)}."
      )
    wanted = {"it": pretrainer.objectives[self.objective]}
    columns = columns_lib.of(wanted, res=pretrainer.model.image.res)
    if "label" not in columns.specs:
      raise ValueError(
        f"evals (classify): objectives.{self.objective} has no classes that a label"
        " names: name one of objectives/classify.py or pair_classify.py."
      )
    sized = pp_lib.leaves_sizes(pp)

    def predict(m, batch):
      sizes = [(batch[k],) if k in batch else () for k in ("image_size", "image2_size")]
      image = m.model.encode_image(batch["image"], *sizes[0])
      text = m.model.words(batch["text"], batch["text_mask"])
      objective = m.objectives[self.objective]
      return objective.predict(m.model, image, text, batch.get("image2"), *sizes[1])

    def classes(variables, batch):
      logits = pretrainer.apply(variables, batch, method=predict)
      return logits.argmax(axis=1)

    names = ("image", "text", "text_mask", "image2", "image_size", "image2_size")

    def batches():
      found = evaluation.eval_pairs(
        source, pp, tokenizer, batch_size=batch_size, columns=columns, sizes=sized
      )
      for batch in found:
        note = (batch["label"], batch["valid"])
        arrays = {name: batch[name] for name in names if name in batch}
        yield note, (place.split(arrays),)

    self._place, self._batches, self._classes = place, batches, place.jit(classes)

  def __call__(self, variables: Any) -> dict[str, float]:
    """Percentages: "accuracy", and "accuracy_0" … of the examples of each class."""
    right, count = collections.Counter(), collections.Counter()
    for (label, valid), said in self._place.run(
      self._classes, variables, self._batches()
    ):
      for one, hit in zip(label[valid], (said == label)[valid], strict=True):
        count[int(one)] += 1
        right[int(one)] += int(hit)
    shares = {f"accuracy_{k}": 100.0 * right[k] / count[k] for k in sorted(count)}
    total = np.float64(sum(right.values())) / sum(count.values())
    return {"accuracy": 100.0 * float(total)} | shares
