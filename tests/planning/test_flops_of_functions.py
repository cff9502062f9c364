"""FLOPs by hand, of what XLA's own analysis miscounts."""

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.planning import flops

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def scanned(x, w):
  return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=5)[0]


def test_a_product():
  assert flops.count(jnp.matmul, X, W) == 2 * 4 * 8 * 8


def test_layers_of_a_scan_count_as_often_as_they_run():
  assert flops.count(scanned, X, W) == 5 * 2 * 4 * 8 * 8


def test_a_gradient_is_twice_as_much_as_the_loss():
  loss = jax.value_and_grad(lambda x, w: (x @ w).sum(), argnums=(0, 1))
  assert flops.count(loss, X, W) == 3 * 2 * 4 * 8 * 8
  whole = flops.count(jax.grad(lambda w, x: scanned(x, w).sum()), W, X)
  assert whole == 3 * 5 * 2 * 4 * 8 * 8


def test_batched_products_and_branches():
  a = jax.ShapeDtypeStruct((3, 4, 8), jnp.float32)
  b = jax.ShapeDtypeStruct((3, 8, 5), jnp.float32)
  assert flops.count(jnp.matmul, a, b) == 3 * 2 * 4 * 8 * 5
  branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)
  assert flops.count(branch, X, W) == 2 * 4 * 8 * 8


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(stride):
  image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  kernel = jax.ShapeDtypeStruct((2, 2, 3, 16), jnp.float32)

  def conv(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  side = 8 // stride
  assert flops.count(conv, image, kernel) == 2 * 2 * side * side * 16 * 2 * 2 * 3
