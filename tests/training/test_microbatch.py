"""Which rows are a microbatch, which of those a lane, and what cannot be cut."""

import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.objectives import self_distill
from vlp_jax.training import microbatch
from vlp_jax.training import sharding as sharding_lib


def test_microbatches_are_cut_where_rows_lie():
  layout = microbatch.Layout(16, count=2, parts=4)
  rows = np.arange(16)
  first, second = (np.asarray(layout.take(rows, i)) for i in range(2))
  # Each of four devices has four neighbours, of whom two are in each.
  np.testing.assert_array_equal(first, [0, 1, 4, 5, 8, 9, 12, 13])
  np.testing.assert_array_equal(second, [2, 3, 6, 7, 10, 11, 14, 15])
  again = layout.put(layout.put(np.zeros(16, int), first, 0), second, 1)
  np.testing.assert_array_equal(again, rows)


@pytest.mark.parametrize(
  "batch_size, count, mesh_parts, group, want",
  [
    (512, 4, 8, 16, 8),  # 16 rows of a device: a group
    (512, 4, 8, 64, 2),  # a group over four devices
    (512, 4, 8, 128, 1),
    (512, 16, 1, 32, 1),
  ],
)
def test_groups_stay_together(batch_size, count, mesh_parts, group, want):
  objectives = dict(itm=itm.Objective(width=8, group=group))
  layout = microbatch.layout(
    objectives, batch_size=batch_size, count=count, parts=mesh_parts
  )
  assert layout.parts == want
  rows = np.arange(batch_size)
  for number in range(count):
    groups = np.asarray(layout.take(rows, number)).reshape(-1, group)
    assert (groups // group == groups[:, :1] // group).all()
    assert (groups % group == np.arange(group)).all()


@pytest.mark.parametrize(
  "mesh_parts, group, lanes, want",
  [
    (8, 16, 8, 8),
    (8, 16, 4, 4),  # data=4, fsdp=2
    (8, 64, 8, 1),  # two runs of neighbours
    (8, 64, 2, 2),
    (1, 64, 1, 1),
  ],
)
def test_lanes_part_no_groups(mesh_parts, group, lanes, want):
  objectives = dict(itm=itm.Objective(width=8, group=group))
  layout = microbatch.layout(
    objectives, batch_size=512, count=4, parts=mesh_parts, lanes=lanes
  )
  assert layout.lanes == want
  rows = layout.take(np.arange(512), 1)
  sharding = sharding_lib.Sharding(mesh=dict(data=want))
  mesh = sharding_lib.make_mesh(sharding, jax.devices()[:want])
  with sharding_lib.use(mesh, sharding):
    cut = jax.jit(lambda x: layout.side_by_side(lambda number, x: x, 1, x))(rows)
    numbers = layout.side_by_side(lambda number, x: number, np.int32(3), rows)
  np.testing.assert_array_equal(cut, rows.reshape(want, -1))
  assert (cut.reshape(want, -1, group) % group == np.arange(group)).all()
  np.testing.assert_array_equal(numbers, 3 * want + np.arange(want))


@pytest.mark.parametrize(
  "objective, fields, message",
  [
    (
      itm.Objective(width=8),
      {},
      "objectives.itm.group=None: negatives .* set objectives.itm.group to 4 or",
    ),
    (
      itm.Objective(width=8, group=8),
      {},
      "objectives.itm.group=8: .* which has 4 rows: set objectives.itm.group to 4",
    ),
    (
      mlm.Objective(vocab=tiny.VOCAB, width=8, drop_worst=0.2),
      {},
      "objectives.mlm.drop_worst=0.2 compares the losses of the whole batch",
    ),
    (
      self_distill.Objective(),
      {},
      "accumulate=4: objectives.it does not say how it is had by microbatches",
    ),
    (
      itc.Objective(),
      dict(count=3),
      "accumulate=3: batch_size=16 does not make .*: choose batch_size a multiple of 6",
    ),
    (
      itc.Objective(),
      dict(count=16),
      "accumulate=16: batch_size=16 does not .* data x fsdp = 2: .* a multiple of 32",
    ),
  ],
)
def test_what_cannot_be_accumulated(objective, fields, message):
  fields = dict(batch_size=16, count=4, parts=2) | fields
  with pytest.raises(ValueError, match="config: " + message):
    microbatch.layout(dict(it=objective), **fields)


def test_nothing_is_asked_of_objectives_that_are_not_accumulated():
  layout = microbatch.layout(
    dict(it=self_distill.Objective()), batch_size=15, count=1, parts=2
  )
  assert layout.count == 1
