"""Rows of a batch taken by others: the same numbers on any mesh, and what is sent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import rows as rows_lib
from vlp_jax.planning import cost as cost_lib
from vlp_jax.training import sharding as sharding_lib

B, S, D = 24, 3, 8
AXES = ("data", "fsdp")


def place(*shape):
  named = dict(zip(sharding_lib.MESH_AXES, shape, strict=True))
  sharding = sharding_lib.Sharding(mesh=named)
  mesh = sharding_lib.make_mesh(sharding, jax.devices()[: math.prod(shape)])
  return mesh, sharding


def inputs(group, *, batch=B):
  """(tree, rows in their groups, cotangents): whole numbers, whose sums are exact."""
  rng = np.random.default_rng(0)
  first = np.arange(batch) // group * group
  rows = first + rng.integers(0, 2**20, batch) % np.minimum(group, batch - first)
  whole = lambda *s: rng.integers(-9, 10, s).astype(np.float32)
  tree = dict(x=whole(batch, S, D), mask=rng.random((batch, S)) < 0.5, none=None)
  return tree, rows.astype(np.int32), whole(batch, S, D)


def step(tree, rows, slopes, *, group, axes):
  """(what is taken, gradient to x)."""

  def f(x):
    taken = rows_lib.take(tree | dict(x=x), rows, group=group, axes=axes)
    return jnp.vdot(taken["x"], slopes), taken

  gradient, taken = jax.grad(f, has_aux=True)(tree["x"])
  return taken, gradient


def compiled(given, group, mesh, axes=AXES):
  f = functools.partial(step, group=group, axes=axes)
  split = sharding_lib.batch_sharding(mesh)
  return jax.jit(f, out_shardings=split).lower(*given).compile()


def check(taken, gradient, tree, rows, slopes):
  """Against numpy, bit for bit."""
  for name in ("x", "mask"):
    np.testing.assert_array_equal(taken[name], tree[name][rows])
  assert taken["none"] is None
  want = np.zeros_like(tree["x"])
  np.add.at(want, rows, slopes)
  np.testing.assert_array_equal(gradient, want)


@pytest.mark.parametrize(
  "group, shape",
  [
    (None, (1, 1, 1)),
    (None, (4, 2, 1)),
    (None, (2, 2, 2)),
    (3, (8, 1, 1)),
    # Two devices, and four, hold two groups or one among themselves.
    (2, (4, 2, 1)),
    (6, (2, 4, 1)),
    (12, (2, 2, 2)),
    (12, (2, 1, 1)),
    # Groups end where devices do at no place but the last.
    (5, (8, 1, 1)),
    (9, (4, 1, 1)),
    (16, (4, 2, 1)),
    (64, (1, 8, 1)),
  ],
)
def test_the_same_numbers_on_any_mesh(group, shape):
  tree, rows, slopes = inputs(group or B)
  mesh, sharding = place(*shape)
  with sharding_lib.use(mesh, sharding):
    given = sharding_lib.put_batch(dict(tree=tree, rows=rows, slopes=slopes), mesh)
    given = [given[name] for name in ("tree", "rows", "slopes")]
    taken, gradient = compiled(given, group, mesh)(*given)
  check(taken, gradient, tree, rows, slopes)


def test_a_batch_that_does_not_split():
  given = inputs(6, batch=10)
  mesh, sharding = place(4, 2, 1)
  with sharding_lib.use(mesh, sharding):
    out = jax.jit(functools.partial(step, group=6, axes=AXES))(*given)
  check(*out, *given)


def test_in_lanes_of_which_each_has_several_devices():
  """As accumulation has them: a lane is a part of "data", and its rows lie on fsdp.

  In bfloat16, whose sums of such numbers are exact too.
  """
  tree, rows, slopes = inputs(6)
  half = lambda x: x.reshape(2, B // 2, *x.shape[1:])
  small = lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
  mesh, sharding = place(2, 4, 1)
  lane = functools.partial(step, group=6, axes=("fsdp",))
  with sharding_lib.use(mesh, sharding):
    f = jax.jit(sharding_lib.over_lanes(lane))
    given = jax.tree.map(small, (tree, rows % (B // 2), slopes))
    out = f(*jax.tree.map(half, given))
  assert out[1].dtype == jnp.bfloat16
  out = jax.tree.map(lambda x: np.asarray(x).reshape(B, *x.shape[2:]), out)
  check(*out, tree, rows, slopes)


@pytest.mark.parametrize(
  "group, near", [(3, 1), (1, 1), (2, 2), (6, 2), (12, 4), (5, 8), (9, 8), (24, 8)]
)
def test_what_is_sent(group, near):
  """Rows go to the devices that hold their group with them, and no further."""
  assert rows_lib.neighbours(B, group, 8) == near
  tree, rows, slopes = inputs(group)
  mesh, sharding = place(4, 2, 1)
  with sharding_lib.use(mesh, sharding):
    given = sharding_lib.put_batch(dict(tree=tree, rows=rows, slopes=slopes), mesh)
    given = [given[name] for name in ("tree", "rows", "slopes")]
    sent = cost_lib.of(compiled(given, group, mesh).as_text(), devices=8).by_kind()
  # Forth the rows, back their gradients, and which rows those are of.
  whole = 2 * tree["x"].nbytes + tree["mask"].nbytes + rows.nbytes
  if near == 1:
    assert not sent
  else:
    assert (
      set(sent) == {"all-gather"} and sent["all-gather"]["bytes"] == near / 8 * whole
    )
