"""Keys of an image, made once for all layers and for all texts it is fused with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models import tokens
from vlp_jax.models.fusion import cross_attention
from vlp_jax.models.fusion import interleaved

SIZES = dict(depth=3, num_heads=2, mlp_dim=32, init_std=None)
FUSIONS = {
  "cross_attention": cross_attention.Fusion(**SIZES),
  "pre_norm": cross_attention.Fusion(**SIZES, norm="pre", bias=False, unroll=3),
  "interleaved": interleaved.Fusion(**SIZES, image_width=24, remat="full"),
}


@pytest.fixture(scope="module", params=list(FUSIONS))
def case(request):
  """(fusion, its parameters, image Tokens of 2, text Tokens of 6)."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  fusion = FUSIONS[request.param]
  image = tokens.Tokens(draw(2, 5, 24), jnp.arange(5) < jnp.array([[5], [3]]))
  text = tokens.Tokens(draw(6, 4, 16), jnp.arange(4) < jnp.array(3 * [[4], [2]]))
  params = jax.jit(fusion.init)(jax.random.key(0), of_first(image), text)
  # Biases begin as 0, and would hide one that is missing.
  moved = lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape)
  return fusion, jax.tree.map(moved, params), image, text


def of_first(image, times=3):
  """Copies: text i is fused with image i // 3."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), image)


def shared(fusion, image, text):
  return fusion(fusion.remember(image), text).x


def copied(fusion, image, text):
  return fusion(of_first(image), text).x


def test_the_same_as_from_copies_of_the_image(case):
  """Values, and gradients of parameters, image and texts."""
  fusion, params, image, text = case

  def loss(method, params, x, y):
    fused = fusion.apply(params, image.replace(x=x), text.replace(x=y), method=method)
    return jnp.sum(jnp.sin(fused) * text.mask[..., None])

  run = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
  got, wanted = (run(way, params, image.x, text.x) for way in (shared, copied))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, wanted)


def test_rows_of_an_image_take_their_keys_along(case):
  fusion, params, image, text = case
  rows = jnp.array([1, 0])

  def taken(fusion, image, text):
    image = jax.tree.map(lambda x: x[rows], fusion.remember(image))
    return fusion(image, text).x

  got = fusion.apply(params, image, text, method=taken)
  other = jax.tree.map(lambda x: x[rows], image)
  wanted = fusion.apply(params, other, text, method=copied)
  np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_layers_that_norm_the_image_themselves_share_nothing():
  fusion = cross_attention.Fusion(**SIZES, norm_memory=True)
  image = tokens.Tokens(jnp.ones((2, 5, 24)))
  text = tokens.Tokens(jnp.ones((2, 4, 16)), jnp.ones((2, 4), bool))
  params = jax.jit(fusion.init)(jax.random.key(0), image, text)
  assert fusion.apply(params, image, method="remember") is image
