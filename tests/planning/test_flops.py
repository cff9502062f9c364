"""Model FLOPs against arithmetic by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlp_jax.planning import flops as flops_lib


def count(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops_lib.of(jax.make_jaxpr(function)(*args).jaxpr)


def test_products_and_convolutions():
  assert count(jnp.dot, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  einsum = lambda x, y: jnp.einsum("blnh,bsnh->bnls", x, y)
  assert count(einsum, (2, 6, 4, 8), (2, 9, 4, 8)) == 2 * 2 * 4 * 6 * 9 * 8

  def convolve(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  # A patch embedding is a product of patches: 4 of 4 x 4 x 3 numbers, to 16.
  assert count(convolve, (2, 8, 8, 3), (4, 4, 3, 16)) == 2 * 2 * 4 * 48 * 16


def test_a_scan_counts_as_often_as_it_runs_and_jit_is_looked_into():
  @jax.jit
  def layers(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  assert count(layers, (4, 8, 8), (3, 8)) == 4 * 2 * 3 * 8 * 8
  # The gradient: each product twice more, for the weights and for what came in.
  assert count(jax.grad(layers), (4, 8, 8), (3, 8)) == 3 * 4 * 2 * 3 * 8 * 8


def test_the_dearest_branch_counts():
  def either(x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)

  assert count(either, (8, 8)) == 2 * 8**3


def test_what_is_mapped_over_a_mesh_counts_on_every_device():
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("d",), devices=jax.devices()[:8], axis_types=auto)
  mapped = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(PartitionSpec("d"), PartitionSpec()),
    out_specs=PartitionSpec("d"),
  )
  assert count(mapped, (16, 4), (4, 5)) == 2 * 16 * 4 * 5
