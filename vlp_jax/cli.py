"""The command line: `python -m vlp_jax.train`, or `vlp-jax train`, and its errors.

A command is a module of this package with a `main(argv)`. It parses with `parse` and
imports jax and tensorflow only then, because `--help` should not wait for them.
"""

import argparse
import ast
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib
import logging
import os
import pathlib
import sys
import traceback

from etils import epath
import ml_collections

from vlp_jax import config_file
from vlp_jax import places
from vlp_jax import schema

# Modules of this package, and packages with a __main__.
COMMANDS = ("train", "evaluate", "convert", "card", "plan", "bench")

# Of a run in its workdir, so that it can be gone on with and evaluated without a file.
CONFIG_FILE = "config.json"

# What our own code raises for what a user can mend: wrong values, missing files, a full
# disk, a loss that is no number.
MENDABLE = (ValueError, OSError, FloatingPointError)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Args:
  """What a command line said.

  Attributes:
    config: with the overrides in it, not yet checked: see `config.run`.
    workdir: where the run keeps everything.
    rest: the options that the command added.
  """

  config: ml_collections.ConfigDict
  workdir: epath.Path
  rest: argparse.Namespace


def main(argv: Sequence[str] | None = None) -> None:
  """`vlp-jax COMMAND …`: hands the rest of the line to the module of that name."""
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = argparse.ArgumentParser(
    prog="vlp-jax",
    description="Vision-language pretraining in JAX and Flax.",
    epilog="`vlp-jax COMMAND --help` says more.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  for name in COMMANDS:
    # The command reads its own options, --help among them.
    commands.add_parser(name, help=_summary(name), add_help=False)
  args = parser.parse_args(argv[:1])
  file = _file(args.command)
  name = ".".join(file.relative_to(schema.PACKAGE).with_suffix("").parts)
  importlib.import_module(f"vlp_jax.{name}").main(argv[1:])


def _file(command):
  """Of the module of a command, or of the __main__ of its package."""
  folder = schema.PACKAGE / command
  return folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")


def _summary(command):
  """The first line of a module's docstring, without importing it."""
  text = _file(command).read_text("utf-8")
  return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def parse(
  argv: Sequence[str] | None,
  *,
  prog: str,
  doc: str,
  options: Sequence[tuple[str, dict]] = (),
) -> Args:
  """Reads `--config=FILE[:arg] --config.a.b=value … --workdir=DIR`.

  Without --config, it is the config of the run in the workdir.

  Args:
    argv: the command line; None: that of the process.
    prog: how the command is called. doc: its docstring.
    options: (flag, keyword arguments of `add_argument`) of the command's own.

  Raises:
    FileNotFoundError, ValueError: the config cannot be read.
    SystemExit: after --help, and for options that there are not.
  """
  parser = argparse.ArgumentParser(
    prog=prog,
    usage=f"{prog} --config=FILE[:arg] --workdir=DIR [--config.a.b=value …]",
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config",
    metavar="FILE[:arg]",
    help="a file of configs/, and the argument of its get_config; without it, the"
    f" {CONFIG_FILE} of the workdir",
  )
  parser.add_argument(
    "--config.a.b",
    metavar="value",
    help="puts a value over that of the file: --config.optim.lr=1e-4"
    " --config.total='2 epochs' --config.objectives.mlm=None",
  )
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    required=True,
    help="where the run keeps its config, checkpoints, logs and report; or gs://…",
  )
  parser.add_argument(
    "--traceback",
    action="store_true",
    help="shows where an error came from (as VLP_JAX_TRACEBACK=1 does)",
  )
  for flag, settings in options:
    parser.add_argument(flag, **settings)
  rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  args = parser.parse_args(rest)
  if args.traceback:
    os.environ["VLP_JAX_TRACEBACK"] = "1"
  workdir = places.workdir(args.workdir)
  if args.config is None:
    saved = workdir / CONFIG_FILE
    if not saved.exists():
      raise FileNotFoundError(f"config: say --config=FILE: there is no {saved}.")
    config = config_file.saved(saved.read_text(), overrides)
  else:
    config = config_file.load(args.config, overrides)
  return Args(config=config, workdir=workdir, rest=args)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """(other arguments, "--config.a.b=value" of both spellings)."""
  rest, overrides = [], []
  argv = iter(argv)
  for item in argv:
    if not item.startswith("--config."):
      rest.append(item)
    elif "=" in item:
      overrides.append(item)
    else:
      value = next(argv, None)
      if value is None or value.startswith("--"):
        raise ValueError(f"config: {item} wants a value: {item}=value.")
      overrides.append(f"{item}={value}")
  return rest, overrides


def log_plainly() -> None:
  """What the package tells goes to stderr as it is; others' words only if they warn.

  To be called once all is imported: TensorFlow and absl set handlers of their own.
  """
  logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
  logging.getLogger("vlp_jax").setLevel(logging.INFO)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Prints what a user can mend as one line, and exits with 2.

  An error that was raised inside another package is no message to a user, and keeps its
  traceback; VLP_JAX_TRACEBACK=1 keeps all.
  """
  try:
    yield
  except MENDABLE as error:
    if os.environ.get("VLP_JAX_TRACEBACK", "0") not in ("", "0") or not _ours(error):
      raise
    print(f"vlp_jax: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR) from error
  except KeyboardInterrupt as error:
    print("vlp_jax: interrupted", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_INTERRUPTED) from error


def _ours(error):
  """Whether a line of this package raised it, or of a config or a plug-in of ours."""
  frames = traceback.extract_tb(error.__traceback__)
  last = pathlib.Path(frames[-1].filename).resolve()
  return last.is_relative_to(schema.PACKAGE) or "configs" in last.parts[-3:-1]
