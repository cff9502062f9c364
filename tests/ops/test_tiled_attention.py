"""Attention by tiles: the values and gradients of plain products, of any tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import tiled_attention

B, L, S, N, H = 3, 5, 7, 6, 4


def inputs():
  keys = jax.random.split(jax.random.key(0), 4)
  lengths = (L, S, S, L)
  return [
    jax.random.normal(key, (B, length, N, H))
    for key, length in zip(keys, lengths, strict=True)
  ]


def plain(query, key, value, mask):
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation="xla"
  )


def mask_of(kind):
  seen = jax.random.bernoulli(jax.random.key(1), 0.6, (B, 1, L, S)).at[..., 0].set(True)
  return {
    "none": None,
    "keys": seen[:, :, :1],
    "queries": seen,
    "of all": seen[:1],
    "nothing seen": seen.at[1].set(False),
  }[kind]


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "keys", "queries", "of all", "nothing seen"])
def test_values_and_gradients_are_those_of_plain_products(heads, kind, monkeypatch):
  monkeypatch.setattr(tiled_attention, "TILE", 4 * L * S * heads)
  *arrays, given = inputs()
  mask = mask_of(kind)
  got, backward = jax.vjp(lambda *a: tiled_attention.attend(*a, mask), *arrays)
  want, plain_backward = jax.vjp(lambda *a: plain(*a, mask), *arrays)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  for ours, theirs in zip(backward(given), plain_backward(given), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("heads", "length", "of_a_tile"),
  [(12, 577, 3), (12, 197, 12), (16, 257, 8), (12, 5000, 1), (10, 577, 2)],
)
def test_a_tile_holds_as_many_heads_as_fit(heads, length, of_a_tile):
  assert tiled_attention._heads_of_a_tile(heads, length, length) == of_a_tile


def test_it_is_worth_it_for_long_sequences_of_float32():
  image = jnp.zeros((1, 197, 12, 64))
  words = jnp.zeros((1, 30, 12, 64))
  assert tiled_attention.worth(image, image)
  assert not tiled_attention.worth(words, words)
  assert not tiled_attention.worth(image.astype(jnp.bfloat16), image)
