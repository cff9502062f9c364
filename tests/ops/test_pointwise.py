"""Activations and layer norm that keep their input alone, against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import pointwise

PLAIN = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
}


def plain_norm(x, scale, bias, eps):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return x * scale + (0.0 if bias is None else bias)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_an_activation_and_its_gradient(name):
  x = jnp.linspace(-9.0, 9.0, 1_001)
  found, pull = jax.vjp(getattr(pointwise, name), x)
  wanted, plain_pull = jax.vjp(PLAIN[name], x)
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(pull(x)[0], plain_pull(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_an_activation_of_bfloat16_is_rounded_once(name):
  x = jnp.linspace(-4.0, 4.0, 257).astype(jnp.bfloat16)
  found = getattr(pointwise, name)(x)
  wanted = PLAIN[name](x.astype(jnp.float32)).astype(jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, wanted)
  (kept,) = jax.tree.leaves(jax.vjp(getattr(pointwise, name), x)[1])
  np.testing.assert_array_equal(kept, x)


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_and_its_gradients(with_bias):
  rng = np.random.default_rng(0)
  x, grad = 3.0 + rng.normal(size=(2, 2, 5, 16)).astype(np.float32)
  scale, bias = rng.normal(size=(2, 16)).astype(np.float32)
  bias = bias if with_bias else None
  found, pull = jax.vjp(
    lambda *args: pointwise.layer_norm(*args, 1e-6, "float32"), x, scale, bias
  )
  wanted, plain_pull = jax.vjp(lambda *args: plain_norm(*args, 1e-6), x, scale, bias)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  for mine, theirs in zip(pull(grad), plain_pull(grad), strict=True):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, theirs
    )


def test_layer_norm_of_bfloat16_keeps_no_array_of_float32():
  x = jnp.ones((4, 8, 16), jnp.bfloat16)
  scale = jnp.ones(16)
  y, pull = jax.vjp(
    lambda x: pointwise.layer_norm(x, scale, scale, 1e-6, "bfloat16"), x
  )
  assert y.dtype == jnp.bfloat16
  large = [a for a in jax.tree.leaves(pull) if a.size == x.size]
  assert [a.dtype for a in large] == [jnp.bfloat16]
