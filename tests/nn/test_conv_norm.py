"""Convolutions and batch norm against slow numpy; statistics of the global batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.nn import conv_norm
from vlp_jax.training import sharding as sharding_lib


def images(shape=(8, 3, 3, 4), seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(1.0, 2.0, shape).astype(np.float32)


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_is_a_sum_over_windows(size, stride):
  module, x = conv_norm.Conv(5, size, stride), images((2, 6, 6, 3))
  variables = nn.unbox(module.init(jax.random.key(0), x))
  kernel, got = variables["params"]["kernel"], module.apply(variables, x)
  around = size // 2
  padded = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
  assert got.shape == (2, 6 // stride, 6 // stride, 5)
  for row in range(6 // stride):
    for column in range(6 // stride):
      top, left = row * stride, column * stride
      window = padded[:, top : top + size, left : left + size]
      want = np.einsum("bijc,ijcd->bd", window, kernel)
      np.testing.assert_allclose(got[:, row, column], want, rtol=1e-4, atol=1e-5)


def train(module, variables, x):
  """(output, memory) of a training pass."""
  y, new = module.apply(variables, x, train=True, mutable=["memory"])
  return y, new["memory"]


def test_batch_norm_normalises_by_the_batch_and_remembers():
  module, x = conv_norm.BatchNorm(momentum=0.1), images()
  variables = nn.unbox(module.init(jax.random.key(0), x, train=False))
  variables["params"] = dict(scale=jnp.arange(4.0), bias=jnp.arange(4.0) - 1)
  y, memory = jax.jit(train, static_argnums=0)(module, variables, x)
  flat = np.float64(x).reshape(-1, 4)
  mean, biased = flat.mean(axis=0), flat.var(axis=0)
  want = (np.float64(x) - mean) / np.sqrt(biased + 1e-5) * np.arange(4)
  np.testing.assert_allclose(y, want + np.arange(4) - 1, rtol=1e-4, atol=1e-5)
  # torch.nn.BatchNorm2d: a tenth of the new, whose variance is the unbiased one.
  np.testing.assert_allclose(memory["mean"], 0.1 * mean, rtol=1e-5)
  unbiased = flat.var(axis=0, ddof=1)
  np.testing.assert_allclose(memory["variance"], 0.9 + 0.1 * unbiased, rtol=1e-5)
  assert memory["batches"] == 1 and memory["batches"].dtype == jnp.int32
  # A pass that does not train reads what is remembered, and leaves it.
  held = {"params": variables["params"], "memory": memory}
  got, new = module.apply(held, x, train=False, mutable=["memory"])
  want = (np.float64(x) - memory["mean"]) / np.sqrt(memory["variance"] + 1e-5)
  want = want * np.arange(4) + np.arange(4) - 1
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, new["memory"], memory)


def test_statistics_are_of_the_global_batch_on_any_mesh():
  module, x = conv_norm.BatchNorm(), images((16, 2, 2, 4))
  # Rows that differ much: the statistics of a part would be others.
  x += np.arange(16, dtype=np.float32)[:, None, None, None]
  variables = nn.unbox(module.init(jax.random.key(0), x, train=False))
  found = []
  for devices in (1, 8):
    sharding = sharding_lib.Sharding(mesh={"data": -1})
    mesh = sharding_lib.make_mesh(sharding, jax.devices()[:devices])
    with sharding_lib.use(mesh, sharding):
      rows = sharding_lib.put_batch(dict(x=x), mesh)["x"]
      found.append(jax.jit(train, static_argnums=0)(module, variables, rows))
  one, eight = (jax.tree.map(np.asarray, each) for each in found)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found
  )
  parts = one[0].reshape(8, 2, 2, 2, 4).mean(axis=(1, 2, 3))
  assert np.abs(parts).max() > 1.0 and eight[1]["mean"].shape == (4,)


def test_what_is_remembered_has_no_gradient():
  module, x = conv_norm.BatchNorm(), images()
  variables = nn.unbox(module.init(jax.random.key(0), x, train=False))

  def kept(x):
    _, memory = train(module, variables, x)
    return memory["mean"].sum() + memory["variance"].sum()

  assert np.abs(jax.grad(kept)(x)).max() == 0


def test_means_of_squares():
  x = images((2, 4, 6, 3))
  got = conv_norm.mean_pool(jnp.asarray(x), 2)
  np.testing.assert_allclose(got[1, 1, 2], x[1, 2:4, 4:6].mean(axis=(0, 1)), rtol=1e-5)
  assert conv_norm.mean_pool(x, 1) is x
  with pytest.raises(ValueError, match="4x6 is not made of 4-pixel squares"):
    conv_norm.mean_pool(x, 4)
