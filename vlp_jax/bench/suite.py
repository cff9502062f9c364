"""Prepared lists of step benchmarks: all that is asked of one machine, in one call.

"gpu" is for one H200: CLIP, SigLIP, ALBEF and BLIP in bfloat16, each beside a model of
the same sizes by torch.compile (open_clip's, Hugging Face's, or of torch.nn), and ours
with other settings. "tiny" is its shape in seconds on a CPU. Every entry is a process
of its own, so that neither the memory nor a failure of one touches the others; what the
time leaves out is said so.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from vlp_jax import card as card_lib
from vlp_jax.bench import report

# What is not in the rival either: a teacher, its queue and its soft targets.
ALONE = (
  "--config.ema_decay=None",
  "--config.objectives.itc.queue=0",
  "--config.objectives.itc.distill=0.0",
  "--config.objectives.mlm.distill=0.0",
  "--config.objectives.itm.group=None",
)
# At most so many of the words are masked: the vocabulary's matrix sees no others.
FEW = "--config.objectives.mlm.max_masked=8"
HALF = "--config.model.dtype='bfloat16'"
# Half of the memory each, for ours and the rival's are there at once.
SHARED_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One measurement.

  Attributes:
    name: in the results. config: "FILE[:arg]" of configs/. batch_size, overrides: over
      it. against: a rival that torch alone can run; None: ours alone.
    seconds: that it may take.
  """

  name: str
  config: str
  batch_size: int
  overrides: tuple[str, ...] = ()
  against: str | None = None
  seconds: float = 120.0

  def argv(self, out: pathlib.Path, python: str | None, *, compiled: bool) -> list[str]:
    """The command line of `bench step`."""
    said = [
      f"--config={card_lib.folder() / self.config}",
      f"--batch_size={self.batch_size}",
    ]
    said += [*self.overrides, f"--out={out}"]
    if self.against is not None:
      said += [f"--against={self.against}", *["--torch_compile"] * compiled]
      said += [f"--python={python}"] if python else []
    return [sys.executable, "-m", "vlp_jax.bench", "step", *said]


# Layers with dropout are slow to compile unrolled: those of ALBEF's image have none,
# those of its fusion take the compiler as long as all the rest.
IMAGE = "--config.model.image.unroll=12"
FUSION = "--config.model.fusion.unroll=6"


def _unrolled(layers):
  return f"--config.model.unroll={layers}"


L14 = ("openclip.py:L14", 128)
GPU = (
  Entry("clip_l14", *L14, (HALF, _unrolled(24), "--profile"), "open_clip", 180),
  Entry("albef_base_256", "albef.py", 128, (HALF, *ALONE, FEW, IMAGE, "--profile")),
  Entry("clip_b16", "openclip.py:B16", 512, (HALF, _unrolled(12)), "open_clip", 150),
  Entry("albef_beside", "albef.py", 128, (HALF, *ALONE, FEW, IMAGE), "albef_nn", 240),
  # What each setting gives, ours alone.
  Entry("albef_fusion", "albef.py", 128, (HALF, *ALONE, FEW, IMAGE, FUSION), None, 180),
  Entry("clip_l14_scanned", *L14, (HALF,)),
  Entry("clip_l14_xla", *L14, (HALF, "--config.model.backend='xla'")),
  Entry("albef_teacher", "albef.py", 128, (HALF, FEW, IMAGE)),
  Entry("siglip_b16", "siglip.py", 384, (HALF, _unrolled(12)), "clip_nn", 150),
  Entry("blip", "blip.py", 96, (HALF, *ALONE[:3], ALONE[4]), "hf_blip", 240),
  Entry("clip_l14_dots", "openclip.py:L14", 256, (HALF, "--config.model.remat='dots'")),
)
TINY = (
  Entry("clip", "openclip.py:tiny", 4, ("--repeats=2",), "clip_nn"),
  Entry("albef", "albef.py:tiny", 4, ("--repeats=2", *ALONE, FEW), "albef_nn"),
)
SUITES = {"gpu": GPU, "tiny": TINY}


def run(
  name: str,
  argv: Sequence[str] | None,
  *,
  limit: float,
  python: str | None = None,
  out: pathlib.Path | None = None,
) -> None:
  """Measures all entries that there is time for; prints and stores one JSON object.

  Args:
    name: of SUITES. argv: of the command. limit: seconds. python, out: as of step.py.
  """
  end = time.monotonic() + limit
  entries = {}
  for entry in SUITES[name]:
    left = end - time.monotonic()
    if left < 20:
      entries[entry.name] = {"left_out": f"{limit:.0f} s were over"}
      continue
    seconds = min(left, entry.seconds)
    entries[entry.name] = _entry(entry, seconds, python, compiled=name == "gpu")
    _say(entry.name, entries[entry.name])
  report.tell("step", argv, {"suite": name, "entries": entries}, out)


def _entry(entry, seconds, python, *, compiled) -> dict[str, Any]:
  """The results of one, or why there are none."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "step.json"
    more = SHARED_MEMORY if entry.against is not None else {}
    try:
      done = subprocess.run(
        entry.argv(out, python, compiled=compiled),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | more,
      )
    except subprocess.TimeoutExpired:
      return {"failed": f"took more than {seconds:.0f} s"}
    if done.returncode:
      return {"failed": done.stderr.strip().splitlines()[-3:]}
    return json.loads(out.read_text("utf-8"))


def _say(name, result):
  """A line on stderr: what is known should the rest be cut off."""
  said = result.get("failed")
  if said is None:
    best = {key: result[key]["best"] for key in ("examples_per_second", "mfu")}
    said = f"{best['examples_per_second']:.1f} examples/s, MFU {best['mfu']:.3f}"
    if "ratio" in result:
      said += f", {result['ratio']['best']:.2f} times {result['against']['name']}"
  print(f"{name}: {said}", file=sys.stderr, flush=True)
