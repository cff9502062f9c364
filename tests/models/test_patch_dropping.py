"""FLIP (arXiv:2212.00794): the patches a ViT keeps in training, against slow numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models import vit

SIZE = dict(width=16, depth=1, num_heads=2, mlp_dim=32, patch=8, res=32, init_std=None)


def oracle(x, noise, kept, prefix):
  """facebookresearch/flip, `random_masking`, one image and one patch at a time."""
  images = []
  for tokens, draws in zip(x, noise, strict=True):
    ranked = sorted(range(len(draws)), key=lambda i: draws[i])
    images.append([*tokens[:prefix], *(tokens[prefix + i] for i in ranked[:kept])])
  return np.array(images)


@pytest.mark.parametrize("prefix, kept", [(1, 4), (0, 8), (1, 1), (2, 16)])
def test_keeps_the_patches_of_least_noise(prefix, kept):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, prefix + 16, 5)).astype(np.float32)
  noise = rng.random((3, 16)).astype(np.float32)
  got = vit.keep_patches(jnp.asarray(x), jnp.asarray(noise), kept, prefix=prefix)
  np.testing.assert_array_equal(got, oracle(x, noise, kept, prefix))


@pytest.fixture(scope="module")
def dropping():
  module = vit.Encoder(**SIZE, drop_patches=0.75)
  image = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  params = nn.unbox(module.init(jax.random.key(0), image))
  run = jax.jit(
    lambda seed: module.apply(params, image, train=True, rngs={"mask": seed}).x
  )
  return module, params, image, run


def test_training_sees_a_share_of_the_patches(dropping):
  module, params, image, run = dropping
  one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
  assert one.shape == (4, 1 + 4, 16)
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, other)
  # Images of one batch lose other patches: the same picture twice is encoded twice.
  same = jnp.broadcast_to(image[:1], image.shape)
  rngs = {"mask": jax.random.key(0)}
  twice = module.apply(params, same, train=True, rngs=rngs).x
  assert not np.allclose(twice[0], twice[1])


def test_evaluation_sees_all_of_them(dropping):
  module, params, image, _ = dropping
  whole = vit.Encoder(**SIZE)
  got, want = (m.apply(params, image).x for m in (module, whole))
  assert got.shape == (4, 1 + 16, 16)
  np.testing.assert_array_equal(got, want)


def test_it_says_what_is_wrong(dropping):
  _, params, image, _ = dropping
  with pytest.raises(ValueError, match=r"drop_patches=1\.0: wants a share"):
    vit.Encoder(**SIZE, drop_patches=1.0).apply(params, image)
  module = vit.Encoder(**SIZE, drop_patches=0.99)
  with pytest.raises(ValueError, match=r"drop_patches=0\.99 leaves none of 16"):
    module.apply(params, image, train=True, rngs={"mask": jax.random.key(0)})
