"""Converts checkpoints: of others into our trees, and back.

vlp-jax convert --weights=ALBEF.pth --out=DIR
vlp-jax convert --weights=DIR --to=albef --out=ALBEF.pth

PATH is a file or a directory of Hugging Face's (or its name on the hub), a folder that
this command wrote, or the workdir of a run. The format is found from the names of the
tensors where --from does not say it. Options of a format follow with --set, such as
--set num_heads_image=12. Nothing in a file is executed.
"""

import argparse
import ast
from collections.abc import Sequence
import pathlib
from typing import Any

from vlp_jax import cli
from vlp_jax import places


def main(argv: Sequence[str] | None = None) -> None:
  """Reads, checks every tensor, and writes."""
  with cli.user_errors():
    args = _parser().parse_args(argv)
    # Here, not above: --help and a wrong option need not wait for jax.
    from vlp_jax.interop import formats
    from vlp_jax.interop import native
    from vlp_jax.ops import tree

    cli.log_plainly()
    options = dict(map(_setting, args.set or ()))
    if args.key is not None:
      options["key"] = args.key
    target = args.to or formats.NATIVE
    # Options are of the format of others, which is what is read where both are.
    if (args.weights / "checkpoints").is_dir():
      checkpoint = _of_run(args.weights, args.step, target)
    elif (args.weights / native.FILE).is_file():
      checkpoint = native.load(args.weights)
    else:
      checkpoint, options = formats.load(args.weights, args.source, options), {}
    left = formats.save(args.out, checkpoint, target, options)
    fields = checkpoint.fields
    trees = [k for k in ("params", "ema", "memory") if fields.get(k) and k not in left]
    told = ", ".join(f"{k} of {tree.size(fields[k]):,} numbers" for k in trees)
    told += f" (left out: {', '.join(left)})" if left else ""
    print(f"{checkpoint.format or 'run'} -> {target}: {args.out}: {told}")


def _parser():
  parser = argparse.ArgumentParser(
    prog="vlp-jax convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  path = dict(metavar="PATH", type=pathlib.Path, required=True)
  parser.add_argument("--weights", **path | {"type": _place}, help="what to read")
  parser.add_argument("--out", **path, help="what to write")
  parser.add_argument("--from", dest="source", metavar="FORMAT", help="default: found")
  parser.add_argument("--to", metavar="FORMAT", help="default: a folder of our own")
  parser.add_argument("--key", help="entry of a torch file that holds the state dict")
  parser.add_argument("--step", type=int, help="of a run; default: the newest")
  parser.add_argument("--set", metavar="NAME=VALUE", action="append")
  return parser


def _place(text):
  return places.workdir(text) if "://" in text else pathlib.Path(text)


def _setting(text: str) -> tuple[str, Any]:
  """("num_heads", 12) of "num_heads=12"."""
  name, equals, value = text.partition("=")
  if not equals:
    raise ValueError(f"--set {text}: want NAME=VALUE.")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value


def _of_run(workdir, step, target):
  """The state of a run's checkpoint, or of it the towers that the target holds."""
  from vlp_jax import build
  from vlp_jax import config as config_lib
  from vlp_jax import config_file
  from vlp_jax.interop import formats
  from vlp_jax.interop import native
  from vlp_jax.training import checkpoint

  state = checkpoint.Checkpoints(workdir / "checkpoints").arrays(step)
  if target in formats.towers():
    saved = config_file.saved((workdir / cli.CONFIG_FILE).read_text())
    config = config_lib.run(saved)
    words = build.tokenizer(config.tokenizer, None, workdir)
    model = build.model(config.model, vocab=words.vocab, length=words.length)
    return formats.of_model(target, model, state["params"])
  fields = dict(params=state["params"], ema=state.get("ema"))
  fields["memory"] = state.get("memory") or {}
  return native.Checkpoint(None, fields)


if __name__ == "__main__":
  main()
