"""Measures how fast a step, the input, the contrast or a start is, and stores it.

  vlp-jax bench step|tune|input|contrastive|compile [options]

`tune` is of a step, too: of what settings give it. Each prints a JSON object, and
stores it in runs/bench/. `vlp-jax bench step --help` says more.
"""

from collections.abc import Sequence
import importlib
import pathlib
import sys

from vlp_jax import cli
from vlp_jax import memory

# The file is the registry: each has a `main(argv)`.
KINDS = ("step", "tune", "input", "contrastive", "compile")


def main(argv: Sequence[str] | None = None) -> None:
  """Hands the rest of the line to the file of that name."""
  argv = list(sys.argv[1:] if argv is None else argv)
  with cli.user_errors():
    if not argv or argv[0] in ("-h", "--help"):
      print(__doc__)
      return
    kind, *rest = argv
    if kind not in kinds():
      raise ValueError(
        f"bench: {kind}: there is no such benchmark; there are {', '.join(kinds())}."
      )
    memory.huge_pages()  # as a run does, before jax comes
    importlib.import_module(f"vlp_jax.bench.{kind}").main(rest)


def kinds() -> tuple[str, ...]:
  """Those whose file is there."""
  here = pathlib.Path(__file__).parent
  return tuple(kind for kind in KINDS if (here / f"{kind}.py").is_file())


if __name__ == "__main__":
  main()
