"""The step of 512 rows: 1 x 512 equals 4 x 128 equals 16 x 32, in every model.

Loss and metrics, what is drawn (ITM's negatives, masked words), gradients, and one step
of AdamW with clipping; in small in `test_accumulate.py`, on many meshes.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests import tiny
from tests.training import test_accumulate
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.ops import tree
from vlp_jax.training import accumulate
from vlp_jax.training import microbatch
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

BATCH, GROUP = 512, 32  # of 16 x 32, all rows of a microbatch
TOLERANCE, SMALLEST = test_accumulate.TOLERANCE, test_accumulate.SMALLEST
MODULES = test_accumulate.MODULES | {
  "albef": functools.partial(test_accumulate.albef, queue=2 * BATCH, group=GROUP)
}
# Adam's first step is g / (|g| + eps), all but the sign of the gradient: any, where it
# is what rounding leaves of zero. So it is compared where the gradient is zero, or well
# above eps, its error less than a hundredth of it, and what this error makes of the
# step, eps error / g^2, less than a tenth of the tolerance: nearly everywhere.
KNOWN, FLOOR, COMPARED = 100, 10, 0.98
# Of a rate of 1, beside which the parameters do not hide the step.
OPTIM = optim_lib.Optim(
  name="adamw", lr=1.0, weight_decay=0.02, clip_norm=1.0, schedule="constant", bounds=()
)


@dataclasses.dataclass(frozen=True)
class Telling:
  """A pretrainer whose metrics hold what its objectives by rows have drawn."""

  inside: nn.Module

  def __getattr__(self, name):
    return getattr(self.inside, name)

  def apply(self, *args, method=None, **fields):
    if method is None:
      fields["mutable"] = [*fields["mutable"], "intermediates"]
      fields["capture_intermediates"] = lambda module, method: method == "draw"
      (loss, metrics), new = self.inside.apply(*args, **fields)
      told = new.pop("intermediates", {}).items()
      drawn = {n.removeprefix("objectives_"): own["draw"][0] for n, own in told}
      return (loss, metrics | {"drawn": drawn}), new
    found = self.inside.apply(*args, method=method, **fields)
    if method != "across":
      return found
    (loss, (metrics, drawn)), new = found
    return (loss, (metrics | {"drawn": drawn}, drawn)), new


@functools.cache
def inputs():
  """Texts of different lengths; some images are there twice."""
  batch = tiny.batch(BATCH)
  batch["image_id"][10::100] = batch["image_id"][9::100]
  return batch


def steps(name):
  """({path: value} before, {count: ({path: value} after, metrics, drawn)})."""
  module = MODULES[name]()
  tx, schedule = optim_lib.make(
    OPTIM, step_lib.abstract_params(module, inputs()), total_steps=10
  )
  mesh, sharding = test_accumulate.place(dict(data=1))
  teaches = name in test_accumulate.TEACHERS
  begun = step_lib.init_state(
    module,
    tx,
    test_accumulate.like(inputs()),
    seed=0,
    ema=teaches,
    mesh=mesh,
    sharding=sharding,
  )
  if teaches:  # another than the model
    begun = begun.replace(ema=jax.tree.map(lambda x: 0.8 * x, begun.ema))
  how = dict(seed=0, ema_decay=0.9 if teaches else None, schedule=schedule)
  found = {}
  for count in (1, 4, 16):
    given = (Telling(module), tx)
    if count == 1:
      step = step_lib.make_train_step(*given, **how)
    else:
      layout = microbatch.layout(
        module.objectives, batch_size=BATCH, count=count, parts=1
      )
      stages = accumulate.make_stages(
        *given, layout=layout, reads=pretrainer_lib.ACROSS, **how
      )
      step = accumulate.make_train_step(stages)
    with sharding_lib.use(mesh, sharding):
      state, metrics = jax.device_get(jax.jit(step)(begun, inputs()))
    after = tree.flatten(state)
    # The first moment after a step, which is of the clipped gradient.
    after |= {
      f"gradient/{path.partition('/mu/')[2]}": moment / (1 - OPTIM.b1)
      for path, moment in after.items()
      if "/mu/" in path
    }
    found[count] = after, metrics, metrics.pop("drawn")
  return tree.flatten(jax.device_get(begun)), found


def check_metrics(got, want):
  assert got.keys() == want.keys()
  for key, mean in want.items():
    np.testing.assert_allclose(got[key].weight, mean.weight, err_msg=key)
    np.testing.assert_allclose(
      got[key].value(), mean.value(), rtol=TOLERANCE, err_msg=key
    )


def check_gradients(got, want):
  paths = [path for path in want if path.startswith("gradient/")]
  largest = max(np.abs(want[path]).max() for path in paths)
  for path in paths:
    scale = max(np.abs(want[path]).max(), SMALLEST * largest)
    np.testing.assert_allclose(
      got[path], want[path], rtol=0, atol=TOLERANCE * scale, err_msg=path
    )


def check_step(got, want, begun):
  compared = total = 0
  for path in (p.partition("/")[2] for p in want if p.startswith("gradient/")):
    slope, other_slope = (np.abs(x[f"gradient/{path}"]) for x in (want, got))
    error = np.abs(want[f"gradient/{path}"] - got[f"gradient/{path}"])
    known = np.maximum(KNOWN * slope, 10 / TOLERANCE * OPTIM.eps) * error <= slope**2
    moves = known & (slope >= FLOOR * OPTIM.eps)
    rests = (slope == 0) & (other_slope == 0)
    before, one, other = (x[f"params/{path}"] for x in (begun, want, got))
    np.testing.assert_allclose(
      other[moves | rests], one[moves | rests], rtol=0, atol=TOLERANCE, err_msg=path
    )
    assert (np.abs(one - before)[moves] > 0.9 * OPTIM.lr).all(), path
    compared, total = compared + (moves | rests).sum(), total + moves.size
  assert compared >= COMPARED * total, f"{compared} of {total}"


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "clip",
    "siglip",
    "albef",
    "coca",
  ],
)
def test_512_rows_in_1_4_or_16_microbatches(name):
  begun, found = steps(name)
  want, metrics, drawn = found[1]
  if name == "albef":
    check_negatives(drawn["itm"])
  for count in (4, 16):
    after, told, also_drawn = found[count]
    check_metrics(told, metrics)
    jax.tree.map(np.testing.assert_array_equal, also_drawn, drawn)
    check_gradients(after, want)
    check_step(after, want, begun)
    for path, value in want.items():  # queue, teacher and counters
      if path.startswith(("step", "ema/", "memory/")):
        np.testing.assert_allclose(
          after[path], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=path
        )


def check_negatives(drawn):
  """Of each row's 31 neighbours in its run of 32, wherever the microbatch ends."""
  own = np.arange(BATCH) % GROUP
  for name in ("image", "text"):
    assert drawn[name].min() >= 0 and drawn[name].max() < GROUP
    assert (drawn[name] != own).all(), name
    assert len(np.unique(drawn[name])) == GROUP
  assert drawn["found"].all() and (drawn["weight"] == 3).all()
