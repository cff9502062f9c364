"""Fusions of two streams, and the patches that one of them reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax.models import patches
from vlp_jax.models import text
from vlp_jax.models import tokens
from vlp_jax.models import vlm
from vlp_jax.models.fusion import co_attention
from vlp_jax.models.fusion import concat
from vlp_jax.models.fusion import merged
from vlp_jax.ops import posembed

WIDTH, IMAGE = 16, 24
SIZES = dict(depth=2, num_heads=2, mlp_dim=32, init_std=None)
FUSIONS = {
  "co_attention": lambda: co_attention.Fusion(WIDTH, IMAGE, width=20, **SIZES),
  "merged": lambda: merged.Fusion(WIDTH, WIDTH, **SIZES),
  "concat": lambda: concat.Fusion(WIDTH, IMAGE, width=20, init_std=None),
}


def streams(image_width, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  mask = jnp.arange(6) < jnp.array([[6], [4], [3]])
  seen = jnp.arange(5) < jnp.array([[5], [5], [2]])
  image = tokens.Tokens(draw(3, 5, image_width), seen)
  return image, tokens.Tokens(draw(3, 6, WIDTH), mask)


@pytest.fixture(scope="module", params=list(FUSIONS))
def case(request):
  fusion = FUSIONS[request.param]()
  image, words = streams(fusion.image_width)
  params = jax.jit(fusion.init)(jax.random.key(0), image, words)
  return request.param, fusion, jax.jit(fusion.apply), params, image, words


def test_shapes_are_those_it_tells(case):
  _, fusion, apply, params, image, words = case
  fused = apply(params, image, words)
  width, pooled = fusion.widths(WIDTH)
  assert fused.x.shape == (3, 6, width) and fused.pooled.shape == (3, pooled)
  assert fused.image.x.shape[:2] == (3, 5)
  np.testing.assert_array_equal(fused.mask, words.mask)


def test_padding_of_either_stream_changes_nothing(case):
  _, _, apply, params, image, words = case
  want = apply(params, image, words)
  noisy = lambda t: t.replace(x=jnp.where(t.mask[..., None], t.x, 9.0))
  got = apply(params, noisy(image), noisy(words))
  np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-6)
  real = words.mask[..., None]
  np.testing.assert_allclose(got.x * real, want.x * real, rtol=1e-5, atol=1e-6)


def test_who_sees_whom(case):
  """Another image is seen in every word, except where only the ends are joined."""
  name, _, apply, params, image, words = case
  other = image.replace(x=image.x[::-1])
  want, got = apply(params, image, words), apply(params, other, words)
  moved = np.abs(got.x - want.x).max(axis=-1) > 1e-6
  assert moved[[0, 2]].any() == (name != "concat")
  assert (np.abs(got.pooled - want.pooled).max(axis=-1) > 1e-6)[[0, 2]].all()


@pytest.mark.parametrize("name", ["co_attention", "merged"])
def test_a_second_image_has_a_type_of_its_own(name):
  fusion = FUSIONS[name]().clone(types=3)
  image, words = streams(fusion.image_width)
  params = jax.jit(fusion.init)(jax.random.key(0), image, words)
  apply = jax.jit(lambda which: fusion.apply(params, image, words, image_type=which))
  assert not np.allclose(apply(1).pooled, apply(2).pooled, atol=1e-6)


def test_both_streams_read_the_pair_as_it_came_in():
  """One layer of co-attention: its image does not see what its text has become."""
  fusion = co_attention.Fusion(WIDTH, IMAGE, **(SIZES | dict(depth=1)))
  image, words = streams(IMAGE)
  params = jax.jit(fusion.init)(jax.random.key(0), image, words)
  zeroed = jax.tree.map(lambda x: x, params)
  blocks = zeroed["params"]["blocks"]
  blocks["text"] = jax.tree.map(jnp.zeros_like, blocks["text"])
  apply = jax.jit(fusion.apply)
  want, got = apply(params, image, words), apply(zeroed, image, words)
  np.testing.assert_array_equal(got.image.x, want.image.x)
  assert not np.allclose(got.x, want.x)


def test_merged_wants_one_width_and_sees_both_ways():
  image, words = streams(IMAGE)
  with pytest.raises(ValueError, match=r"image.width=24 and model.text.width=16"):
    merged.Fusion(WIDTH, IMAGE, **SIZES).init(jax.random.key(0), image, words)
  image, words = streams(WIDTH)
  with pytest.raises(ValueError, match="bidirectional"):
    merged.Fusion(WIDTH, WIDTH, **SIZES).init(
      jax.random.key(0), image, words, attention="causal"
    )


def test_concat_has_no_pooling_with_parameters():
  image, words = streams(IMAGE)
  with pytest.raises(ValueError, match=r'model.fusion.pool="map"'):
    concat.Fusion(WIDTH, IMAGE, pool="map").init(jax.random.key(0), image, words)


def test_a_model_without_a_fusion_of_patches_says_so():
  model = vlm.VLM(
    image=patches.Encoder(width=WIDTH, patch=8, res=16),
    text=text.Encoder(tiny.VOCAB, WIDTH, 0, 2, 32, 10),
    embed_dim=None,
  )
  fused = tokens.Tokens(jnp.zeros((1, 2, 3)))
  with pytest.raises(ValueError, match="wants image tokens that have seen the text"):
    model.apply({}, fused, method="fused_image")


# --- Patches --------------------------------------------------------------------------


def encode(image, size, *, train=False, **fields):
  encoder = patches.Encoder(width=8, patch=4, res=16, init_std=None, **fields)
  params = encoder.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  rngs = {"sample": jax.random.key(5)}
  return encoder.apply(params, image, size, train=train, rngs=rngs), params


def images(seed=0):
  return jax.random.normal(jax.random.key(seed), (3, 16, 16, 3))


def test_what_lies_outside_of_an_image_is_not_read():
  size = jnp.array([[16, 16], [8, 12], [6, 16]], jnp.int32)
  got, _ = encode(images(), size)
  np.testing.assert_array_equal(got.mask.sum(1), 1 + np.array([16, 6, 8]))
  rows, columns = jnp.mgrid[:16, :16]
  inside = (rows < size[:, 0, None, None]) & (columns < size[:, 1, None, None])
  noisy, _ = encode(jnp.where(inside[..., None], images(), 7.0), size)
  np.testing.assert_array_equal(noisy.x, got.x)


def test_in_training_patches_beyond_the_most_are_drawn():
  size = jnp.array([[16, 16], [8, 12], [4, 8]], jnp.int32)
  first, _ = encode(images(), size, max_patches=6)
  drawn, _ = encode(images(), size, max_patches=6, train=True)
  every, _ = encode(images(), size)
  assert first.x.shape == drawn.x.shape == (3, 7, 8)
  np.testing.assert_array_equal(drawn.mask.sum(1), [7, 7, 3])
  # Of the crowded image some, each once; of the others what there is, in order.
  places = [int(jnp.abs(every.x[0] - x).sum(1).argmin()) for x in drawn.x[0]]
  assert len(set(places)) == 7 and places != list(range(7))
  np.testing.assert_allclose(drawn.x[1:], first.x[1:], rtol=1e-6)


def test_positions_are_stretched_from_corner_to_corner():
  table = jax.random.normal(jax.random.key(0), (9, 2))
  grid = jnp.array([[2, 5], [3, 3], [1, 4]], jnp.int32)
  place = jnp.broadcast_to(jnp.arange(10), (3, 10))
  got = posembed.bilinear(table, place // 5, place % 5, grid)
  square = np.asarray(table).reshape(3, 3, 2)
  want = np.stack([square[0], square[2]])  # two rows are the first and the last
  between = 0.5 * (want[:, :-1] + want[:, 1:])
  np.testing.assert_allclose(got[0].reshape(2, 5, 2)[:, ::2], want, atol=1e-6)
  np.testing.assert_allclose(got[0].reshape(2, 5, 2)[:, 1::2], between, atol=1e-6)
  own = posembed.bilinear(
    table, jnp.arange(9)[None] // 3, jnp.arange(9)[None] % 3, grid
  )
  np.testing.assert_allclose(own[1], table, atol=1e-6)
  np.testing.assert_allclose(got[2][0], square[0, 0], atol=1e-6)
  with pytest.raises(ValueError, match="no square grid"):
    posembed.bilinear(table[1:], place, place, grid)
