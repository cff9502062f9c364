"""Folders of transformers: config.json and the weights beside it."""

from collections.abc import Collection
import json
import os
import pathlib
from typing import Any

import numpy as np

from vlp_jax.interop import reader

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# transformers' activations.py -> `nn/block.py`.
ACTIVATIONS = {
  "quick_gelu": "quick_gelu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "relu": "relu",
  "silu": "silu",
}


def config(
  path: str | os.PathLike, kinds: Collection[str]
) -> tuple[dict[str, Any], pathlib.Path]:
  """(config.json, its path) of a folder.

  Args:
    path: the folder.
    kinds: values of model_type that are wanted.

  Raises:
    FileNotFoundError: no such folder, or no config.json in it.
    ValueError: it is no JSON, or of another model.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise FileNotFoundError(
      f"{folder} is no folder: name one with {CONFIG} and {WEIGHTS[0]}, as"
      " save_pretrained and `hf download` make it."
    )
  file = folder / CONFIG
  if not file.is_file():
    raise FileNotFoundError(f"{folder} has no {CONFIG}.")
  try:
    found = json.loads(file.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is no JSON: {error}") from error
  kind = found.get("model_type") if isinstance(found, dict) else None
  if kind not in kinds:
    raise ValueError(f"{file}: model_type={kind!r}: want one of {', '.join(kinds)}.")
  return found, file


def tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], pathlib.Path]:
  """({name: array}, the file they are of) of a folder."""
  folder = pathlib.Path(path)
  for name in WEIGHTS:
    if (folder / name).is_file():
      return reader.load(folder / name), folder / name
  raise FileNotFoundError(f"{folder} has no {' and no '.join(WEIGHTS)}.")


def activation(theirs: str, where: str) -> str:
  """Our name of `hidden_act`; `where` is for the message."""
  if theirs not in ACTIVATIONS:
    raise ValueError(
      f"{where}.hidden_act={theirs!r}: our towers have {', '.join(ACTIVATIONS)}."
    )
  return ACTIVATIONS[theirs]


def save(
  path: str | os.PathLike, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
  """Writes a folder of config.json and model.safetensors."""
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
  reader.save(folder / WEIGHTS[0], tensors)
