"""Matching on a mesh: what devices hear of each other, and that nothing changes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import tokens as tokens_lib
from vlp_jax.objectives import itm
from vlp_jax.planning import cost as cost_lib
from vlp_jax.training import sharding as sharding_lib

BATCH, PATCHES, LENGTH, WIDTH = 16, 64, 5, 8


class Model:
  """Fuses by hand: each word with the mean of the image it is shown with."""

  def inverse_temperature(self):
    return 5.0

  def fuse(self, image, text, *, train=False):
    del train
    seen = jnp.tanh(image.x if image.keys is None else image.keys).mean(axis=1)
    times = len(text.x) // len(seen)
    x = text.x * jnp.repeat(seen, times, axis=0)[:, None]
    return tokens_lib.Tokens(x, text.mask)

  def pool_pair(self, fused):
    return jnp.where(fused.mask[..., None], fused.x, 0.0).sum(axis=1)


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  z = normal(BATCH, 2, WIDTH)
  z = z / np.linalg.norm(z, axis=-1, keepdims=True)
  return dict(
    image=normal(BATCH, PATCHES, WIDTH),
    text=normal(BATCH, LENGTH, WIDTH),
    mask=np.arange(LENGTH) < rng.integers(1, LENGTH + 1, BATCH)[:, None],
    zimg=z[:, 0],
    ztxt=z[:, 1],
    image_id=np.arange(BATCH, dtype=np.int32),
  )


def step(given, *, objective, keys):
  """(loss, gradients to the tokens, what is drawn).

  keys: whether the fusion has made keys of the images, which are not taken.
  """
  params = {"head": {"kernel": jnp.ones((WIDTH, 2)).at[:, 0].set(-1.0)}}
  params["head"]["bias"] = jnp.zeros(2)

  def f(tokens):
    image = tokens_lib.Tokens(tokens["image"], keys=tokens["image"] if keys else None)
    text = tokens_lib.Tokens(tokens["text"], given["mask"])
    z = (given["zimg"], given["ztxt"])
    enc = pretrainer_lib.Encoded(image, text, text, *z, jnp.int32(0))
    of = objective.bind({"params": params}, rngs={"sample": jax.random.key(0)})
    drawn = of.draw(Model(), enc, given, teacher=None, train=True)
    loss, _ = of.rows(Model(), enc, given, drawn, train=True)
    return loss.value(), (loss.value(), drawn)

  tokens = {name: given[name] for name in ("image", "text")}
  gradient, (loss, drawn) = jax.grad(f, has_aux=True)(tokens)
  return loss, gradient, drawn


@functools.cache
def run(group, layout, keys, *shape):
  """(results as numpy, what devices send), on a mesh of data, fsdp and tensor."""
  objective = itm.Objective(width=WIDTH, group=group, layout=layout, exclude="pair")
  sharding = sharding_lib.Sharding(
    mesh=dict(zip(sharding_lib.MESH_AXES, shape, strict=True))
  )
  devices = math.prod(shape)
  mesh = sharding_lib.make_mesh(sharding, jax.devices()[:devices])
  with sharding_lib.use(mesh, sharding):
    given = sharding_lib.put_batch(inputs(), mesh)
    f = functools.partial(step, objective=objective, keys=keys)
    made = jax.jit(f).lower(given).compile()
    out = jax.tree.map(np.asarray, made(given))
  return out, cost_lib.of(made.as_text(), devices=devices).messages


@pytest.mark.parametrize(
  "group, layout, keys, near",
  [
    (2, "triples", True, 1),
    (4, "half", False, 2),
    (None, "triples", False, 8),
  ],
)
def test_images_go_no_further_than_their_group(group, layout, keys, near):
  """Nor do their gradients; what is drawn and learned is the same on any mesh."""
  (loss, gradient, drawn), messages = run(group, layout, keys, 4, 2, 1)
  (want, want_gradient, want_drawn), _ = run(group, layout, keys, 1, 1, 1)
  jax.tree.map(np.testing.assert_array_equal, drawn, want_drawn)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  for name, value in want_gradient.items():
    np.testing.assert_allclose(gradient[name], value, atol=1e-6 * np.abs(value).max())
  # All else that is sent is texts, embeddings and what is drawn.
  large = [m for m in messages if m.bytes > inputs()["text"].nbytes]
  part = inputs()["image"].nbytes * near // 8
  want = [("all-gather", 1, part, near)] * 2 if near > 1 else []
  assert [(m.kind, m.count, m.bytes, m.group) for m in large] == want
