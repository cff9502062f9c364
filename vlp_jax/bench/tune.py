"""What a setting gives: the step of a config, beside itself with one thing changed.

  python -m vlp_jax.bench tune --config=FILE[:arg] [--config.a.b=value …]
    [--try=CHANGE …] [--batch_size=N] [--repeats=N] [--vocabulary=N] [--out=FILE]
    [--topology=h200:1 [--exact]]

A CHANGE is one thing, or several with spaces between: --config.a.b=value over the
config; xla_…=value, an option of the compiler; donate=False, by which the state's
memory is not used again. Without --try it is the list below. Each change takes turns
with the config's own step; "time" is that of an example over what the config's own
takes. With --topology nothing runs: both are compiled for hardware that is not here, as
`vlp-jax plan` does, and the times are its lower bounds.
"""

import argparse
import ast
from collections.abc import Mapping, Sequence
import dataclasses
import gc
import pathlib
import sys
import time
from typing import Any

from vlp_jax import cli
from vlp_jax.bench import report
from vlp_jax.bench import timing

REPEATS = 4
# Without --try: {what it is: the change}; those of an objective where there is one.
CHANGES = {
  "attention by XLA": "--config.model.backend='xla'",
  "attention as plain arrays": "--config.model.backend='einsum'",
  "image layers unrolled": "--config.model.image.unroll={layers}",
  "all but products made twice": "--config.model.remat='dots'",
  "all made twice": "--config.model.remat='full'",
  "logits of masked words alone": "--config.objectives.mlm.max_masked={masked}",
  "the state not donated": "donate=False",
}


@dataclasses.dataclass(frozen=True)
class Change:
  """What is done to a config's step.

  Attributes:
    name: as the user said it, or of CHANGES. overrides: "--config.a.b=value".
    options: of the compiler.
    donate: whether the step may write its state into what it was given.
  """

  name: str
  overrides: tuple[str, ...] = ()
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  donate: bool = True


def parse(said: str) -> Change:
  """The change that a --try names.

  Raises:
    ValueError: it names none, or something else.
  """
  overrides, options, donate = [], {}, True
  for word in said.split():
    name, equals, value = word.partition("=")
    if not equals or not value:
      raise ValueError(f"bench tune: --try={said!r}: {word!r} is not NAME=VALUE.")
    if name.startswith("--config."):
      overrides.append(word)
    elif name.startswith("xla_"):
      options[name] = _plain(value)
    elif name == "donate" and value in ("True", "False"):
      donate = value == "True"
    else:
      raise ValueError(
        f"bench tune: --try={said!r}: {word!r} is neither --config.a.b=value, nor"
        " xla_OPTION=value, nor donate=False."
      )
  if not (overrides or options or not donate):
    raise ValueError(f"bench tune: --try={said!r} changes nothing.")
  return Change(said, tuple(overrides), options, donate)


def _plain(value):
  try:
    return ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
  except (ValueError, SyntaxError):
    return value


def usual(job: Any) -> list[Change]:
  """Those of CHANGES that the config has the fields for."""
  model, length = job.pretrainer.model, job.config.tokenizer["length"]
  layers = max(getattr(tower, "depth", 1) for tower in (model.image, model.text))
  # A quarter: of 15 % that are drawn hardly ever more.
  known = dict(layers=layers, masked=-(-length // 4))
  there = {
    name: said
    for name, said in CHANGES.items()
    if "objectives" not in said or said.split(".")[2] in job.config.objectives
  }
  return [
    dataclasses.replace(
      parse(said.format(**known)), name=f"{name}: {said}".format(**known)
    )
    for name, said in there.items()
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, measures or plans, prints and stores."""
  rest, overrides = cli.split_overrides(sys.argv[1:] if argv is None else argv)
  args = _parser().parse_args(rest)
  with cli.user_errors():
    if args.repeats < 1:
      raise ValueError(f"bench tune: --repeats={args.repeats}: want 1 or more.")
    changes = [parse(said) for said in args.tried]
    steps = _Here if args.topology is None else _Planned
    results = run(steps(args, overrides), changes, repeats=args.repeats)
    report.tell("tune", argv, results, args.out)


def _parser():
  parser = argparse.ArgumentParser(
    prog="python -m vlp_jax.bench tune",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:arg]")
  add("--batch_size", type=int, help="instead of the config's")
  add("--vocabulary", type=int, help="words; default: as the config's card says")
  add("--try", action="append", default=[], dest="tried", metavar="CHANGE")
  add("--repeats", type=int, default=REPEATS, help="timed steps of each")
  add("--topology", metavar="KIND:SHAPE", help="compiled for it; nothing is run")
  add("--exact", action="store_true", help="of --topology: as training compiles")
  add("--out", type=pathlib.Path, help="file for the JSON")
  return parser


def run(steps: Any, changes: Sequence[Change], *, repeats: int) -> dict[str, Any]:
  """The config's own step, and every change beside it.

  Args:
    steps: where: here, or planned. changes: none: the `usual` ones.
    repeats: timed steps of each, where they run.

  Returns:
    {"config", …, "own": numbers, "changes": {name: numbers and what they are of the
    own}, or {name: {"error"}} of what cannot be had}.
  """
  for change in changes:
    steps.given(change)  # What is said wrong is told before anything is compiled.
  own = steps.make(Change("own"))
  found = {}
  for change in changes or usual(own.job):
    _say(f"{change.name} …")
    try:
      other = steps.make(change)
    except (ValueError, RuntimeError) as error:
      # The config cannot have it, or the compiler; what the user said wrong is raised.
      if changes and not change.options:
        raise
      found[change.name] = {"error": str(error).strip().splitlines()[0]}
      continue
    found[change.name] = steps.beside(own, other, repeats)
    del other
    gc.collect()
    _say(
      "  " + "  ".join(f"{k} {v:.3f}" for k, v in found[change.name]["of_own"].items())
    )
  return steps.about(own) | {"own": own.numbers, "changes": found}


def _say(text):
  print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class _Step:
  """A step that is compiled: its job, its numbers, and what runs it once."""

  job: Any
  numbers: dict[str, Any]
  once: timing.Round | None = None


class _Here:
  """Steps on the devices that are here, on noise, as of `bench step`."""

  def __init__(self, args, overrides):
    from vlp_jax.bench import program

    self._args, self._overrides, self._program = args, overrides, program

  def given(self, change):
    """The job of a change."""
    args = self._args
    return self._program.load(
      args.config,
      [*self._overrides, *change.overrides],
      batch_size=args.batch_size,
      vocabulary=args.vocabulary,
    )

  def about(self, own):
    device = own.job.mesh.devices.flat[0]
    kind = {"kind": device.device_kind, "count": own.job.mesh.size}
    return {"config": self._args.config, "overrides": self._overrides, "device": kind}

  def make(self, change):
    import jax

    from vlp_jax import batch as batch_lib
    from vlp_jax import job as job_lib
    from vlp_jax.training import sharding

    job = self.given(change)
    begun = time.perf_counter()
    step = self._program.lower(job, donate=change.donate)
    step = step.compile(dict(change.options) or None)
    seconds = time.perf_counter() - begun
    said = step.memory_analysis()
    needed = said.argument_size_in_bytes + said.temp_size_in_bytes
    needed += said.output_size_in_bytes - said.alias_size_in_bytes
    state = job_lib.fresh_state(job)
    noise = batch_lib.noise(job.batch, job.pretrainer.model.text.vocab)
    batch = sharding.put_batch(noise, job.mesh)

    def once():
      nonlocal state
      state, metrics = step(state, batch)
      jax.block_until_ready((state.step, metrics["loss"]))

    once()
    numbers = {"compile_seconds": seconds, "memory_bytes": needed}
    return _Step(job, numbers, timing.here(once))

  def beside(self, own, other, repeats):
    platform = own.job.mesh.devices.flat[0].platform
    times = timing.side_by_side(
      {"own": own.once, "other": other.once},
      repeats=repeats,
      warmup=0,
      lead=1 if platform == "cpu" else 0,
    )
    more = other.job.config.batch_size / own.job.config.batch_size
    return other.numbers | {
      "step_ms": {name: [1e3 * x for x in found.wall] for name, found in times.items()},
      "of_own": {
        "time": times["other"].best / times["own"].best / more,
        "time_median": times["other"].median / times["own"].median / more,
        "time_of_processor": times["other"].least_cpu / times["own"].least_cpu / more,
        "memory": other.numbers["memory_bytes"] / own.numbers["memory_bytes"],
      },
    }


class _Planned:
  """Steps compiled for hardware that is not here: what `vlp-jax plan` says of them."""

  def __init__(self, args, overrides):
    from vlp_jax.planning import topology as topology_lib

    topology = topology_lib.parse(args.topology)
    topology_lib.prepare(topology)  # before jax comes
    from vlp_jax.bench import program
    from vlp_jax.planning import hardware
    from vlp_jax.planning import measure
    from vlp_jax.planning import run as run_lib

    self._args, self._overrides, self._program = args, overrides, program
    self._devices = topology_lib.devices(topology)
    chip = hardware.CHIPS.get(topology.kind)
    self._chip = chip or measure.cpu(topology.devices)
    own = program.given(args.config, overrides, batch_size=args.batch_size)
    self._known = run_lib.facts(args.config, own, vocabulary=args.vocabulary)

  def given(self, change):
    """The config of a change."""
    from vlp_jax import config as config_lib

    said = [*self._overrides, *change.overrides]
    args = self._args
    given = self._program.given(args.config, said, batch_size=args.batch_size)
    found = config_lib.run(given)
    self._program.check(found, args.config)
    return found

  def about(self, own):
    del own
    about = {"config": self._args.config, "overrides": self._overrides}
    return about | {"topology": self._args.topology, "exact": self._args.exact}

  def make(self, change):
    from vlp_jax.planning import compiled
    from vlp_jax.planning import roofline
    from vlp_jax.planning import run as run_lib

    job, _ = run_lib.job(self.given(change), self._known, self._devices)
    job = dataclasses.replace(job, turns=None)
    step = self._program.whole(job, donate=change.donate, options=change.options)
    found, _ = compiled.compile(step, job, exact=self._args.exact)
    numbers = {"compile_seconds": found.seconds, "memory_bytes": found.needed}
    if found.cost is not None:
      numbers["step_ms"] = 1e3 * roofline.times(found.cost, self._chip).step
    return _Step(job, numbers)

  def beside(self, own, other, repeats):
    del repeats
    more = other.job.config.batch_size / own.job.config.batch_size
    of_own = {"memory": other.numbers["memory_bytes"] / own.numbers["memory_bytes"]}
    if "step_ms" in own.numbers and "step_ms" in other.numbers:
      of_own["time"] = other.numbers["step_ms"] / own.numbers["step_ms"] / more
    return other.numbers | {"of_own": of_own}


if __name__ == "__main__":
  main()
