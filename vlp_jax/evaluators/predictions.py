"""Files of what a model says, as the official evaluation servers read them."""

from collections.abc import Sequence
import json
from typing import Any

from etils import epath
import jax


def write(path: epath.PathLike | None, rows: Sequence[dict[str, Any]]) -> None:
  """Writes a list of rows as .json, whole or not at all; by the first process alone.

  path: None writes nothing.
  """
  if path is None or jax.process_index():
    return
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  whole = path.with_suffix(".part")
  whole.write_text(json.dumps(list(rows), ensure_ascii=False) + "\n")
  whole.replace(path)
