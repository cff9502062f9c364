"""Trains what a config says.

  python -m vlp_jax.train --config=FILE[:arg] --workdir=DIR [--config.a.b=value …]

Interrupted and started again with the same workdir, it goes on where it stopped.
"""

from collections.abc import Sequence
import gc
import sys

from vlp_jax import cli
from vlp_jax import memory


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, trains, exits: 0 done, 2 a mistake to mend, 128 + signal interrupted."""
  # Before a config is read: it starts this command again.
  memory.huge_pages()
  with cli.user_errors():
    args = cli.parse(argv, prog="python -m vlp_jax.train", doc=__doc__)
    # A start imports and traces, and leaves next to no garbage: to look for it takes a
    # second. The loop turns it on again after the first step is logged.
    gc.disable()
    try:
      code = _train(args)
    finally:
      gc.enable()
  sys.exit(code)


def _train(args):
  # Here, not above: --help and a wrong option need not wait for jax.
  from vlp_jax.training import distributed

  with distributed.joined(), cli.user_errors():
    # Once the others are there.
    from vlp_jax import config_file
    from vlp_jax.training import ahead
    from vlp_jax.training import cache

    with ahead.Programs(cache.use(), config_file.to_json(args.config)) as start:
      # Here: it is a good part of a start, and programs are loaded meanwhile.
      from vlp_jax import loop

      cli.log_plainly()
      return loop.train(args.config, args.workdir, start)


if __name__ == "__main__":
  main()
