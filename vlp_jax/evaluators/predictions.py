"""Files of what a model says, as the official evaluation servers read them."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import jax


def write(path: pathlib.Path | None, rows: Sequence[dict[str, Any]]) -> None:
  """Writes a list of rows as .json, whole or not at all; by the first process alone.

  path: None writes nothing.
  """
  if path is None or jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  whole = path.with_suffix(".part")
  whole.write_text(json.dumps(list(rows), ensure_ascii=False) + "\n", "utf-8")
  whole.replace(path)
