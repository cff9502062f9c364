"""What a device can do at most: a table, and on a CPU a measurement."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Dense multiply-add FLOP/s by jax's name of the device: (bfloat16, float32). float32 is
# what a step gets with jax's default precision: TF32 on NVIDIA, bfloat16 passes on TPU.
# NVIDIA: data sheets of H100, H200 (SXM: 989 and 495 without sparsity; PCIe: 756, 378),
# A100 (312, 156), A10G, L4, V100 (float16 on its tensor cores; float32 without them).
# TPU: Google Cloud's pages of each generation, per chip.
TABLE = {
  "NVIDIA H100 PCIe": (756e12, 378e12),
  "NVIDIA H100 NVL": (835e12, 418e12),
  "NVIDIA H100": (989e12, 495e12),
  "NVIDIA H200": (989e12, 495e12),
  "NVIDIA B200": (2250e12, 1125e12),
  "NVIDIA A100": (312e12, 156e12),
  "NVIDIA L4": (121e12, 60e12),
  "Tesla V100": (125e12, 15.7e12),
  "TPU v6 lite": (918e12, 918e12),
  "TPU v5 lite": (197e12, 197e12),
  "TPU v5p": (459e12, 459e12),
  "TPU v5": (459e12, 459e12),
  "TPU v4": (275e12, 275e12),
}
SIDE = 2048  # of the square matrices that the CPU multiplies


def published(kind: str, dtype: str) -> float | None:
  """FLOP/s of a device by its `device_kind`; None: it is not in the table."""
  for name in sorted(TABLE, key=len, reverse=True):
    if kind.lower().startswith(name.lower()):
      half, full = TABLE[name]
      return half if dtype == "bfloat16" else full
  return None


def matmul(dtype: str) -> tuple[Callable[[], None], float]:
  """(a product of two square matrices, to be timed, and its FLOPs)."""
  key = jax.random.key(0)
  a, b = jax.random.normal(key, (2, SIDE, SIDE), jnp.float32).astype(dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(a, b).block_until_ready(), 2.0 * SIDE**3
