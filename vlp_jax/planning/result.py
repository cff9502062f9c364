"""A plan: one run on one kind of hardware, in numbers; as JSON and as text."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

GIB = 2.0**30
DAY = 86_400.0
# Of memory, in the order in which they are shown.
KINDS = (
  "parameters",
  "optimizer",
  "teacher",
  "queues",
  "batch",
  "next batches",
  "activations and temporaries",
  "program",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run would take. Bytes and seconds are of one device.

  Attributes:
    config: the file. overrides: of the command line. topology: of `topology.parse`.
    devices, mesh, batch_size, steps: of the run. parameters: their number.
    note: what the planner chose by itself, and what steps read in turns; or None.
    memory: {kind of `KINDS`: bytes}. needed: of all, at most at once.
    capacity: of the device. usable: of these.
    model_flops: of a step over the whole batch, nothing made twice.
    compiled_flops: of what the compiler made, over all devices; None where it gave up.
    collectives: {kind: {"count", "bytes", "sent"}} of a step and a device.
    seconds: {"compute", "memory", "interconnect", "serial", "step"}; {} where it
      gave up.
    limit: the largest of the first three, or None.
    compile_seconds: that compiling took, by the clock.
    unknown_loops: whose length is not known; they count once.
    advice: what to change where it does not fit.
    versions: of the compilers.
  """

  config: str
  overrides: tuple[str, ...]
  topology: str
  devices: int
  mesh: dict[str, int]
  batch_size: int
  steps: int
  parameters: int
  note: str | None
  memory: dict[str, float]
  needed: float
  capacity: float
  usable: float
  model_flops: float
  compiled_flops: float | None
  collectives: dict[str, dict[str, float]]
  seconds: dict[str, float]
  limit: str | None
  peak: float
  compile_seconds: float
  unknown_loops: tuple[str, ...]
  advice: tuple[str, ...]
  versions: dict[str, str]

  @property
  def fits(self) -> bool:
    return self.needed <= self.usable

  @property
  def rates(self) -> dict[str, float]:
    """Of the run at the predicted time of a step; {} where there is none."""
    if not self.seconds:
      return {}
    step = self.seconds["step"]
    days = self.steps * step / DAY
    return {
      "examples_per_second_per_chip": self.batch_size / step / self.devices,
      "mfu": self.model_flops / self.devices / step / self.peak,
      "days": days,
      "chip_hours": days * 24 * self.devices,
    }

  def json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"fits": self.fits, "rates": self.rates}


def from_json(content: Mapping[str, Any]) -> Plan:
  """The plan that `Plan.json` wrote."""
  names = [field.name for field in dataclasses.fields(Plan)]
  return Plan(**{name: content[name] for name in names})


def render(plan: Plan) -> str:
  """A plan as text."""
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
  said = " ".join([plan.config, *plan.overrides])
  lines = [
    f"{said} on {plan.topology}: "
    + (f"{plan.devices} devices ({mesh})" if mesh else "1 device"),
    f"{plan.parameters / 1e6:.1f} M parameters; {plan.steps:,} steps of"
    f" {plan.batch_size:,} examples",
  ]
  lines += [f"note: {plan.note}"] if plan.note else []
  lines += ["", "Memory of a device"]
  for kind in KINDS:
    if plan.memory.get(kind):
      lines.append(f"  {kind:<28}{_size(plan.memory[kind]):>12}")
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  lines.append(
    f"  {'in all':<28}{_size(plan.needed):>12}  of {_size(plan.usable)} that a program"
    f" may use ({_size(plan.capacity)} in all): {verdict}"
  )
  lines += ["", "Work of a step, over all devices"]
  lines.append(f"  {'model':<28}{_work(plan.model_flops):>12}")
  if plan.compiled_flops is not None:
    ratio = plan.compiled_flops / plan.model_flops if plan.model_flops else 0.0
    lines.append(
      f"  {'compiled':<28}{_work(plan.compiled_flops):>12}  {ratio:.2f} times the"
      " model's"
    )
  if plan.collectives:
    lines += ["", "Messages of a step and a device"]
    for kind, row in plan.collectives.items():
      lines.append(
        f"  {kind:<28}{_size(row['bytes']):>12}  in {row['count']:,.0f} calls,"
        f" {_size(row['sent'])} sent"
      )
  if plan.seconds:
    lines += ["", "Time of a step, ms, at the hardware's peak"]
    names = dict(
      compute="compute",
      memory="main memory",
      interconnect="interconnect",
      serial="each instruction in turn",
    )
    for key, name in names.items():
      mark = "  <- the largest of the three" if key == plan.limit else ""
      lines.append(f"  {name:<28}{plan.seconds[key] * 1e3:>12.2f}{mark}")
    rates = plan.rates
    lines.append(
      f"  {'predicted':<28}{plan.seconds['step'] * 1e3:>12.2f}  MFU"
      f" {100 * rates['mfu']:.0f} %"
    )
    lines += [
      "",
      f"{rates['examples_per_second_per_chip']:,.0f} examples/s a chip; the run of"
      f" {plan.steps:,} steps takes at least {_days(rates['days'])},"
      f" {rates['chip_hours']:,.0f} chip-hours",
    ]
  if plan.unknown_loops:
    lines.append(
      f"note: the lengths of {len(plan.unknown_loops)} loops are not known, and count"
      " once."
    )
  if plan.advice:
    lines += ["", "What to change"]
    lines += [f"  {line}" for line in plan.advice]
  lines += ["", f"compiled in {plan.compile_seconds:.0f} s ({_versions(plan)})"]
  return "\n".join(lines)


def _size(number):
  """Bytes as people read them."""
  for unit, name in ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
    if number >= unit:
      return f"{number / unit:.2f} {name}"
  return f"{number:.0f} B"


def _work(number):
  """Operations as people read them."""
  for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
    if number >= unit:
      return f"{number / unit:.2f} {name}"
  return f"{number / 1e6:.2f} MFLOP"


def _days(days):
  if days >= 1:
    return f"{days:.1f} days"
  for unit, name in ((3600, "hours"), (60, "minutes")):
    if days * DAY >= unit:
      return f"{days * DAY / unit:.1f} {name}"
  return f"{days * DAY:.2g} seconds"


def _versions(plan):
  return ", ".join(f"{name} {value}" for name, value in plan.versions.items())


HEADS = (
  "config", "slice", "batch", "parameters", "GiB a chip", "state", "TFLOP",
  "compiled", "compute", "memory", "interconnect", "step, ms", "limit", "MFU, %",
  "examples/s/chip", "days", "chip-hours", "compile, s",
)  # fmt: skip


def table(plans: Sequence[Plan]) -> str:
  """Plans as a Markdown table, a row each."""
  lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
  for plan in plans:
    state = sum(plan.memory.get(k, 0) for k in KINDS[:4])
    cells = [
      f"`{plan.config}`",
      plan.topology,
      f"{plan.batch_size:,}",
      f"{plan.parameters / 1e6:.0f} M",
      f"{plan.needed / GIB:.1f} of {plan.usable / GIB:.1f}"
      + ("" if plan.fits else ": too much"),
      f"{state / GIB:.1f}",
      f"{plan.model_flops / 1e12:,.0f}",
    ]
    if plan.seconds:
      rates = plan.rates
      cells += [
        f"{plan.compiled_flops / plan.model_flops:.2f} x",
        *(
          f"{plan.seconds[k] * 1e3:.0f}" for k in ("compute", "memory", "interconnect")
        ),
        f"{plan.seconds['step'] * 1e3:.0f}",
        str(plan.limit),
        f"{100 * rates['mfu']:.0f}",
        f"{rates['examples_per_second_per_chip']:,.0f}",
        f"{rates['days']:.2f}",
        f"{rates['chip_hours']:,.0f}",
      ]
    else:
      cells += ["–"] * 10
    lines.append("| " + " | ".join([*cells, f"{plan.compile_seconds:.0f}"]) + " |")
  return "\n".join(lines)
