"""What a device can do at most: a table, and on a CPU a measurement."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlp_jax.planning import hardware

# Dense multiply-add FLOP/s of what `planning/hardware.py` does not plan for, by how
# jax's name of the device begins: (bfloat16, float32). float32 is what a step gets with
# jax's default precision, TF32. NVIDIA's data sheets; V100: float16 on its tensor
# cores, float32 without them.
OTHERS = {
  "NVIDIA H100 PCIe": (756e12, 378e12),
  "NVIDIA H100 NVL": (835e12, 418e12),
  "NVIDIA B200": (2250e12, 1125e12),
  "NVIDIA L4": (121e12, 60e12),
  "Tesla V100": (125e12, 15.7e12),
}
SIDE = 2048  # of the square matrices that the CPU multiplies


def published(kind: str, dtype: str) -> float | None:
  """FLOP/s of a device by its `device_kind`; None: it is in neither table."""
  for name, (half, full) in OTHERS.items():
    if kind.startswith(name):
      return half if dtype == "bfloat16" else full
  planned = hardware.called(kind)
  if planned is None:
    return None
  rates = hardware.CHIPS[planned].flops
  return rates["half"] if dtype == "bfloat16" else rates["single"]


def matmul(dtype: str) -> tuple[Callable[[], None], float]:
  """(a product of two square matrices, to be timed, and its FLOPs)."""
  key = jax.random.key(0)
  a, b = jax.random.normal(key, (2, SIDE, SIDE), jnp.float32).astype(dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(a, b).block_until_ready(), 2.0 * SIDE**3
