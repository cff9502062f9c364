"""Compiles a run for hardware that is not here: does it fit, and how long does it take?

vlp-jax plan --config=FILE[:arg] [--topology=KIND:SHAPE] [--config.a.b=value …]
vlp-jax plan --all [NAME …] --out=DIR

The real train step is compiled for the devices of --topology (v5e:16x16, v4:4x4x8,
v5p:4x4x4, v6e:16x16, h100:8, h200:8, a100:16, a100-40gb:8, cpu:8; by default the slice
that the config's card names), on a machine without them. No data and no weights are
needed: the card knows the size of the vocabulary and the number of examples. Times are
what the hardware's peak rates allow; a real step takes longer.
"""

import argparse
from collections.abc import Sequence
from concurrent import futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

from vlp_jax import card as card_lib
from vlp_jax import cli
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax.planning import topology as topology_lib


def main(argv: Sequence[str] | None = None) -> None:
  """Reads the command line, makes the plan, prints it."""
  with cli.user_errors():
    rest, overrides = cli.split_overrides(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(rest)
    if args.traceback:
      os.environ["VLP_JAX_TRACEBACK"] = "1"
    if args.all is not None:
      _plan_all(args, overrides)
      return
    if args.config is None:
      raise ValueError("config: say --config=FILE, or --all.")
    if args.measure:
      _measure(args, overrides)
      return
    name = args.topology or _slice(args.config)
    topology = topology_lib.parse(name)
    config = config_file.load(args.config, overrides)
    run = config_lib.run(config)
    topology_lib.prepare(topology)
    _plan(args, config, run, overrides, topology)


def _parser():
  parser = argparse.ArgumentParser(
    prog="vlp-jax plan",
    usage="vlp-jax plan --config=FILE[:arg] [--topology=KIND:SHAPE]"
    " [--config.a.b=value …] [options]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--config", metavar="FILE[:arg]", help="a file of configs/")
  add(
    "--config.a.b",
    metavar="value",
    help="puts a value over that of the file: --config.batch_size=4096"
    " --config.model.dtype=bfloat16 --config.model.remat=full",
  )
  add("--topology", metavar="KIND:SHAPE", help="hardware; default: the card's slice")
  add("--examples", type=int, metavar="N", help="of an epoch; default: the card's")
  add("--vocabulary", type=int, metavar="N", help="ids; default: the card's")
  add("--json", action="store_true", help="prints JSON")
  add(
    "--fit",
    action="store_true",
    help="tries meshes, remat policies and microbatches, and prints the fastest that"
    " fits; Ctrl-C: the fastest so far",
  )
  add(
    "--limit",
    type=float,
    default=900,
    metavar="SECONDS",
    help="of --fit: after so long what has been found, if anything, has to do (900)",
  )
  add(
    "--measure",
    action="store_true",
    help="runs the step on the devices that are here, and compares",
  )
  add("--steps", type=int, default=5, metavar="N", help="of --measure (5)")
  add(
    "--all",
    nargs="*",
    metavar="NAME",
    help="plans every config that has a card with a slice, or those that are named,"
    " each in a process of its own, and writes a table of all in --out",
  )
  add("--out", type=pathlib.Path, metavar="DIR", help="of --all: plan.md and NAME.json")
  add(
    "--exact",
    action="store_true",
    help="compiles with the compiler's full effort, as training does: slower",
  )
  add("--text", type=pathlib.Path, metavar="FILE", help="keeps the compiled program")
  add(
    "--traceback",
    action="store_true",
    help="shows where an error came from (as VLP_JAX_TRACEBACK=1 does)",
  )
  return parser


def _slice(file):
  """The topology that the config's card names.

  Raises:
    ValueError: it has no card, or its card no slice.
  """
  path = card_lib.of_config(file)
  found = path and card_lib.read(path).slice
  if not found:
    raise ValueError(
      f"plan: {file} has no card that names a slice: say --topology, e.g."
      " --topology=v5e:4x4."
    )
  return found


def _plan(args, config, run, overrides, topology):
  # Here: jax, which must not begin before `topology.prepare`.
  from vlp_jax.planning import hardware
  from vlp_jax.planning import make
  from vlp_jax.planning import measure
  from vlp_jax.planning import result
  from vlp_jax.planning import run as run_lib

  known = run_lib.facts(
    args.config, config, vocabulary=args.vocabulary, examples=args.examples
  )
  devices = topology_lib.devices(topology)
  chip = hardware.CHIPS.get(topology.kind) or measure.cpu(topology.devices)
  if args.fit:
    _fit(args, run, known, overrides, topology, devices, chip)
    return
  plan, _, text = make.plan(
    run,
    known,
    topology,
    devices,
    chip,
    file=args.config,
    overrides=overrides,
    exact=args.exact,
  )
  if args.text is not None:
    args.text.write_text(text, "utf-8")
  print(json.dumps(plan.json(), indent=2) if args.json else result.render(plan))


def _fit(args, run, known, overrides, topology, devices, chip):
  from vlp_jax.planning import fit
  from vlp_jax.planning import kept
  from vlp_jax.planning import make
  from vlp_jax.planning import run as run_lib

  flops = []

  def state_of(config):
    job, _ = run_lib.job(config, known, devices)
    _ = job.layout  # There is one, or it says why not.
    return sum(make.resident(job).values())

  def kept_of(config):
    job, _ = run_lib.job(config, known, devices)
    return kept.of_step(job)

  def plan_of(choice):
    made = functools.partial(
      make.plan,
      choice.of(run),
      known,
      topology,
      devices,
      chip,
      file=args.config,
      overrides=(*overrides, *choice.overrides),
      model_flops=flops[0] if flops else None,
      exact=args.exact,
    )
    plan, _, _ = _apart(made)
    flops.append(plan.model_flops)
    return plan

  def tell(line):
    print(f"[{time.monotonic() - begun:4.0f} s] {line}", file=sys.stderr, flush=True)

  begun = time.monotonic()
  found = fit.search(
    run,
    len(devices),
    state_of=state_of,
    kept_of=kept_of,
    plan_of=plan_of,
    usable=chip.usable,
    tell=tell,
    late=lambda: time.monotonic() - begun > args.limit,
  )
  _tell_found(found, args, topology)
  if found.ended == "interrupted":
    # A compiler is at work in another thread, and does not let itself be stopped.
    sys.stdout.flush()
    os._exit(cli.EXIT_INTERRUPTED)


def _tell_found(found, args, topology):
  """Prints what `fit.search` found, and how far it has looked.

  Raises:
    ValueError: it found nothing.
  """
  from vlp_jax.planning import result

  seconds = sum(plan.compile_seconds for plan in found.compiled.values())
  looked = f"{len(found.compiled)} compiled, in {seconds:.0f} s"
  if found.best is None:
    if found.ended is not None:
      print(
        f"plan: --fit: {found.ended}; nothing that fits yet ({looked})", file=sys.stderr
      )
      return
    raise ValueError(
      f"plan: --fit: {args.config} does not fit {topology.name} in any way that was"
      " tried: take more chips, a smaller batch_size, or model.dtype='bfloat16'."
    )
  choice, plan = found.best
  if args.json:
    print(json.dumps(plan.json() | {"ended": found.ended}, indent=2))
    return
  print(result.render(plan))
  said = "the fastest that fits" if found.ended is None else "the fastest so far"
  print(f"\n{said}: {' '.join(choice.overrides)}")
  print(f"({looked}{'' if found.ended is None else f'; {found.ended}'})")


def _apart(call):
  """The result of a call in a thread of its own.

  Ctrl-C is heard at once, and not when the compiler is done.
  """
  pool = futures.ThreadPoolExecutor(1, "compiling")
  try:
    return pool.submit(call).result()
  finally:
    pool.shutdown(wait=False)


def _measure(args, overrides):
  if args.topology is not None and args.topology.startswith("cpu:"):
    topology_lib.prepare(topology_lib.parse(args.topology))
    topology_lib.devices(topology_lib.parse(args.topology))
  from vlp_jax.planning import hardware
  from vlp_jax.planning import make
  from vlp_jax.planning import measure
  from vlp_jax.planning import result
  from vlp_jax.planning import run as run_lib

  name, devices = measure.here()
  if args.topology not in (None, name):
    raise ValueError(
      f"plan: --measure runs on what is here, which is {name}, not {args.topology}."
    )
  topology = topology_lib.parse(name)
  config = config_file.load(args.config, overrides)
  known = run_lib.facts(
    args.config, config, vocabulary=args.vocabulary, examples=args.examples
  )
  run = config_lib.run(config)
  measure.check(run, args.steps)
  chip = hardware.CHIPS.get(topology.kind) or measure.cpu(topology.devices)
  plan, job, _ = make.plan(
    run,
    known,
    topology,
    devices,
    chip,
    file=args.config,
    overrides=overrides,
    exact=True,
  )
  seen = measure.run(job, steps=args.steps)
  if args.json:
    content = plan.json() | {"measured": measure.as_json(plan, seen)}
    print(json.dumps(content, indent=2))
  else:
    print(result.render(plan))
    print(measure.render(plan, seen))


def _plan_all(args, overrides):
  """One process for each config: a compiler that fails, fails alone."""
  if args.out is None:
    raise ValueError("plan: --all wants --out=DIR.")
  from vlp_jax.planning import result

  configs = card_lib.folder()
  cards = {
    path.stem: card_lib.read(path)
    for path in sorted((configs / "cards").glob("*.toml"))
  }
  unknown = [name for name in args.all if name not in cards]
  if unknown:
    raise ValueError(
      f"plan: --all {' '.join(unknown)}: no such card; there are {', '.join(cards)}."
    )
  args.out.mkdir(parents=True, exist_ok=True)
  failed = []
  for name in args.all or cards:
    where = args.topology or cards[name].slice
    if not where:
      continue
    command = [sys.executable, "-m", "vlp_jax.plan", "--json"]
    command += [f"--config={configs / name}.py", f"--topology={where}", *overrides]
    command += ["--exact"] if args.exact else []
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      failed.append(name)
      print(done.stderr[-2000:], file=sys.stderr, flush=True)
    else:
      (args.out / f"{name}.json").write_text(done.stdout, "utf-8")
    plans = [
      result.from_json(json.loads(path.read_text("utf-8")))
      for path in sorted(args.out.glob("*.json"))
    ]
    (args.out / "plan.md").write_text(result.table(plans) + "\n", "utf-8")
  print(args.out / "plan.md")
  if failed:
    raise ValueError(f"plan: --all: no plan of {', '.join(failed)}: see above.")


if __name__ == "__main__":
  main()
