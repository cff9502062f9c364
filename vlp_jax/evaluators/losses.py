"""The objectives' losses on held-out data."""

import collections
import dataclasses
from typing import Any

import jax

from vlp_jax.data import columns as columns_lib
from vlp_jax.data import evaluation
from vlp_jax.evaluators import placement

STREAMS = ("dropout", "mask", "sample")
# What compares with other batches or with a teacher, of which an evaluation has none.
OFF = {"queue": 0, "distill": 0.0}


@dataclasses.dataclass
class Evaluator:
  """Mean losses and metrics of all objectives, by their own names, and "loss".

  Masks and negatives are drawn from (seed, batch), so that every evaluation draws the
  same. In-batch losses depend on the batch size, so only full batches count: up to
  batch_size - 1 examples at the end are left out. There is no queue and no teacher.

  Attributes:
    seed: of masks and negatives.
  """

  seed: int = 0

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
    objectives = {}
    for name, objective in pretrainer.objectives.items():
      fields = {k: v for k, v in OFF.items() if k in objective.__dataclass_fields__}
      objectives[name] = objective.clone(**fields, parent=None)
    pretrainer = pretrainer.clone(objectives=objectives, parent=None)

    def losses(variables, batch, index):
      key = jax.random.fold_in(jax.random.key(self.seed), index)
      rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}
      loss, metrics = pretrainer.apply(variables, batch, rngs=rngs)
      return {"loss": loss} | dict(metrics)

    columns = columns_lib.of(objectives, res=pretrainer.model.image.res)
    names = ("image", "text", "text_mask", "image_id", *columns.specs)

    def batches():
      full = 0
      for batch in evaluation.eval_pairs(
        source, pp, tokenizer, batch_size=batch_size, columns=columns
      ):
        if batch["valid"].all():
          arrays = {name: batch[name] for name in names}
          yield None, (place.split(arrays), full)
          full += 1
      if not full:
        raise ValueError(
          f"evals (losses): the data source has fewer than batch_size={batch_size}"
          " examples: give the evaluation a smaller batch_size."
        )

    self._place, self._batches, self._losses = place, batches, place.jit(losses)

  def __call__(self, variables: Any) -> dict[str, float]:
    """{"loss": …, "itc": …, "itc/i2t_r1": …}: as the training's own numbers."""
    totals, weights = collections.Counter(), collections.Counter()
    for _, means in self._place.run(self._losses, variables, self._batches()):
      for name, mean in means.items():
        totals[name] += float(mean.total)
        weights[name] += float(mean.weight)
    # jit sorts names.
    names = sorted(totals, key=lambda name: (name != "loss", name))
    return {name: totals[name] / max(weights[name], 1e-9) for name in names}
