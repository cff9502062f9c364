"""What one run of a compiled program costs a device: arithmetic, memory, messages.

XLA's own `cost_analysis()` counts the body of a loop once, and says nothing on a GPU
that is not here. This walks the instructions, and multiplies by how often loops run.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import json
import math
import re

import numpy as np

from vlp_jax.planning import hlo

# Opcodes that move nothing: they name what is there. What is started counts at its
# start.
FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "add-dependency",
  "opt-barrier",
  "partition-id",
  "replica-id",
  "domain",
}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape"}
COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Of which an instruction reads but the part that it makes.
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Work:
  """An instruction's share: runs `count` times.

  flops: {precision: of one run}, see `precision`. bytes: of main memory, read and
  written by one run.
  """

  count: int
  flops: dict[str, float]
  bytes: float


@dataclasses.dataclass(frozen=True)
class Message:
  """A collective, `count` times.

  bytes: of one device's result for all-gather, of its operands for the others.
  group: number of devices that take part.
  """

  kind: str
  count: int
  bytes: float
  group: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one run, by the ring algorithm's count."""
    share = (self.group - 1) / self.group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}
    return factor.get(self.kind, share) * self.bytes


@dataclasses.dataclass(frozen=True)
class Cost:
  """All work and messages of one run, on one device.

  unknown_loops: names of loops whose length cannot be told; they count once.
  """

  work: tuple[Work, ...]
  messages: tuple[Message, ...]
  unknown_loops: tuple[str, ...]

  @property
  def flops(self) -> dict[str, float]:
    """{precision: floating-point operations of matrix products and convolutions}."""
    total = collections.Counter()
    for work in self.work:
      for kind, number in work.flops.items():
        total[kind] += work.count * number
    return dict(total)

  @property
  def bytes(self) -> float:
    """Read from and written to main memory."""
    return sum(work.count * work.bytes for work in self.work)

  def by_kind(self) -> dict[str, dict[str, float]]:
    """{kind of collective: {"count", "bytes", "sent"}}."""
    out = {}
    for message in self.messages:
      row = out.setdefault(message.kind, dict(count=0, bytes=0.0, sent=0.0))
      row["count"] += message.count
      row["bytes"] += message.count * message.bytes
      row["sent"] += message.count * message.sent
    return dict(sorted(out.items()))


def of(text: str, *, devices: int) -> Cost:
  """The cost of a program's text.

  Args:
    devices: that it runs on; a collective without groups is among all of them.
  """
  program = hlo.parse(text)
  work, messages, unknown, chains = [], [], [], {}
  for where, found, count in _executed(program, program.entry, 1, unknown):
    here = program.computations[where]
    flops = collections.Counter()
    for inside, part in _within(program, where, found):
      kind = _collective(part)
      if kind:
        if found.name.startswith("all-reduce-scatter"):
          kind = "reduce-scatter"  # The TPU compiler's fusion of one.
        made = _message(program.computations[inside], part, kind, count, devices)
        if _is_chained(part):
          # Written once for each step of a chain of fusions that it runs beside.
          channel = re.search(r"channel_id=(\d+)", part.attributes)[1]
          least = min(count, chains.get(channel, made).count)
          chains[channel] = dataclasses.replace(made, count=least)
        else:
          messages.append(made)
      for kind, number in _flops(program.computations[inside], part).items():
        flops[kind] += number
    work.append(Work(count, dict(flops), _bytes(program, here, found)))
  return Cost(tuple(work), (*messages, *chains.values()), tuple(unknown))


def _collective(found) -> str | None:
  kind = found.opcode.removesuffix("-start")
  return kind if kind in COLLECTIVES else None


def _is_chained(found):
  return "async_collective_fusion_config" in found.attributes


def _executed(program, name, count, unknown) -> Iterator[tuple]:
  """(computation, instruction, how often) of all that is run for itself."""
  for found in program.computations[name].values():
    if found.opcode == "while":
      times = hlo.trips(program, found, name)
      if times is None:
        unknown.append(found.name)
      inner = count * (1 if times is None else times)
      yield from _executed(program, found.called("body"), inner, unknown)
    elif found.opcode == "conditional":
      branches = [list(_executed(program, b, count, unknown)) for b in _branches(found)]
      yield from max(branches, key=lambda rows: _operations(program, rows))
    elif found.opcode in ("call", "async-start"):
      inner = found.called("to_apply") or found.called("calls")
      yield from _executed(program, inner, count, unknown)
    elif found.opcode not in FREE and not found.opcode.endswith(("-done", "-update")):
      yield name, _waited_for(program, name, found), count


def _waited_for(program, where, found):
  """Of a fusion that is started and waited for elsewhere, the fusion."""
  if found.opcode != "fusion-start":
    return found
  # ((operands), results, context)
  here = program.computations[where]
  root = _root(program.computations[found.called("calls")])
  first = sum(len(here[name].shape) for name in found.operands)
  count = len(root.operands) if root.opcode == "tuple" else 1
  shape = found.shape[first : first + count]
  return dataclasses.replace(found, opcode="fusion", shape=shape)


def _operations(program, rows):
  """(of products, instructions): by which the dearest of some branches is found."""
  total = 0.0
  for where, found, count in rows:
    for inside, part in _within(program, where, found):
      total += count * sum(_flops(program.computations[inside], part).values())
  return total, len(rows)


def _branches(found):
  listed = re.search(r"branch_computations=\{([^}]*)\}", found.attributes)
  if listed:
    return [name.strip().lstrip("%") for name in listed[1].split(",")]
  return [found.called("true_computation"), found.called("false_computation")]


def _within(program, where, found) -> Iterator[tuple]:
  """(computation, instruction) of `found`, and of all that is fused into it."""
  yield where, found
  if found.opcode == "fusion":
    inner = found.called("calls")
    for part in program.computations[inner].values():
      yield from _within(program, inner, part)


def _message(here, found, kind, count, devices):
  group = hlo.group_size(found, devices)
  total = sum(_size(here[name]) for name in found.operands if name in here)
  return Message(kind, count, total * (group if kind == "all-gather" else 1), group)


def _size(found):
  return sum(a.size * hlo.BITS.get(a.dtype, 8) / 8 for a in found.shape)


# --- Arithmetic ------------------------------------------------------------------


def precision(dtype: str, attributes: str) -> str:
  """How a product is computed: "half", "single", or "single_high" in float32 proper.

  "single" is what an accelerator does with float32 unless asked for more: TF32 on a
  GPU, one pass of bfloat16 on a TPU.
  """
  if dtype in ("f64", "c128"):
    return "double"
  if dtype in ("f32", "c64"):
    asked = re.search(r"operand_precision=\{([^}]*)\}", attributes)
    high = asked and any(p in asked[1] for p in ("high", "highest"))
    return "single_high" if high else "single"
  return "half"


def _flops(here, found) -> dict[str, float]:
  """{precision: operations} of one instruction by itself."""
  if found.opcode == "dot":
    left = here[found.operands[0]].shape[0]
    axes = found.braces("lhs_contracting_dims")
    number = 2 * found.shape[0].size * math.prod(left.dims[i] for i in axes)
  elif found.opcode == "convolution":
    left = here[found.operands[0]].shape[0]
    number = _convolution(here, found)
  elif found.opcode == "custom-call":
    left, number = _called(here, found)
  else:
    return {}
  return {precision(left.dtype, found.attributes): float(number)} if number else {}


def _convolution(here, found):
  """As XLA counts it: only where the window is on the input, of which a TPU makes use
  to write products of many matrices as one convolution."""
  left, right = (here[name].shape[0].dims for name in found.operands[:2])
  said = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", found.attributes)
  lhs, rhs, out = said[1], said[2], said[3]
  spatial = sorted(c for c in lhs if c.isdigit())
  pairs = 1
  for axis, win in zip(spatial, hlo.window(found, len(spatial)), strict=True):
    pairs *= _valid(
      left[lhs.index(axis)],
      found.shape[0].dims[out.index(axis)],
      **win,
    )
  dims = found.shape[0].dims
  return 2 * dims[out.index("b")] * dims[out.index("f")] * right[rhs.index("i")] * pairs


@functools.lru_cache(maxsize=10_000)
def _valid(size_in, size_out, *, size, stride, lhs_dilate, rhs_dilate, pad_low):
  """Pairs of a place of the output and one of the window that meet an input."""
  place = np.arange(size_out)[:, None] * stride
  place = place + np.arange(size)[None, :] * rhs_dilate - pad_low
  inside = (place >= 0) & (place <= (size_in - 1) * lhs_dilate)
  return int(np.count_nonzero(inside & (place % lhs_dilate == 0)))


def _called(here, found):
  """(left operand, operations) of a library's product: cuBLAS, cuDNN's attention."""
  target = re.search(r'custom_call_target="([^"]*)"', found.attributes)
  target = target[1] if target else ""
  if not found.operands or found.operands[0] not in here:
    return None, 0
  left = here[found.operands[0]].shape[0]
  out = found.shape[0]
  if target.startswith("__cublas$"):
    axes = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', found.attributes)
    axes = [int(a) for a in axes[1].replace('"', "").split(",") if a]
    return left, 2 * out.size * math.prod(left.dims[i] for i in axes)
  if target.startswith("__cudnn$fmha"):
    weights = re.search(
      r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*(\[[^\]]*\])',
      found.attributes,
    )
    keys = int(json.loads(weights[1])[-1])
    # Two products; backward five, of which one is made again.
    times = 10 if "Backward" in target else 4
    return left, times * left.size * keys
  if target.startswith("__onednn$matmul"):
    return left, 2 * out.size * left.dims[-1]
  return left, 0


# --- Main memory -----------------------------------------------------------------


def _bytes(program, here, found):
  """What one run reads and writes of main memory."""
  if found.opcode == "custom-call" and any(t in found.attributes for t in FREE_CALLS):
    return 0.0
  if found.opcode == "fusion":
    inner = program.computations[found.called("calls")]
    return _fusion_bytes(program, inner, here, found)
  if found.opcode in SLICES:
    return 2 * _main(found.shape)
  if found.opcode == "dynamic-update-slice":
    return 2 * _main(here[found.operands[1]].shape)
  if found.opcode == "slice-start":
    # ((operand), result, context).
    whole, part = found.shape[:2]
    return part.bytes * (whole.space == 0) + _main([part])
  if found.opcode.endswith("-start"):
    # (operands, results, context): the operands are there too.
    return _main(found.shape)
  return _main(found.shape) + sum(_main(here[n].shape) for n in found.operands)


def _main(shape: Sequence[hlo.Array]):
  return sum(array.bytes for array in shape if array.space == 0)


def _fusion_bytes(program, inner, here, found):
  """Of a stacked array that a loop slices, only the slice; so with what it updates."""
  # What a chained collective sends and receives is handed through all its fusions.
  passed = {
    array.dims
    for part in inner.values()
    if _collective(part) and _is_chained(part)
    for name in (part.name, *part.operands)
    for array in inner[name].shape
  }
  users = _users(inner)
  total = 0.0
  for part in inner.values():
    if part.opcode == "parameter":
      outside = here[found.operands[int(part.literal)]]
      main = outside.shape and outside.shape[0].space == 0
      if main and outside.shape[0].dims not in passed:
        whole = _main(outside.shape)
        total += min(whole, _read(program, part.name, users, whole))
  root = _root(inner)
  made = [inner[n] for n in root.operands] if root.opcode == "tuple" else [root]
  for part, array in zip(made, found.shape, strict=False):
    if array.space == 0 and array.dims not in passed:
      total += _written(program, inner, part, array)
  return total


def _users(inner):
  """{name: [(instruction, place among its operands)]} of a computation."""
  users = collections.defaultdict(list)
  for part in inner.values():
    for i, name in enumerate(part.operands):
      users[name].append((part, i))
  return users


def _root(inner):
  return next(part for part in inner.values() if part.root)


RENAMES = ("bitcast", "reshape", "copy", "convert")


def _read(program, name, users, whole):
  """Bytes read of a parameter of `whole` bytes, looking through what renames it, and
  into fusions within."""
  total = 0.0
  for part, place in users[name]:
    if part.opcode in RENAMES:
      total += _read(program, part.name, users, whole)
    elif part.opcode in SLICES and place == 0:
      total += _size(part)
    elif part.opcode == "dynamic-update-slice" and place == 0:
      total += 0.0  # In place.
    elif part.opcode == "fusion":
      inner = program.computations[part.called("calls")]
      inside = next(
        p.name
        for p in inner.values()
        if p.opcode == "parameter" and int(p.literal) == place
      )
      total += _read(program, inside, _users(inner), whole)
    else:
      total += whole
  return total


def _written(program, inner, part, array):
  """Bytes written of an array that a fusion makes."""
  while part.operands and part.opcode in (*RENAMES, "fusion"):
    if part.opcode == "fusion":
      inner = program.computations[part.called("calls")]
      part = _root(inner)
    else:
      part = inner[part.operands[0]]
  if part.opcode == "dynamic-update-slice":
    return _size(inner[part.operands[1]])
  return array.bytes
