"""Kernels of a GPU, interpreted, against what XLA computes of the same formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import pointwise

HERE = pointwise.Rows(((), (), ()), interpret=True)
SPREAD = pointwise.Rows((("data",), (), ()), interpret=True)
BOTH = pointwise.Rows((("data",), (), ("tensor",)), interpret=True)


def draw(*shape):
  rng = np.random.default_rng(0)
  x, grad, more = rng.normal(size=(3, *shape)).astype(np.float32)
  scale, bias = rng.normal(size=(2, shape[-1])).astype(np.float32)
  return 2.0 + x, grad, more, scale, bias


def close(found, wanted):
  """All within 1e-5 of the array's largest: sums over rows are made in any order."""

  def one(found, wanted):
    scale = max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * scale)

  jax.tree.map(one, found, wanted)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 700, 8), (1, 3, 2_050)])
def test_norm(shape, with_bias):
  x, grad, more, scale, bias = draw(*shape)
  bias = bias if with_bias else None

  def plain(x, scale, bias):
    return pointwise.layer_norm(x, scale, bias, 1e-5, "float32"), x

  def kernel(x, scale, bias):
    return pointwise.kernel_norm(x, scale, bias, 1e-5, "float32", HERE, True)

  wanted, pull_wanted = jax.vjp(plain, x, scale, bias)
  found, pull = jax.vjp(kernel, x, scale, bias)
  close(found, wanted)
  close(pull((grad, more)), pull_wanted((grad, more)))


def test_norm_without_a_fork():
  x, grad, _, scale, bias = draw(2, 5, 24)
  plain = lambda *args: pointwise.layer_norm(*args, 1e-5, "float32")
  kernel = lambda *args: pointwise.kernel_norm(*args, 1e-5, "float32", HERE, False)
  wanted, pull_wanted = jax.vjp(plain, x, scale, bias)
  found, pull = jax.vjp(kernel, x, scale, bias)
  close(found, wanted)
  close(pull(grad), pull_wanted(grad))


def test_norm_of_bfloat16_is_rounded_once_and_keeps_its_input_alone():
  x, grad, _, scale, bias = draw(2, 5, 24)
  x, grad = x.astype(jnp.bfloat16), grad.astype(jnp.bfloat16)
  kernel = lambda x: pointwise.kernel_norm(
    x, scale, bias, 1e-5, "bfloat16", HERE, False
  )
  y, pull = jax.vjp(kernel, x)
  exact = pointwise.layer_norm(x.astype(jnp.float32), scale, bias, 1e-5, "float32")
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
  large = [a for a in jax.tree.leaves(pull) if a.size == x.size]
  assert [a.dtype for a in large] == [jnp.bfloat16]
  assert pull(grad)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 700, 8), (1, 3, 2_050)])
def test_activation_behind_a_bias(shape, name):
  x, grad, _, _, bias = draw(*shape)
  act = getattr(pointwise, name)
  wanted, pull_wanted = jax.vjp(lambda x, bias: act(x + bias), 3.0 * x, bias)
  found, pull = jax.vjp(lambda x, bias: act.biased(x, bias, HERE), 3.0 * x, bias)
  close(found, wanted)
  close(pull(grad), pull_wanted(grad))


def test_slope_of_gelu_far_from_zero():
  # By a formula whose error is absolute: nothing may be left of it at either end.
  x = jnp.linspace(-12.0, 12.0, 4_001).reshape(1, 1, -1)
  zero = jnp.zeros(x.shape[-1])
  _, pull = jax.vjp(lambda x: pointwise.gelu.biased(x, zero, HERE), x)
  plain = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))
  (found,) = pull(jnp.ones_like(x))
  np.testing.assert_allclose(found[0, 0], plain(x[0, 0]), rtol=0, atol=5e-7)


@pytest.mark.parametrize("rows", [SPREAD, BOTH])
def test_activation_on_devices(rows):
  x, grad, _, _, bias = draw(4, 6, 32)
  alone = lambda x, bias: pointwise.gelu.biased(x, bias, HERE)
  spread = lambda x, bias: pointwise.gelu.biased(x, bias, rows)
  wanted, pull_wanted = jax.vjp(alone, x, bias)
  with jax.set_mesh(mesh()):
    found, of = jax.jit(lambda *a: value_and_pull(spread, grad, *a))(x, bias)
  close(found, wanted)
  close(of, pull_wanted(grad))


def test_norm_on_devices():
  x, grad, more, scale, bias = draw(4, 6, 32)
  norm = lambda rows: (
    lambda *args: pointwise.kernel_norm(*args, 1e-5, "float32", rows, True)
  )
  wanted, pull_wanted = jax.vjp(norm(HERE), x, scale, bias)
  with jax.set_mesh(mesh()):
    run = jax.jit(lambda *a: value_and_pull(norm(SPREAD), (grad, more), *a))
    found, of = run(x, scale, bias)
  close(found, wanted)
  close(of, pull_wanted((grad, more)))


def mesh():
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto)


def value_and_pull(f, grad, *args):
  value, pull = jax.vjp(f, *args)
  return value, pull(grad)
