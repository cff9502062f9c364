"""Evaluates a trained run, and writes its report anew.

python -m vlp_jax.evaluate --workdir=DIR [--step=N | --best] [--config.evals.x.y=…]

Evaluations that are switched off (--config.evals.x=None) keep in results.json and on
the page what they found before, with the step that it is of. The run's config.json
stays as it is.
"""

from collections.abc import Sequence

from vlp_jax import cli

OPTIONS = (
  ("--step", dict(type=int, help="checkpoint of that step; default: the newest")),
  (
    "--best",
    dict(action="store_true", help="the checkpoint of config.checkpoint.best"),
  ),
)


def main(argv: Sequence[str] | None = None) -> None:
  """Restores a checkpoint, runs all evaluations, prints a table, writes report.html."""
  with cli.user_errors():
    args = cli.parse(
      argv, prog="python -m vlp_jax.evaluate", doc=__doc__, options=OPTIONS
    )
    # Here, not above: --help and a wrong option need not wait for jax.
    from vlp_jax.training import distributed

    with distributed.joined(), cli.user_errors():
      # Once the others are there: half of the time of a start is this import.
      from vlp_jax import loop

      cli.log_plainly()
      loop.evaluate(args.config, args.workdir, step=args.rest.step, best=args.rest.best)


if __name__ == "__main__":
  main()
