"""The ring against the plain losses: values, gradients, hits; and what it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import contrastive
from vlp_jax.ops import ring as ring_lib

AXES = ("data", "fsdp")
B, E, Q = 24, 8, 20
# float32 sums in another order.
TOLERANCE = 1e-5


def mesh_of(devices, tensor=1):
  """data x fsdp = devices."""
  fsdp = 2 if devices > 2 else 1
  shape = (devices // fsdp, fsdp, tensor)
  auto = (jax.sharding.AxisType.Auto,) * 3
  some = jax.devices()[: devices * tensor]
  return jax.make_mesh(shape, (*AXES, "tensor"), devices=some, axis_types=auto)


@functools.cache
def inputs():
  rng = np.random.default_rng(0)

  def unit(*shape):
    x = rng.normal(size=shape)
    return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))

  # Images of two and three captions, and rows of a queue that is not full yet.
  ids = np.arange(B, dtype=np.int32)
  ids[[5, 17]], ids[[2, 9, 23]] = 5, 2
  queued = np.full(Q, -1, np.int32)
  queued[:7] = [5, 100, 2, 101, 2, 102, 103]
  names = ("zimg", "ztxt", "other_img", "other_txt")
  return dict(
    {name: unit(B, E) for name in names},
    queue_img=unit(Q, E),
    queue_txt=unit(Q, E),
    ids=ids,
    queued=queued,
  )


WEIGHTS = np.random.default_rng(1).uniform(0.5, 1.5, B).astype(np.float32)


def contrast(kind, x, scale, bias, ring):
  """(weighted loss both ways, hits both ways); ring None: the plain version."""
  images, texts = [(x["zimg"], x["ids"])], [(x["ztxt"], x["ids"])]
  teachers, alpha = (None, None), 0.0
  if kind == "queue":
    images = [(x["other_img"], x["ids"]), (x["queue_img"], x["queued"])]
    texts = [(x["other_txt"], x["ids"]), (x["queue_txt"], x["queued"])]
    teachers, alpha = (x["other_img"], x["other_txt"]), 0.4
  frozen = jax.lax.stop_gradient(scale)
  total, hits = 0.0, []
  for rows, columns, teacher in (
    (x["zimg"], texts, teachers[0]),
    (x["ztxt"], images, teachers[1]),
  ):
    if kind == "queue":
      columns = jax.lax.stop_gradient(columns)
    if ring is None:
      all_CE = jnp.concatenate([z for z, _ in columns])
      ids_C = jnp.concatenate([ids for _, ids in columns])
      logits = scale * rows @ all_CE.T
      hits.append(ids_C[jnp.argmax(logits, axis=1)])
      if kind == "sigmoid":
        same = x["ids"][:, None] == ids_C[None, :]
        losses = contrastive.sigmoid(logits + bias, same)
      else:
        targets = contrastive.positives(x["ids"], ids_C)
        if teacher is not None:
          targets = contrastive.soften(targets, frozen * teacher @ all_CE.T, alpha)
        losses = contrastive.cross_entropy(logits, targets)
    else:
      losses, best = ring_lib.softmax(
        scale * rows,
        x["ids"],
        tuple(columns),
        teacher_BE=None if teacher is None else frozen * teacher,
        alpha=alpha,
        fixed=kind == "queue",
        ring=ring,
      )
      if kind == "sigmoid":
        losses, best = ring_lib.sigmoid(
          scale * rows, x["ids"], tuple(columns), bias, ring=ring
        )
      hits.append(best)
    total = total + jnp.sum(WEIGHTS * losses) / B
  return total, jnp.stack(hits)


def value_and_grads(kind, ring):
  def f(z, scale, bias, rest):
    return contrast(kind, rest | z, scale, bias, ring)

  grad = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
  z = {name: inputs()[name] for name in ("zimg", "ztxt")}
  return jax.jit(grad)(z, np.float32(7.0), np.float32(-2.0), inputs())


@functools.cache
def plain(kind):
  return value_and_grads(kind, None)


@pytest.mark.parametrize("kind", ["softmax", "queue", "sigmoid"])
@pytest.mark.parametrize(
  "devices, tile",
  [(1, 7), (8, 2)]
  + [
    pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 64), (2, 5), (4, 6), (8, 64))
  ],
)
def test_losses_gradients_and_hits_are_the_plain_ones(kind, devices, tile):
  # 20 queued rows do not split over 8 devices, nor 24 rows and columns into tiles of 7.
  with jax.set_mesh(mesh_of(devices)):
    got = value_and_grads(kind, ring_lib.Ring(AXES, tile))
  (loss, hits), grads = got
  (want, want_hits), want_grads = plain(kind)
  np.testing.assert_allclose(loss, want, rtol=TOLERANCE)
  np.testing.assert_array_equal(hits, want_hits)
  for one, other in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
  ):
    scale = np.abs(other).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * scale)
  assert kind == "sigmoid" or float(grads[2]) == 0.0


def test_memory_grows_with_rows_and_not_with_their_square():
  # Compiled and not run. 8,192 rows a device: the block of similarities of one device
  # would be 2 GB, where rows, columns, their gradients and copies in flight are 2 MB
  # each and a tile 256 kB.
  rows, width, tile = 65_536, 64, 256
  mesh = mesh_of(8)
  with jax.set_mesh(mesh):
    ring = ring_lib.Ring(AXES, tile)

    def loss(x, y, ids):
      return jnp.sum(ring_lib.softmax(x, ids, ((y, ids),), ring=ring)[0])

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXES))
    z = jax.ShapeDtypeStruct((rows, width), np.float32, sharding=place)
    ids = jax.ShapeDtypeStruct((rows,), np.int32, sharding=place)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(z, z, ids).compile()
  own = rows // 8 * width * 4
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 6 * own


def test_a_tile_of_nothing():
  with pytest.raises(ValueError, match="tile=0: want 1 or more"):
    ring_lib.Ring((), 0)
