"""Chips: what they can do at best, and the source of each number."""

from collections.abc import Mapping
import dataclasses

GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA's GPU compiler asks of a card: its GpuTargetConfig.

  From the files xla/backends/gpu/target_config/specs/*.txtpb of openxla/xla, which were
  read from such cards.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  clock_ghz: float
  l2: int
  shared_per_core: int
  shared_optin: int

  def target(self, *, memory: int, bandwidth: int) -> str:
    """The text proto."""
    major, minor = self.capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_per_core}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {self.shared_optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{self.name}"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, as JAX sees it.

  Attributes:
    platform: "tpu", "gpu" or "cpu".
    flops: {precision of `cost.precision`: operations a second}.
    memory: bytes. usable: of these, for a program and its arguments.
    bandwidth: of the main memory, bytes/s.
    link: bytes/s that a device can send to the others of its slice or node.
    network: where several nodes take part, bytes/s that a whole node can send; None:
      there are no nodes, the links join all.
    gpu: for XLA's GPU compiler.
  """

  platform: str
  flops: Mapping[str, float]
  memory: float
  usable: float
  bandwidth: float
  link: float
  network: float | None = None
  gpu: Gpu | None = None


def _tpu(bf16, memory, bandwidth, link, reserved):
  # float32 is one pass of bfloat16 unless more precision is asked for; then six
  # (jax.lax.Precision.HIGHEST).
  rates = dict(half=bf16, single=bf16, single_high=bf16 / 6, double=bf16 / 100)
  return Chip("tpu", rates, memory, memory - reserved, bandwidth, link)


def _gpu(gpu, rates, memory, bandwidth, link, network):
  # A CUDA context, NCCL's buffers and the libraries' workspaces take the rest: ours.
  return Chip("gpu", rates, memory, 0.92 * memory, bandwidth, link, network, gpu)


_A100 = dict(
  capability=(8, 0),
  cores=108,
  fpus=64,
  clock_ghz=1.41,
  l2=41943040,
  shared_per_core=167936,
  shared_optin=166912,
)
_H100 = dict(
  capability=(9, 0),
  cores=132,
  fpus=128,
  clock_ghz=1.98,
  l2=52428800,
  shared_per_core=233472,
  shared_optin=232448,
)
# NVIDIA A100 data sheet (SXM): BF16 312, TF32 156, FP32 19.5, FP64 tensor 19.5 TFLOP/s.
_A100_RATES = dict(
  half=312 * TERA, single=156 * TERA, single_high=19.5 * TERA, double=19.5 * TERA
)
# NVIDIA H100 data sheet (SXM), without sparsity: BF16 989.4, TF32 494.7, FP32 66.9,
# FP64 tensor 66.9 TFLOP/s. H200 data sheet: the same.
_H100_RATES = dict(
  half=989.4 * TERA, single=494.7 * TERA, single_high=66.9 * TERA, double=66.9 * TERA
)
# NVLink, one direction. A100 data sheet: 600 GB/s both ways; H100, H200: 900 GB/s.
_NVLINK3, _NVLINK4 = 300 * GB, 450 * GB
# DGX A100: eight adapters of 200 Gb/s a node; DGX H100 and H200: eight of 400 Gb/s.
_HDR, _NDR = 8 * 25 * GB, 8 * 50 * GB

# How jax's names of devices (`device_kind`) begin.
NAMES = {
  "NVIDIA A100-SXM4-40GB": "a100-40gb",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB": "h100",
  "NVIDIA H200": "h200",
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
}

# Memory and its bandwidth of GPUs: the target files of openxla/xla (see `Gpu`).
# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, "key specifications"; a link's rate
# is the chip's bidirectional ICI bandwidth, halved. What the compiler keeps back of the
# memory it says itself when a program is too large (libtpu 0.0.42).
CHIPS = {
  # 275 TFLOP/s, 32 GiB, 1,200 GB/s. ICI: six links of 50 GB/s (Jouppi et al. 2023,
  # arXiv:2304.01433, table 4; recalled).
  "v4": _tpu(275 * TERA, 32 * GIB, 1200 * GB, 300 * GB, 0.25 * GIB),
  # 197 TFLOP/s, 16 GB, 819 GB/s, ICI 400 GB/s both ways.
  "v5e": _tpu(197 * TERA, 16 * GIB, 819 * GB, 200 * GB, 0.25 * GIB),
  # 459 TFLOP/s, 95 GB, 2,765 GB/s, ICI 4,800 Gb/s one way.
  "v5p": _tpu(459 * TERA, 95 * GIB, 2765 * GB, 600 * GB, 0.25 * GIB),
  # 918 TFLOP/s, 32 GB, 1,638 GB/s, ICI 800 GB/s both ways.
  "v6e": _tpu(918 * TERA, 32 * GIB, 1638 * GB, 400 * GB, 0.25 * GIB),
  "a100-40gb": _gpu(
    Gpu(name="NVIDIA A100-SXM4-40GB", **_A100),
    _A100_RATES,
    42331013120,
    1555200000000,
    _NVLINK3,
    _HDR,
  ),
  "a100": _gpu(
    Gpu(name="NVIDIA A100-SXM4-80GB", **_A100),
    _A100_RATES,
    85100068864,
    2039040000000,
    _NVLINK3,
    _HDR,
  ),
  "h100": _gpu(
    Gpu(name="NVIDIA H100 80GB HBM3", **_H100),
    _H100_RATES,
    84978434048,
    3352320000000,
    _NVLINK4,
    _NDR,
  ),
  "h200": _gpu(
    Gpu(name="NVIDIA H200 141GB HBM3e", **_H100),
    _H100_RATES,
    151397597184,
    4800000000000,
    _NVLINK4,
    _NDR,
  ),
}


def called(device_kind: str) -> str | None:
  """The name in `CHIPS` of what jax calls so; None: it is not there."""
  for name in sorted(NAMES, key=len, reverse=True):
    if device_kind.startswith(name):
      return NAMES[name]
  return None
