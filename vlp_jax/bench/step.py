"""Times the train step of a config on synthetic data; with --against, beside PyTorch.

  python -m vlp_jax.bench step --config=FILE[:arg] [--config.a.b=value …]
    [--batch_size=N] [--repeats=N] [--vocabulary=N] [--loop] [--out=FILE]
    [--real] [--against=NAME [--python=FILE] [--torch_compile]]
  python -m vlp_jax.bench step --suite=gpu|tiny [--limit=SECONDS]

It needs no files and no TensorFlow: the size of the vocabulary is that of the config's
card; with --real it reads the data of the config, and tells the share of waiting for
them. --against is one of open_clip, hf_blip, hf_vilt, albef_nn, clip_nn (see
bench/rivals/); the two take turns in one run, and "ratio" is our examples a second over
theirs. --loop adds what the trainer's loop costs beside the step itself, --profile the
kernels that a device spent its time on.
"""

import argparse
from collections.abc import Sequence
import contextlib
import pathlib
import resource
import sys
import time
from typing import Any

from vlp_jax import cli
from vlp_jax.bench import report
from vlp_jax.bench import timing

REPEATS = 8


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, measures, prints and stores."""
  rest, overrides = cli.split_overrides(sys.argv[1:] if argv is None else argv)
  args = _parser().parse_args(rest)
  with cli.user_errors():
    if args.suite is not None:
      # Here: the suite imports this file.
      from vlp_jax.bench import suite

      suite.run(args.suite, argv, limit=args.limit, python=args.python, out=args.out)
      return
    if args.config is None:
      raise ValueError("bench step: say --config=FILE[:arg], or --suite=gpu.")
    results = measure(
      args.config,
      overrides,
      batch_size=args.batch_size,
      vocabulary=args.vocabulary,
      repeats=args.repeats,
      against=args.against,
      python=args.python,
      torch_compile=args.torch_compile,
      loop=args.loop,
      real=args.real,
      steps=args.steps,
      profile=args.profile,
    )
    report.tell("step", argv, results, args.out)


def _parser():
  parser = argparse.ArgumentParser(
    prog="python -m vlp_jax.bench step",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--config", metavar="FILE[:arg]")
  add("--batch_size", type=int, help="instead of the config's")
  add("--vocabulary", type=int, help="words; default: as the config's card says")
  add("--repeats", type=int, default=REPEATS, help="timed steps")
  add("--steps", type=int, help="of a repeat; default: 1 on CPUs, else 5")
  add("--against", metavar="NAME", help="a rival of bench/rivals/")
  add("--python", metavar="FILE", help="interpreter that has the rival's packages")
  add("--torch_compile", action="store_true", help="the rival by torch.compile")
  add("--real", action="store_true", help="batches of the config's own data")
  add("--loop", action="store_true", help="the cost of the trainer's loop too")
  add("--profile", action="store_true", help="the kernels that take the time")
  add("--suite", choices=("gpu", "tiny"), help="the prepared list of one machine")
  add("--limit", type=float, default=540.0, help="seconds that a suite may take")
  add("--out", type=pathlib.Path, help="file for the JSON")
  return parser


def measure(
  spec: str,
  overrides: Sequence[str] = (),
  *,
  batch_size: int | None = None,
  vocabulary: int | None = None,
  repeats: int = REPEATS,
  against: str | None = None,
  python: str | None = None,
  torch_compile: bool = False,
  loop: bool = False,
  real: bool = False,
  steps: int | None = None,
  profile: bool = False,
) -> dict[str, Any]:
  """The numbers of one config, see the module's text.

  Raises:
    ValueError, FileNotFoundError: the config or the rival is not as it must be.
  """
  if repeats < 1:
    raise ValueError(f"bench step: --repeats={repeats}: want 1 or more.")
  start = time.perf_counter()
  # Here, not above: --help and a wrong option need not wait for jax.
  import jax

  from vlp_jax import batch as batch_lib
  from vlp_jax import job as job_lib
  from vlp_jax.bench import peak
  from vlp_jax.bench import program
  from vlp_jax.ops import tree
  from vlp_jax.planning import flops
  from vlp_jax.training import sharding

  with contextlib.ExitStack() as stack:
    feed = None
    if real:
      # Here: it needs TensorFlow, and the rest does not.
      from vlp_jax.bench import feed as feed_lib

      given = program.given(spec, overrides, batch_size=batch_size)
      job, feed = feed_lib.open_feed(spec, given, stack)
    else:
      job = program.load(spec, overrides, batch_size=batch_size, vocabulary=vocabulary)
    device = job.mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    steps = steps or (1 if on_cpu else 5)
    rival = None
    if against is not None:
      from vlp_jax.bench import rivals

      rival = rivals.start(
        against, job, python=python, compiled=torch_compile, steps=steps
      )
      stack.callback(rival.close)
      if on_cpu:
        # What is timed of our compiling must not share the cores with it.
        _ = rival.about
    vocab = job.pretrainer.model.text.vocab
    dtype = job.pretrainer.model.dtype
    model_flops = flops.of_step(job, vocab)
    built = time.perf_counter()
    lowered = program.lower(job)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    state = jax.block_until_ready(job_lib.fresh_state(job))
    made = time.perf_counter()
    batch = sharding.put_batch(batch_lib.noise(job.batch, vocab), job.mesh)

    def run(times):
      nonlocal state
      for _ in range(times):
        state, metrics = compiled(state, batch if feed is None else next(feed))
      jax.block_until_ready((state.step, metrics["loss"]))

    first = time.perf_counter()
    run(1)
    first = time.perf_counter() - first
    ours = timing.here(lambda: run(steps), times=steps)
    contenders: dict[str, timing.Round] = {"step": ours}
    published = peak.published(device.device_kind, dtype)
    product, product_flops = peak.matmul(dtype)
    contenders["matmul"] = timing.here(product)
    if rival is not None:
      contenders[against] = rival
    for once in contenders.values():
      once()
    waited = feed.seconds if feed is not None else 0.0
    # Steps follow steps in a run, and so they do here.
    lead = 1 if on_cpu else 0
    times = timing.side_by_side(contenders, repeats=repeats, warmup=0, lead=lead)
    traced = None
    if profile:
      from vlp_jax.bench import profile as profile_lib

      traced = profile_lib.kernels(lambda: run(steps), steps)
  size = job.config.batch_size
  rate = product_flops / times["matmul"].best
  top = published if published is not None else rate
  # Devices that a CPU pretends to have share its cores.
  top *= 1 if on_cpu else job.mesh.size
  results = {
    "config": spec,
    "overrides": list(overrides),
    "device": {
      "kind": device.device_kind,
      "platform": device.platform,
      "count": job.mesh.size,
    },
    "dtype": dtype,
    "batch_size": size,
    "parameters": tree.size(job.abstract_state.params),
    "model_flops_per_step": model_flops,
    "peak": {
      "flops_per_second": top,
      "source": "published" if published is not None else "measured",
      "matmul_flops_per_second": rate,
      "matmul_flops_per_cpu_second": product_flops / times["matmul"].least_cpu,
    },
    **rates(times["step"], size, model_flops, top),
    "memory": memory(compiled, device),
    "seconds": {
      "import_and_build": built - start,
      "trace_and_lower": lowered_at - built,
      "compile": done - lowered_at,
      "initial_state": made - done,
      "first_step": first,
    },
  }
  if against is not None:
    theirs = rates(times[against], size, model_flops, top)
    results["against"] = {"name": against, **rival.about, **theirs}
    results["ratio"] = {
      "best": times[against].best / times["step"].best,
      "median": times[against].median / times["step"].median,
      "cpu": times[against].least_cpu / times["step"].least_cpu,
    }
  if feed is not None:
    spent = steps * sum(times["step"].wall)
    results["input_wait"] = (feed.seconds - waited) / spent
  if traced is not None:
    results["profile"] = traced
  if loop:
    from vlp_jax.bench import loop as loop_lib

    results["loop"] = loop_lib.overhead(times["step"].median)
  return results


def rates(
  times: timing.Times, batch_size: int, model_flops: int, top: float
) -> dict[str, Any]:
  """Examples a second and utilisation of the best and of the median step; all steps."""
  return {
    "step_ms": {
      "best": 1e3 * times.best,
      "median": 1e3 * times.median,
      "all": [1e3 * each for each in times.wall],
    },
    # Of all threads: on a busy machine it says more of a step than the clock does.
    "cpu_ms": 1e3 * times.least_cpu,
    "examples_per_second": {
      "best": batch_size / times.best,
      "median": batch_size / times.median,
    },
    "mfu": {
      "best": model_flops / times.best / top,
      "median": model_flops / times.median / top,
    },
    "repeats": len(times.wall),
  }


def memory(compiled: Any, device: Any) -> dict[str, int | None]:
  """Bytes: what XLA planned for the step, and the most that was in use."""
  plan = compiled.memory_analysis()
  used = (device.memory_stats() or {}).get("peak_bytes_in_use")
  if used is None and device.platform == "cpu":
    # Linux says kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {
    "arguments": plan.argument_size_in_bytes,
    "temporaries": plan.temp_size_in_bytes,
    "peak": used,
  }


if __name__ == "__main__":
  main()
