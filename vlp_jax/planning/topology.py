"""Names of hardware, "v5e:16x16" or "h100:8", and devices of it that are not here."""

from collections.abc import Sequence
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re

from vlp_jax.planning import hardware

# cloud.google.com/tpu/docs/v5e and v6e: all slices there are.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# cloud.google.com/tpu/docs/v4 and v5p: the small ones, and then cubes of 4x4x4.
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
DEEP += ("8x8x16", "8x16x16", "16x16x16")
SHAPES = {"v4": DEEP, "v5e": FLAT, "v5p": (*DEEP, "16x16x24"), "v6e": FLAT}
NODE = 8  # GPUs of a DGX.

INSTALL = {
  "tpu": 'no libtpu here; pip install "vlp-jax[plan]" (or "jax[tpu]"): it needs no TPU',
  "gpu": 'no CUDA plugin here; pip install "vlp-jax[plan]" (or "jax[cuda12]"): it needs'
  " no GPU",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many devices of one kind, joined.

  Attributes:
    name: "v5e:16x16". kind: of `hardware.CHIPS`, or "cpu". devices: how many.
  """

  name: str
  kind: str
  devices: int

  @property
  def platform(self) -> str:
    return "cpu" if self.kind == "cpu" else hardware.CHIPS[self.kind].platform

  @property
  def shape(self) -> str:
    return self.name.partition(":")[2]


def parse(text: str) -> Topology:
  """What a name says.

  Raises:
    ValueError: there is no such hardware; names the nearest, and all.
  """
  kind, _, shape = text.strip().lower().partition(":")
  names = (*hardware.CHIPS, "cpu")
  if kind not in names:
    near = difflib.get_close_matches(kind, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
      f"topology: {text!r}: no such hardware; {hint}There are: {_all()}."
    )
  if kind in SHAPES:
    if shape in SHAPES[kind] or _is_cubes(kind, shape):
      return Topology(f"{kind}:{shape}", kind, math.prod(map(int, shape.split("x"))))
    raise ValueError(
      f"topology: {text!r}: no slice of {kind}; the nearest is"
      f" {kind}:{_nearest(shape, SHAPES[kind])}. There are: {', '.join(SHAPES[kind])}"
      + (" (and others of multiples of 4)." if SHAPES[kind] is not FLAT else ".")
    )
  wanted = "a number, as in cpu:8" if kind == "cpu" else "1, 2, 4, 8 or a multiple of 8"
  if not re.fullmatch(r"[1-9]\d*", shape):
    raise ValueError(f"topology: {text!r}: want {wanted} behind the colon: {kind}:8.")
  count = int(shape)
  if kind != "cpu" and count not in (1, 2, 4) and count % NODE:
    near = max(NODE, round(count / NODE) * NODE)
    raise ValueError(
      f"topology: {text!r}: want {wanted}; the nearest is {kind}:{near}."
    )
  return Topology(f"{kind}:{count}", kind, count)


def _is_cubes(kind, shape):
  """Larger slices of v4 and v5p are of cubes of 4x4x4."""
  if SHAPES[kind] is FLAT or not re.fullmatch(r"\d+x\d+x\d+", shape):
    return False
  sizes = [int(s) for s in shape.split("x")]
  return (
    sizes == sorted(sizes) and all(s and s % 4 == 0 for s in sizes) and sizes[-1] <= 24
  )


def _nearest(shape: str, shapes: Sequence[str]) -> str:
  """By the number of chips where a number is said, else by the text."""
  sizes = [int(s) for s in re.findall(r"\d+", shape)]
  if not sizes or not math.prod(sizes):
    return shapes[-1]
  wanted = math.log(math.prod(sizes))
  return min(
    shapes, key=lambda s: abs(math.log(math.prod(map(int, s.split("x")))) - wanted)
  )


def _all():
  kinds = [f"{k}:{SHAPES[k][-1] if k in SHAPES else 8}" for k in hardware.CHIPS]
  return ", ".join([*kinds, "cpu:8"])


def prepare(topology: Topology) -> None:
  """What has to be said before JAX begins: no accelerator of this machine is touched.

  Raises:
    ValueError: the compiler for it is not installed; says what to install.
  """
  plugins = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
  wanted = plugins.get(topology.platform, ())
  if wanted and not any(importlib.util.find_spec(name) for name in wanted):
    raise ValueError(f"topology: {topology.name}: {INSTALL[topology.platform]}.")
  os.environ["JAX_PLATFORMS"] = "cpu"
  if topology.platform == "tpu":
    # Else libtpu looks for a TPU machine's metadata, and waits for it.
    os.environ |= {
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "v5litepod-16",
      "TPU_WORKER_HOSTNAMES": "localhost",
    }


def devices(topology: Topology) -> list:
  """Its devices, for a mesh to be compiled for; `prepare` comes first.

  Raises:
    ValueError: JAX has begun with fewer CPU devices.
  """
  # Here: `--help` need not wait for jax.
  import jax
  from jax.experimental import topologies

  if topology.platform == "tpu":
    options = {}
    if topology.shape == "1x1":
      options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
      options["chip_config_name"] = "megacore"  # A chip is one device, as on a v4.
    described = topologies.get_topology_desc(topology.name, "tpu", **options)
    return list(described.devices)
  if topology.platform == "gpu":
    chip = hardware.CHIPS[topology.kind]
    nodes = -(-topology.devices // NODE)
    name = f"1x{nodes}x{topology.devices // nodes}"
    target = chip.gpu.target(memory=int(chip.memory), bandwidth=int(chip.bandwidth))
    described = topologies.get_topology_desc(
      name, "cuda", topology=name, target_config=target
    )
    return list(described.devices)
  with contextlib.suppress(RuntimeError):  # JAX has begun already.
    jax.config.update("jax_num_cpu_devices", topology.devices)
  there = jax.devices("cpu")
  if len(there) < topology.devices:
    raise ValueError(
      f"topology: {topology.name}: JAX has begun with {len(there)} CPU devices."
    )
  return there[: topology.devices]
