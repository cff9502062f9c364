"""Memory and time of the contrastive loss and its gradient against the batch size.

  python -m vlp_jax.bench contrastive --devices=8 --out=runs/bench/contrastive.json

`plain` makes the matrix of similarities and leaves its place to the partitioner;
`gathered` gathers all columns on every device, which makes its rows of the matrix (as
open_clip's --local-loss --gather-with-grad); `ring` is `ops/ring.py`. Softmax both
ways, float32. Each measurement has a process of its own. Memory is what the compiler
plans beside arguments and results, on one device; a peak is the device's own count, or
on CPUs, which have none, of the process with all its devices. Beyond --most-run the
loss is compiled and not run, beyond --most-bytes not larger ones of the same kind.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from matplotlib import figure
import numpy as np

from vlp_jax.ops import contrastive
from vlp_jax.ops import ring as ring_lib

AXES = ("data", "fsdp")
KINDS = ("plain", "gathered", "ring")
COLORS = {"plain": "#c2410c", "gathered": "#7a5195", "ring": "#2457a6"}
MODULE = "vlp_jax.bench.contrastive"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Measures, prints a JSON object, and stores it with a table and a plot beside it."""
  options = _parser().parse_args(argv)
  if options.one:
    print(json.dumps(measure(options)))
    return {}
  rows = []
  for kind in options.kinds.split(","):
    if kind not in KINDS:
      raise ValueError(f"--kinds={kind}: there are {', '.join(KINDS)}.")
    size = options.least
    while size <= options.most:
      row = _in_process(kind, size, options)
      rows.append(row)
      print(json.dumps(row), file=sys.stderr, flush=True)
      if "error" in row or row["temporary_bytes"] > options.most_bytes:
        break
      size *= options.factor
  found = dict(
    benchmark="contrastive",
    width=options.width,
    tile=options.tile,
    devices=rows[0].get("devices"),
    device=rows[0].get("device"),
    jax=jax.__version__,
    rows=rows,
  )
  path = pathlib.Path(options.out)
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(found, indent=2)
  path.write_text(text + "\n", "utf-8")
  path.with_suffix(".md").write_text(table(rows), "utf-8")
  plot(rows, path.with_suffix(".png"))
  print(text)
  print(table(rows), file=sys.stderr)
  return found


def _parser():
  parser = argparse.ArgumentParser(
    prog="vlp-jax bench contrastive",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--least", type=int, default=1024, help="smallest batch")
  add("--most", type=int, default=4_194_304, help="largest batch")
  add("--factor", type=int, default=4, help="from one batch to the next")
  add("--most-run", type=int, default=16_384, help="largest batch that is run")
  add("--most-bytes", type=float, default=8e10, help="of a device; see above")
  add("--width", type=int, default=256, help="of the embeddings")
  add("--tile", type=int, default=1024, help="of the ring")
  add("--devices", type=int, default=8, help="CPU devices, where there is no other")
  add("--repeats", type=int, default=3, help="of which the best time is taken")
  add("--kinds", default=",".join(KINDS), help="separated by commas")
  add("--out", default="runs/bench/contrastive.json", help="of the results")
  add("--one", default="", help=argparse.SUPPRESS)
  add("--size", type=int, default=0, help=argparse.SUPPRESS)
  return parser


def _in_process(kind, size, options):
  """The row of one measurement, made by a process whose memory is its own."""
  told = ("width", "tile", "devices", "repeats", "most_run")
  flags = [f"--{k.replace('_', '-')}={getattr(options, k)}" for k in told]
  run = [sys.executable, "-m", MODULE, f"--one={kind}", f"--size={size}", *flags]
  done = subprocess.run(run, capture_output=True, text=True, check=False)
  if done.returncode:
    last = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    return dict(kind=kind, batch=size, error=last[-1][:300])
  return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """One kind at one batch size, in this process."""
  kind, size, width = options.one, options.size, options.width
  jax.config.update("jax_num_cpu_devices", options.devices)
  count = len(jax.devices())
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((count, 1), AXES, axis_types=auto)
  place = jax.sharding.NamedSharding(mesh, PartitionSpec(AXES))
  z = jax.ShapeDtypeStruct((size, width), np.float32, sharding=place)
  ids = jax.ShapeDtypeStruct((size,), np.int32, sharding=place)
  loss = loss_of(kind, tile=options.tile)
  row = dict(kind=kind, batch=size, devices=count, device=jax.devices()[0].device_kind)
  with jax.set_mesh(mesh):
    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(z, z, ids).compile()
    row["compile_seconds"] = round(time.perf_counter() - start, 2)
    memory = step.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes
    row["argument_bytes"] = memory.argument_size_in_bytes
    if size > options.most_run:
      return row
    given = [_unit(i, size, width, place) for i in range(2)]
    given.append(jax.device_put(np.arange(size, dtype=np.int32), place))
    seconds = []
    for _ in range(options.repeats + 1):
      start = time.perf_counter()
      jax.block_until_ready(step(*given))
      seconds.append(time.perf_counter() - start)
  # The first warms up, and counts where it is the only one.
  row["seconds"] = round(min(seconds[1:] or seconds), 4)
  stats = jax.devices()[0].memory_stats()
  if stats:
    row["peak_bytes"] = stats["peak_bytes_in_use"]
  else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["peak_process_bytes"] = peak * (1 if sys.platform == "darwin" else 1024)
  return row


def _unit(seed, size, width, place):
  x = np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32)
  return jax.device_put(x / np.linalg.norm(x, axis=1, keepdims=True), place)


def loss_of(kind: str, *, tile: int, scale: float = 50.0) -> Callable[..., jax.Array]:
  """`loss(zimg, ztxt, ids)` of CLIP, the mean over both ways, made in one manner."""

  def plain(rows, columns, ids):
    targets = contrastive.positives(ids, ids)
    return contrastive.cross_entropy(scale * rows @ columns.T, targets)

  def gathered(rows, columns, ids):
    def local(rows, columns, ids):
      gather = lambda x: jax.lax.all_gather(x, AXES, tiled=True)
      targets = contrastive.positives(ids, gather(ids))
      logits = scale * rows @ gather(columns).T
      return contrastive.cross_entropy(logits, targets)

    split = PartitionSpec(AXES)
    specs = dict(in_specs=(split,) * 3, out_specs=split, check_vma=False)
    return jax.shard_map(local, **specs)(rows, columns, ids)

  def ring(rows, columns, ids):
    how = ring_lib.Ring(AXES, tile)
    return ring_lib.softmax(scale * rows, ids, ((columns, ids),), ring=how)[0]

  one = dict(plain=plain, gathered=gathered, ring=ring)[kind]
  return lambda zimg, ztxt, ids: jnp.mean(one(zimg, ztxt, ids) + one(ztxt, zimg, ids))


# --- What is shown -------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The measurements in Markdown, a line for each batch size."""
  kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
  at = {(row["kind"], row["batch"]): row for row in rows}
  columns = (
    ("temporary_bytes", "MB planned", 1e6),
    ("peak_bytes", "MB of a device", 1e6),
    ("peak_process_bytes", "MB of the process", 1e6),
    ("seconds", "s", 1),
  )
  columns = [c for c in columns if any(c[0] in row for row in rows)]
  titles = [f"{kind}: {what}" for _, what, _ in columns for kind in kinds]
  lines = ["| batch | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
  for size in sorted({row["batch"] for row in rows}):
    cells = []
    for key, _, unit in columns:
      values = [at.get((kind, size), {}).get(key) for kind in kinds]
      cells += [
        "–" if v is None else f"{v / unit:,.{_digits(v / unit)}f}" for v in values
      ]
    lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def _digits(value):
  """Behind the point, so that there are three in all."""
  return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Memory and time over the batch size, both axes logarithmic."""
  made = figure.Figure(figsize=(9, 3.6), layout="constrained")
  panels = (("temporary_bytes", 1e6, "MB a device"), ("seconds", 1, "seconds"))
  for i, (key, unit, title) in enumerate(panels):
    axes = made.add_subplot(1, 2, i + 1)
    for kind in KINDS:
      points = [
        (r["batch"], r[key] / unit) for r in rows if r["kind"] == kind and key in r
      ]
      if points:
        axes.plot(*zip(*points, strict=True), "o-", label=kind, color=COLORS[kind])
    # By default batches are powers of two; ticks between those of ten would overlap.
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("global batch")
    axes.set_title(title)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
  made.savefig(path, dpi=120)


if __name__ == "__main__":
  main()
