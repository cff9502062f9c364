"""results.json: what each evaluation of a run found last, and at which step."""

from collections.abc import Mapping
import json
import logging

from etils import epath

_log = logging.getLogger("vlp_jax")

Results = dict[str, dict[str, float]]


def merge(
  path: epath.PathLike, found: Mapping[str, Mapping[str, float]], *, step: int
) -> tuple[Results, dict[str, int | None]]:
  """Puts results into the file; those of other evaluations stay there as they were.

  The file is {evaluation: {"step": of the checkpoint, metric: value}}.

  Args:
    path: of the file; it need not be there.
    found: {evaluation: {metric: value}} of now. step: that they are of.

  Returns:
    (results of all in the file, without their step; {evaluation: step} of those that
    are not of now; None where the file does not say it).
  """
  path = epath.Path(path)
  kept = {name: row for name, row in _read(path).items() if name not in found}
  rows = kept | {name: {"step": step, **values} for name, values in found.items()}
  partial = path.parent / f"{path.name}.partial"
  partial.write_text(json.dumps(rows, indent=2) + "\n")
  partial.replace(path)
  results = {
    name: {key: value for key, value in row.items() if key != "step"}
    for name, row in rows.items()
  }
  return results, {name: row.get("step") for name, row in kept.items()}


def _read(path):
  """{evaluation: row}; of a file that is none of ours, nothing, which is told."""
  if not path.exists():
    return {}
  try:
    rows = json.loads(path.read_text())
  except ValueError:
    rows = None
  if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
    return rows
  # Not an error: the evaluation that is to be written may have taken hours.
  _log.warning(
    "%s: is not as an evaluation leaves it, and is written anew: earlier results are"
    " lost.",
    path,
  )
  return {}
