"""The convolutional stem against slow numpy, and what it cannot be made of."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlp_jax.models import vit
from vlp_jax.nn import stem


def make(patch=6, width=8, res=12, **fields):
  module = stem.ConvStem(patch=patch, width=width, **fields)
  image = np.random.default_rng(0).normal(size=(2, res, res, 3)).astype(np.float32)
  return module, nn.unbox(module.init(jax.random.key(0), image)), image


def convolve(x, kernel, bias, stride):
  """Padded as "SAME" is: what is missing at the end, the smaller half before."""
  size, side = kernel.shape[0], x.shape[1] // stride
  missing = max((side - 1) * stride + size - x.shape[1], 0)
  pad = (missing // 2, missing - missing // 2)
  x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
  y = np.zeros((x.shape[0], side, side, kernel.shape[-1]))
  for row in range(side):
    for column in range(side):
      top, left = row * stride, column * stride
      window = x[:, top : top + size, left : left + size]
      y[:, row, column] = np.einsum("bijc,ijcd->bd", window, kernel) + bias
  return y


def test_it_is_strided_convolutions_with_relu_between():
  module, variables, image = make()
  params = {k: np.float64(v) for k, v in variables["params"].items()}
  assert {k: v.shape for k, v in params.items()} == {
    "kernel_0": (5, 5, 3, 4),
    "bias_0": (4,),
    "kernel_1": (3, 3, 4, 8),
    "bias_1": (8,),
  }
  x = convolve(np.float64(image), params["kernel_0"], params["bias_0"], 3)
  x = convolve(np.maximum(x, 0), params["kernel_1"], params["bias_1"], 2)
  got = module.apply(variables, image)
  np.testing.assert_allclose(got, x.reshape(2, 4, 8), rtol=1e-5, atol=1e-5)


def test_deep_it_has_one_without_stride_behind_each_in_between():
  module, variables, image = make(patch=12, deep=True)
  params = {k: np.float64(v) for k, v in variables["params"].items()}
  kernels = {k: v.shape for k, v in params.items() if "kernel" in k}
  assert kernels == {
    "kernel_0": (5, 5, 3, 2),
    "kernel_1": (3, 3, 2, 4),
    "kernel_2": (3, 3, 4, 4),
    "kernel_3": (3, 3, 4, 8),
  }
  x = np.float64(image)
  for i, stride in enumerate((3, 2, 1, 2)):
    x = np.maximum(x, 0) if i else x
    x = convolve(x, params[f"kernel_{i}"], params[f"bias_{i}"], stride)
  got = module.apply(variables, image)
  np.testing.assert_allclose(got, x.reshape(2, 1, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("number", "factors"), [(12, [3, 2, 2]), (16, [2] * 4), (14, [7, 2]), (7, [7])]
)
def test_prime_factors(number, factors):
  assert stem.prime_factors(number) == factors


def encoder(**fields):
  sizes = dict(depth=1, num_heads=2, mlp_dim=8, res=16, patch=8, width=8)
  return vit.Encoder(**sizes | fields)


@pytest.mark.parametrize("kind", ["conv", "conv_deep"])
def test_an_encoder_with_it(kind):
  image = np.ones((2, 16, 16, 3), np.float32)
  module = encoder(stem=kind, init_std=None)
  variables = nn.unbox(module.init(jax.random.key(0), image))
  assert len(variables["params"]["stem"]) == {"conv": 6, "conv_deep": 8}[kind]
  assert "stem" in variables["params"] and "patch" not in variables["params"]
  loss = lambda v: module.apply(v, image).x.std()
  grads = jax.jit(jax.grad(loss))(variables)["params"]["stem"]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  assert module.apply(variables, image).x.shape == (2, 5, 8)
  # Of another size, with its positions resampled.
  assert module.apply(variables, np.ones((2, 32, 32, 3))).x.shape == (2, 17, 8)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(width=6, num_heads=1), "halves width=6 2 times: take a multiple of 4"),
    (dict(patch=1), "a patch of 2 or more"),
  ],
)
def test_sizes_that_cannot_be(fields, message):
  module = encoder(stem="conv", **fields)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), np.ones((1, 16, 16, 3)))
