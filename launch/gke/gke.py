#!/usr/bin/env python3
"""Trains on GKE, as a JobSet of TPU or GPU machines.

  python launch/gke/gke.py COMMAND tpu|gpu --name=NAME [option …]

  render    prints the manifest
  apply     gives it to the cluster that kubectl is set to
  logs      follows the log of a process
  delete    the JobSet, with its pods; the workdir stays

The templates beside this file are filled in; nothing but Python and kubectl is wanted.
The cluster needs JobSet (jobset.sigs.k8s.io). A pod that is evicted or dies takes the
others down, and all begin again from the last checkpoint, up to --restarts times.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import re
import shlex
import string
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
# cloud.google.com/gke-tpu-accelerator, and chips of a machine; of these topologies a
# smaller one is a single machine. https://cloud.google.com/kubernetes-engine/docs/
# concepts/plan-tpus
TPUS = {
  "tpu-v4-podslice": 4,
  "tpu-v5-lite-podslice": 4,
  "tpu-v5p-slice": 4,
  "tpu-v6e-slice": 4,
}


class Wrong(ValueError):
  """An argument that is missing, or cannot be."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """(options, those of the trainer)."""
  parser = argparse.ArgumentParser(
    prog="gke.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("command", choices=("render", "apply", "logs", "delete"))
  parser.add_argument("kind", choices=("tpu", "gpu"))
  parser.add_argument("--name", help="of the JobSet: letters, digits and dashes")
  parser.add_argument("--namespace", default="default")
  parser.add_argument("--image", help="built from launch/docker, in your registry")
  parser.add_argument("--config", help="FILE[:arg], within the image")
  parser.add_argument("--workdir", help="gs://BUCKET/RUN")
  parser.add_argument("--accelerator", help=f"tpu: {', '.join(TPUS)}; gpu: its name")
  parser.add_argument("--topology", help="tpu: e.g. 4x4")
  parser.add_argument("--slices", type=int, default=1, help="tpu: pods of one model")
  parser.add_argument("--nodes", type=int, help="gpu: machines")
  parser.add_argument("--gpus-per-node", type=int, default=8)
  parser.add_argument("--spot", action="store_true")
  parser.add_argument("--restarts", type=int, default=100)
  parser.add_argument("--grace", type=int, default=120, help="seconds to save in")
  parser.add_argument(
    "--service-account", default="default", help="that may write to the bucket"
  )
  parser.add_argument("--process", type=int, default=0, help="logs: of which pod")
  parser.add_argument("--dry-run", action="store_true", help="prints, and does nothing")
  args, rest = parser.parse_known_args(argv)
  for option in rest:
    if not re.match(r"--config\.[\w.]+=|--traceback$", option):
      raise Wrong(f"no option {option}. See --help.")
  return args, rest


def check(args: argparse.Namespace) -> None:
  """Raises Wrong for what is missing."""
  if not args.name:
    raise Wrong("--name is missing: of the JobSet.")
  # Its pods are NAME-train-I-J, of which a label may have 63 letters.
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
    raise Wrong(
      f"--name={args.name}: want at most 40 lower-case letters, digits and dashes."
    )
  if args.command not in ("render", "apply"):
    return
  hints = {
    "image": "built from launch/docker",
    "config": "a file of configs/",
    "workdir": "gs://BUCKET/RUN",
    "accelerator": "see --help",
  }
  hints |= {"topology": "e.g. 4x4"} if args.kind == "tpu" else {"nodes": "how many"}
  for name, hint in hints.items():
    if getattr(args, name) in (None, ""):
      raise Wrong(f"--{name} is missing: {hint}.")
  if not re.match(r"gs://.", args.workdir):
    raise Wrong(f"--workdir={args.workdir}: pods share no disk: say gs://BUCKET/RUN.")
  least = {"slices": 1, "nodes": 1, "gpus_per_node": 1, "restarts": 0, "grace": 1}
  for name, want in least.items():
    value = getattr(args, name)
    if value is not None and value < want:
      raise Wrong(f"--{name.replace('_', '-')}={value}: want {want} or more.")
  if args.kind == "tpu":
    if args.accelerator not in TPUS:
      raise Wrong(
        f"--accelerator={args.accelerator}: there are {', '.join(sorted(TPUS))}."
      )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", args.topology):
      raise Wrong(f"--topology={args.topology}: want e.g. 4x4 or 2x2x4.")
    chips(args)


def chips(args: argparse.Namespace) -> tuple[int, int]:
  """(chips of a machine, machines of a slice)."""
  count = 1
  for side in args.topology.split("x"):
    count *= int(side)
  each = TPUS[args.accelerator]
  if count < each:
    return count, 1
  if count % each:
    raise Wrong(f"--topology={args.topology}: {count} chips are no machines of {each}.")
  return each, count // each


def render(args: argparse.Namespace, rest: Sequence[str]) -> str:
  """The manifest."""
  words = dict(
    name=args.name,
    namespace=args.namespace,
    image=json.dumps(args.image),
    arguments=json.dumps(
      [f"--config={args.config}", f"--workdir={args.workdir}", *rest],
      ensure_ascii=False,
    ),
    accelerator=json.dumps(args.accelerator),
    service_account=json.dumps(args.service_account),
    restarts=args.restarts,
    grace=args.grace,
    spot='cloud.google.com/gke-spot: "true"' if args.spot else "",
  )
  if args.kind == "tpu":
    each, machines = chips(args)
    words |= dict(topology=json.dumps(args.topology), chips=each, slices=args.slices)
    words |= dict(machines=machines)
  else:
    words |= dict(machines=args.nodes, gpus=args.gpus_per_node)
  text = string.Template((HERE / f"{args.kind}.yaml").read_text("utf-8"))
  lines = text.substitute(words).splitlines()
  # A word that was empty leaves no line.
  return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def kubectl(args: argparse.Namespace) -> list[str]:
  """The command that acts on the cluster."""
  there = ["kubectl", f"--namespace={args.namespace}"]
  if args.command == "apply":
    return [*there, "apply", "--filename=-"]
  if args.command == "delete":
    return [*there, "delete", "jobset", args.name]
  labels = [
    f"jobset.sigs.k8s.io/jobset-name={args.name}",
    f"batch.kubernetes.io/job-completion-index={args.process}",
  ]
  return [*there, "logs", "--follow", f"--selector={','.join(labels)}"]


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 2 for what is to be mended."""
  try:
    args, rest = parse(argv)
    check(args)
    manifest = render(args, rest) if args.command in ("render", "apply") else None
  except Wrong as error:
    print(f"vlp_jax: error: {error}", file=sys.stderr)
    return 2
  if args.command == "render":
    print(manifest, end="")
    return 0
  command = kubectl(args)
  if args.dry_run:
    print(shlex.join(command) + (f" <<'EOF'\n{manifest}EOF" if manifest else ""))
    return 0
  try:
    return subprocess.run(command, input=manifest, text=True, check=False).returncode
  except FileNotFoundError:
    print("vlp_jax: error: there is no kubectl: install it.", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
