"""Contrastive losses of a sharded batch that never hold the matrix of similarities.

Every device keeps its rows. The columns go round the devices in a ring (`ppermute`),
and each block of them is read tile by tile: log-sum-exp is kept as it grows (Milakov
2018, https://arxiv.org/abs/1805.02867), and the backward pass makes every tile anew
(as Inf-CL does, Cheng 2024, https://arxiv.org/abs/2410.17243). Rows, columns and their
gradients are all that memory holds beside a tile: O(B E / devices).

Values, and gradients, are those of `ops/contrastive.py`.

Shape letters: B rows, C columns, E embedding, b and c those of one device, T rows or
columns of a tile, n and m tiles of rows and of columns.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# The id of columns that only fill up a tile or a device's share.
FILLED = jnp.iinfo(jnp.int32).min
# Below every similarity; -inf would make differences of it undefined.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Ring:
  """Which devices take part, and how much of the matrix one looks at a time.

  Attributes:
    axes: of the mesh (`jax.set_mesh`) over which rows and columns are split; none:
      everything is on one device.
    tile: at most so many rows and columns of the matrix exist at once.
  """

  axes: tuple[str, ...] = ()
  tile: int = 4096

  def __post_init__(self):
    if self.tile < 1:
      raise ValueError(f"tile={self.tile}: want 1 or more.")

  @property
  def devices(self) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in self.axes)

  def turn(self, tree: Any) -> Any:
    """Hands every device's part on to the next device."""
    if self.devices == 1:
      return tree
    to_next = [(i, (i + 1) % self.devices) for i in range(self.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, to_next), tree)

  def split(self, tree: Any) -> Any:
    """Arrays [B, …] with rows added at their ends, so that every device has as many."""
    return jax.tree.map(lambda x: _fill(x, -x.shape[0] % self.devices), tree)

  def tiles(self, tree: Any) -> Any:
    """[b, …] -> [n, T, …] on one device, filled up."""

    def cut(x):
      size = max(1, min(self.tile, x.shape[0]))
      return _fill(x, -x.shape[0] % size).reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, tree)

  def run(self, f: Callable, args: Any, out: Any) -> Any:
    """Calls `f(*args)` on every device; scalars are whole, all else is split.

    out: the tree of results, True where they are split and False where they are whole.
    """
    if self.devices == 1:
      return f(*args)
    place = lambda whole: PartitionSpec() if whole else PartitionSpec(self.axes)
    specs = jax.tree.map(lambda x: place(jnp.ndim(x) == 0), args)
    outs = jax.tree.map(lambda split: place(not split), out)
    mapped = jax.shard_map(f, in_specs=specs, out_specs=outs, check_vma=False)
    return mapped(*args)


def _fill(x, count):
  """`count` rows more, of zeros; of integers, of FILLED."""
  if not count:
    return x
  value = FILLED if jnp.issubdtype(x.dtype, jnp.integer) else 0
  return jnp.pad(x, [(0, count)] + [(0, 0)] * (x.ndim - 1), constant_values=value)


# --- The losses ----------------------------------------------------------------


def softmax(
  rows_BE: jax.Array,
  ids_B: jax.Array,
  columns: tuple[tuple[jax.Array, jax.Array], ...],
  *,
  teacher_BE: jax.Array | None = None,
  alpha: jax.Array | float = 0.0,
  fixed: bool = False,
  ring: Ring,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of each row over the columns, and what it likes best.

  Equals `contrastive.cross_entropy(rows @ columns.T, targets)`, where the targets are
  `contrastive.positives(…)`, with a teacher `contrastive.soften(…)`.

  Args:
    rows_BE: float32, the temperature multiplied in; differentiable.
    ids_B: int32, the image of each row.
    columns: (float32 [C, E], int32 [C]) of embeddings and their images: those of the
      batch, and perhaps a queue, whose empty slots have negative ids; differentiable.
    teacher_BE: the teacher's rows, its temperature multiplied in: its softmax over the
      columns is a share `alpha` of the targets. Neither has a gradient.
    fixed: the columns have no gradient, and none is computed.
    ring: the devices.

  Returns:
    (loss float32 [B], the id of the column of largest similarity int32 [B], the first
    of equals).
  """
  count = rows_BE.shape[0]
  rows = dict(x=rows_BE.astype(jnp.float32), id=ids_B)
  if teacher_BE is not None:
    rows["teacher"] = jax.lax.stop_gradient(teacher_BE.astype(jnp.float32))
  rows, columns = _prepare(ring, rows, columns)
  alpha = jax.lax.stop_gradient(jnp.float32(alpha))
  loss, best = _softmax(ring, fixed, rows, columns, alpha)
  return loss[:count], best[:count]


def sigmoid(
  rows_BE: jax.Array,
  ids_B: jax.Array,
  columns: tuple[tuple[jax.Array, jax.Array], ...],
  bias: jax.Array,
  *,
  ring: Ring,
) -> tuple[jax.Array, jax.Array]:
  """`contrastive.sigmoid(rows @ columns.T + bias, same image)`, and the best column.

  Args, and what is returned: as of `softmax`; bias: float32 [], differentiable.
  """
  count = rows_BE.shape[0]
  rows = dict(x=rows_BE.astype(jnp.float32), id=ids_B)
  rows, columns = _prepare(ring, rows, columns)
  loss, best = _sigmoid(ring, rows, columns, jnp.float32(bias))
  return loss[:count], best[:count]


def _prepare(ring, rows, columns):
  """Rows and columns, of which every device has as many."""
  sections = []
  start = 0
  for x, ids in columns:
    at = start + jnp.arange(ids.shape[0], dtype=jnp.int32)
    start += ids.shape[0]
    sections.append(dict(x=x.astype(jnp.float32), id=ids, at=at))
  return ring.split(rows), ring.split(sections)


# --- Softmax -------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(ring, fixed, rows, columns, alpha):
  return _softmax_forward(ring, fixed, rows, columns, alpha)[0]


def _softmax_forward(ring, fixed, rows, columns, alpha):
  del fixed

  def local(rows, columns, alpha):
    # Of the similarities so far: the sum of exponents below the top, and sum and number
    # of those of the row's own image.
    start = _NOTHING_SEEN | dict(sum=0.0, hits=0.0, count=0.0)
    if "teacher" in rows:
      # Top and sum of the teacher's, and the row's similarities weighted by them.
      start |= dict(soft_top=LOWEST, soft_sum=0.0, soft=0.0)
    stats = _read(ring, rows, columns, start, _look)
    lse = stats["top"] + jnp.log(stats["sum"])
    count = jnp.maximum(stats["count"], 1.0)
    kept = dict(lse=lse, count=count)
    loss = lse - (1.0 - alpha) * stats["hits"] / count
    if "teacher" in rows:
      loss = loss - alpha * stats["soft"] / stats["soft_sum"]
      kept["soft_lse"] = stats["soft_top"] + jnp.log(stats["soft_sum"])
    return (loss, stats["best"]), kept

  kept = ["lse", "count"] + ["soft_lse"] * ("teacher" in rows)
  out = ((True, True), dict.fromkeys(kept, True))
  given, kept = ring.run(local, (rows, columns, alpha), out)
  return given, (rows, columns, alpha, kept)


def _look(row, column, stats):
  """What the rows of a tile know after its columns as well."""
  s_TT, there, same = _similarities(row, column)
  top, total = _grow(stats["top"], stats["sum"], s_TT, there)
  new = _like_best(s_TT, there, column, stats) | dict(
    top=top,
    sum=total,
    hits=stats["hits"] + jnp.sum(jnp.where(same, s_TT, 0.0), axis=1),
    count=stats["count"] + jnp.sum(same, axis=1, dtype=jnp.float32),
  )
  if "teacher" in row:
    t_TT = row["teacher"] @ column["x"].T
    top, total = _grow(stats["soft_top"], stats["soft_sum"], t_TT, there)
    q_TT = jnp.where(there, jnp.exp(t_TT - top[:, None]), 0.0)
    shrunk = stats["soft"] * jnp.exp(stats["soft_top"] - top)
    new |= dict(soft_top=top, soft_sum=total)
    new["soft"] = shrunk + jnp.sum(q_TT * s_TT, axis=1)
  return new


# Largest similarity so far, the place of that column in the batch, and its id.
_NOTHING_SEEN = dict(top=LOWEST, at=jnp.iinfo(jnp.int32).max, best=FILLED)


def _like_best(s_TT, there, column, stats):
  """The column of largest similarity; of equals the first, on whatever device it is."""
  here = jnp.where(there, s_TT, LOWEST)
  first = jnp.argmax(here, axis=1)
  top, at = jnp.max(here, axis=1), column["at"][first]
  better = (top > stats["top"]) | ((top == stats["top"]) & (at < stats["at"]))
  choose = lambda new, old: jnp.where(better, new, old)
  return dict(
    top=choose(top, stats["top"]),
    at=choose(at, stats["at"]),
    best=choose(column["id"][first], stats["best"]),
  )


def _similarities(row, column):
  """(float32 [T, T], bool [T, T] of real rows and columns, bool [T, T] same image)."""
  s_TT = row["x"] @ column["x"].T
  same = (row["id"][:, None] == column["id"][None, :]) & (column["id"] >= 0)
  there = (row["id"] != FILLED)[:, None] & (column["id"] != FILLED)[None, :]
  return s_TT, there, same


def _grow(top, total, s_TT, there):
  """Largest exponent, and the sum of exponentials below it, with those of a tile."""
  new = jnp.maximum(top, jnp.max(jnp.where(there, s_TT, LOWEST), axis=1))
  more = jnp.sum(jnp.where(there, jnp.exp(s_TT - new[:, None]), 0.0), axis=1)
  return new, total * jnp.exp(top - new) + more


def _softmax_backward(ring, fixed, kept, cotangents):
  rows, columns, alpha, stats = kept
  rows_given = rows | stats | dict(g=cotangents[0])

  def local(rows, columns, alpha):
    def slope(row, column):
      s_TT, there, same = _similarities(row, column)
      p_TT = jnp.exp(s_TT - row["lse"][:, None])
      target = (1.0 - alpha) * same / row["count"][:, None]
      if "teacher" in row:
        t_TT = row["teacher"] @ column["x"].T
        target = target + alpha * jnp.exp(t_TT - row["soft_lse"][:, None])
      return jnp.where(there, row["g"][:, None] * (p_TT - target), 0.0)

    drows, dcolumns, _ = _return(ring, rows, columns, slope, fixed=fixed)
    return drows, dcolumns

  out = (True, None if fixed else [True] * len(columns))
  args = (rows_given, columns, alpha)
  drows, dcolumns = ring.run(local, args, out)
  return _cotangents(rows, drows), _cotangents(columns, dcolumns), jnp.float32(0.0)


_softmax.defvjp(_softmax_forward, _softmax_backward)


# --- Sigmoid -------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid(ring, rows, columns, bias):
  return _sigmoid_forward(ring, rows, columns, bias)[0]


def _sigmoid_forward(ring, rows, columns, bias):
  def local(rows, columns, bias):
    def look(row, column, stats):
      z_TT, there, sign = _signed(row, column, bias)
      more = jnp.where(there, jax.nn.log_sigmoid(sign * z_TT), 0.0)
      loss = stats["loss"] - jnp.sum(more, axis=1)
      return _like_best(z_TT, there, column, stats) | dict(loss=loss)

    stats = _read(ring, rows, columns, _NOTHING_SEEN | dict(loss=0.0), look)
    return stats["loss"], stats["best"]

  given = ring.run(local, (rows, columns, bias), (True, True))
  return given, (rows, columns, bias)


def _signed(row, column, bias):
  s_TT, there, same = _similarities(row, column)
  return s_TT + bias, there, jnp.where(same, 1.0, -1.0)


def _sigmoid_backward(ring, kept, cotangents):
  rows, columns, bias = kept
  rows_given = rows | dict(g=cotangents[0])

  def local(rows, columns, bias):
    def slope(row, column):
      z_TT, there, sign = _signed(row, column, bias)
      ds_TT = -sign * jax.nn.sigmoid(-sign * z_TT)
      return jnp.where(there, row["g"][:, None] * ds_TT, 0.0)

    drows, dcolumns, dbias = _return(ring, rows, columns, slope)
    if ring.devices > 1:
      dbias = jax.lax.psum(dbias, ring.axes)
    return drows, dcolumns, dbias

  out = (True, [True] * len(columns), False)
  drows, dcolumns, dbias = ring.run(local, (rows_given, columns, bias), out)
  return _cotangents(rows, drows), _cotangents(columns, dcolumns), dbias


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _cotangents(given, dx):
  """Of rows or sections of columns: `x` has a gradient, the rest has none."""
  if dx is None:
    return None
  if isinstance(given, list):
    return [_cotangents(*both) for both in zip(given, dx, strict=True)]
  return dict.fromkeys(given) | dict(x=dx)


# --- Round the ring, on one device ---------------------------------------------


def _read(ring, rows, columns, stats, look):
  """What the rows know after all columns: {name: [b]}.

  Args:
    stats: {name: what a row knows at first, a number}.
    look: (row, column, stats) -> stats, of one tile: [T, …] each.
  """
  count = rows["id"].shape[0]
  stats = {k: jnp.full(count, v, jnp.asarray(v).dtype) for k, v in stats.items()}
  rows, stats = ring.tiles((rows, stats))

  def turn(carry, _):
    columns, stats = carry
    # Asked for before this block is read: the next one can travel meanwhile.
    coming = ring.turn(columns)

    def read(stats, column):
      each = lambda _, given: (None, look(given[0], column, given[1]))
      return jax.lax.scan(each, None, (rows, stats))[1], None

    stats, _ = jax.lax.scan(read, stats, columns)
    return (coming, stats), None

  start = (ring.tiles(_join(columns)), stats)
  (_, stats), _ = jax.lax.scan(turn, start, None, length=ring.devices)
  return jax.tree.map(lambda x: x.reshape(-1)[:count], stats)


def _return(ring, rows, columns, slope, *, fixed=False):
  """Gradients: (of rows [b, E], of each section of columns, the sum of all slopes).

  slope(row, column) -> float32 [T, T], the gradient of the similarities of a tile. The
  gradient of columns goes round with them, and is complete where it began.
  """
  count = rows["x"].shape[0]
  sizes = [section["x"].shape[0] for section in columns]
  rows, columns = ring.tiles(rows), ring.tiles(_join(columns))
  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  dcolumns = None if fixed else zeros(columns["x"])

  def turn(carry, _):
    columns, dcolumns, drows, total = carry
    coming = ring.turn(columns)

    # Tiles are updated in place, by their number: nothing is kept of a turn.
    def column_tile(carry, j):
      dcolumns, drows, total = carry
      column = jax.tree.map(lambda x: x[j], columns)

      def row_tile(carry, i):
        dcolumn, drows, total = carry
        row = jax.tree.map(lambda x: x[i], rows)
        ds_TT = slope(row, column)
        drows = drows.at[i].add(ds_TT @ column["x"])
        if not fixed:
          dcolumn = dcolumn + ds_TT.T @ row["x"]
        return (dcolumn, drows, total + jnp.sum(ds_TT)), None

      dcolumn = None if fixed else dcolumns[j]
      carry = (dcolumn, drows, total)
      (dcolumn, drows, total), _ = jax.lax.scan(row_tile, carry, _numbers(rows))
      if not fixed:
        dcolumns = dcolumns.at[j].set(dcolumn)
      return (dcolumns, drows, total), None

    carry = (dcolumns, drows, total)
    carry, _ = jax.lax.scan(column_tile, carry, _numbers(columns))
    dcolumns, drows, total = carry
    return (coming, ring.turn(dcolumns), drows, total), None

  start = (columns, dcolumns, zeros(rows["x"]), jnp.float32(0.0))
  carry, _ = jax.lax.scan(turn, start, None, length=ring.devices)
  _, dcolumns, drows, total = carry
  merge = lambda x: x.reshape(-1, x.shape[-1])
  if not fixed:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    dcolumns = jnp.split(merge(dcolumns), ends)[: len(sizes)]
  return merge(drows)[:count], dcolumns, total


def _numbers(tiled):
  return jnp.arange(tiled["x"].shape[0])


def _join(sections):
  """The device's part of all sections."""
  return jax.tree.map(lambda *x: jnp.concatenate(x), *sections)
