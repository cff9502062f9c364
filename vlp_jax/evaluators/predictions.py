"""What a model says: as text, and in files as the official servers read them."""

from collections.abc import Sequence
import json
from typing import Any

from etils import epath
import jax
import numpy as np


def text(ids: np.ndarray, tokenizer: Any) -> str:
  """What ids [T] that a model wrote say, up to their end."""
  written = [int(i) for i in ids]
  end = tokenizer.vocab.sep
  written = written[: written.index(end)] if end in written else written
  return tokenizer.decode(np.array(written, np.int32)).strip()


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
