"""The text of a compiled program: instructions, shapes, loops.

`Compiled.as_text()` of XLA, in the forms that its TPU, GPU and CPU compilers write.
What the instructions cost is `cost.py`'s to say.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re

BITS = {
  "pred": 8,
  "s4": 4,
  "u4": 4,
  "s8": 8,
  "u8": 8,
  "s16": 16,
  "u16": 16,
  "s32": 32,
  "u32": 32,
  "s64": 64,
  "u64": 64,
  "f16": 16,
  "bf16": 16,
  "f32": 32,
  "f64": 64,
  "c64": 64,
  "c128": 128,
}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Array:
  """Shape of an array.

  Attributes:
    dtype: as XLA writes it. dims: sizes.
    bytes: that it takes, with the padding of its tiles.
    space: 0 is the device's main memory; others are on-chip, or the host's.
  """

  dtype: str
  dims: tuple[int, ...]
  bytes: float
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = shape opcode(operands), attributes`.

  Attributes:
    shape: the arrays that it makes, one unless it is a tuple.
    operands: names. literal: what stands in the parentheses. attributes: the rest.
  """

  name: str
  opcode: str
  shape: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  root: bool

  def called(self, key: str) -> str | None:
    """The computation that an attribute names: calls, body, condition, to_apply."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found and found[1]

  def braces(self, key: str) -> tuple[int, ...]:
    """Numbers of an attribute `key={1,2}`; () where there is none."""
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
    return tuple(map(int, found[1].split(","))) if found and found[1] else ()


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, each {name: instruction} in order; `entry` is run."""

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str


def parse(text: str) -> Program:
  """A program of `Compiled.as_text()`.

  Raises:
    ValueError: it has no entry.
  """
  computations, entry, here = {}, None, None
  for line in text.splitlines():
    if here is None:
      head = _HEAD.match(line)
      if head:
        here = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      here = None
    else:
      found = _instruction(line)
      if found:
        here[found.name] = found
  if entry is None:
    raise ValueError("this is no text of a compiled program: it has no ENTRY.")
  return Program(computations, entry)


def _instruction(line):
  named = _NAME.match(line)
  if not named:
    return None
  line = re.sub(r"/\*.*?\*/", "", line)
  start = _NAME.match(line).end()
  end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
  shape = arrays(line[start:end])
  open_at = line.index("(", end)
  close_at = _closing(line, open_at)
  literal = line[open_at + 1 : close_at - 1]
  return Instruction(
    name=named[2],
    opcode=line[end:open_at].strip(),
    shape=shape,
    operands=tuple(_OPERAND.findall(literal)),
    literal=literal,
    attributes=line[close_at:],
    root=bool(named[1]),
  )


def _closing(line, start):
  """Behind the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(line, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  raise ValueError(f"unbalanced parentheses: {line[:200]}")


@functools.lru_cache(maxsize=100_000)
def arrays(text: str) -> tuple[Array, ...]:
  """All arrays of a shape's text: of "f32[2]" one, of a tuple several."""
  return tuple(_array(*found.groups()) for found in _ARRAY.finditer(text))


def _array(dtype, dims, layout):
  # A bounded dynamic size is written "<=8".
  sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
  layout = layout or ""
  order, _, more = layout.partition(":")
  padded = list(sizes)
  tile = _TILE.search(more)
  if tile and sizes:
    minor = [int(i) for i in order.split(",") if i]
    for step, axis in zip(reversed(tile[1].split(",")), minor, strict=False):
      padded[axis] = -(-sizes[axis] // int(step)) * int(step)
  bits = BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
  space = _SPACE.search(more)
  return Array(
    dtype, sizes, math.prod(padded) * bits / 8, int(space[1]) if space else 0
  )


def trips(program: Program, loop: Instruction, where: str) -> int | None:
  """How often a while loop of computation `where` runs; None: nobody can say.

  XLA says so (known_trip_count), or the condition compares a counter that starts from a
  constant and grows by one, as those of `jax.lax.scan` and `fori_loop` do.
  """
  said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if said:
    return int(said[1])
  condition = program.computations[loop.called("condition")]
  root = next(i for i in condition.values() if i.root)
  # CPU and GPU wrap the comparison into a fusion or a call.
  inner = root.called("calls") or root.called("to_apply")
  compare, names = root, root.operands
  if inner:
    body = program.computations[inner]
    compare = next(i for i in body.values() if i.root)
    passed = [_argument(body, name, root.operands) for name in compare.operands]
    names = tuple(name or inside for name, inside in passed)
    condition = {**body, **condition}
  if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
    return None
  initial = program.computations[where][loop.operands[0]]
  ends = [_constant(program, condition, n, where, initial) for n in names]
  if len(ends) != 2 or None in ends:
    return None
  return max(0, ends[1] - ends[0])


def _argument(body, name, operands):
  """(what is passed as the parameter `name`, or None; the name inside)."""
  found = body[name]
  if found.opcode == "parameter":
    return operands[int(found.literal)], name
  return None, name


def _constant(program, condition, name, where, initial):
  """The whole number that a value of the condition has at first."""
  found = condition.get(name)
  if found is None:
    return None
  if found.opcode in ("copy", "bitcast", "convert"):
    return _constant(program, condition, found.operands[0], where, initial)
  if found.opcode == "constant":
    return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
  if found.opcode != "get-tuple-element" or initial.opcode != "tuple":
    return None
  index = int(re.search(r"index=(\d+)", found.attributes)[1])
  outside = program.computations[where]
  return _constant(program, outside, initial.operands[index], where, initial)


def group_size(instruction: Instruction, devices: int) -> int:
  """How many devices take part in one group of a collective."""
  text = instruction.attributes
  if "source_target_pairs=" in text:
    return 2
  found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
  if found:
    return int(found[2])
  found = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
  if found:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    # An axis, or a part of one: 'x' or 'x':(2)4.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  found = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
  return len(found[1].split(",")) if found and found[1] else devices


def window(instruction: Instruction, spatial: int) -> Sequence[Mapping[str, int]]:
  """For each spatial axis of a convolution: size, stride, pad_low, dilations."""
  found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  said = dict(part.split("=") for part in found[1].split()) if found else {}
  ones = "x".join(["1"] * spatial)
  out = []
  for i in range(spatial):
    pads = said.get("pad", "x".join(["0_0"] * spatial)).split("x")[i].split("_")
    numbers = {
      key: int(said.get(key, ones).split("x")[i])
      for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    }
    out.append(numbers | dict(pad_low=int(pads[0])))
  return out
