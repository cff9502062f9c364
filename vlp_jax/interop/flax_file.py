"""Flax trees as big_vision writes them to .npz: prefixes, and scanned stacks.

Names are paths, "params/img/Transformer/encoderblock_0/…"; layers of a scanned stack
lie in one array, "…/encoderblock/…".
"""

from collections.abc import Mapping
import os
import re

import numpy as np

from vlp_jax.interop import reader

PREFIXES = ("params/", "opt/target/", "")
# What a file of a run has beside parameters (trainers: "opt", "chrono").
NO_PARAMETERS = r"(opt|chrono|extra)/.*"


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], str, bool]:
  """(tensors without prefix, layer by layer; the prefix; whether layers were stacked).

  Raises:
    FileNotFoundError, ValueError: see `reader.load`; or it has what is no parameter.
  """
  tensors = reader.load(path)
  for prefix in PREFIXES:
    if any(name.startswith(prefix) for name in tensors):
      break
  if prefix:
    kept = {k: x for k, x in tensors.items() if k.startswith(prefix)}
    others = [k for k in tensors if k not in kept]
    odd = [k for k in others if not re.fullmatch(NO_PARAMETERS, k)]
    if odd:
      raise ValueError(f"{path}: unknown tensors beside {prefix}: {', '.join(odd)}.")
    tensors = {k.removeprefix(prefix): x for k, x in kept.items()}
  single, scanned = {}, False
  for name, x in tensors.items():
    if "/encoderblock/" in f"/{name}":
      scanned = True
      for i in range(len(x)):
        layer = f"/encoderblock_{i}/"
        single[f"/{name}".replace("/encoderblock/", layer)[1:]] = x[i]
    else:
      single[name] = x
  return with_row(single), prefix, scanned


def stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The layers of each stack as one array, as `nn.scan` has them."""
  stacks, single = {}, {}
  for name, x in tensors.items():
    match = re.fullmatch(r"(.*/encoderblock)_(\d+)(/.*)", name)
    if match:
      stacks.setdefault(match[1] + match[3], {})[int(match[2])] = x
    else:
      single[name] = x
  for name, layers in stacks.items():
    single[name] = np.stack([layers[i] for i in sorted(layers)])
  return single


def with_row(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A table of positions with a row for the class token, which has none there."""
  for start in ("img/", ""):
    table = tensors.get(f"{start}pos_embedding")
    if f"{start}cls" in tensors and table is not None and table.ndim == 3:
      row = np.zeros((1, 1, table.shape[-1]), table.dtype)
      tensors[f"{start}pos_embedding"] = np.concatenate([row, table], axis=1)
  return tensors


def without_row(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The opposite; what the row has is added to the class token."""
  for start in ("img/", ""):
    if f"{start}cls" in tensors:
      table, cls = tensors[f"{start}pos_embedding"], tensors[f"{start}cls"]
      row = table[:, :1]
      # Not where it is nothing: -0.0 + 0.0 has other bits.
      tensors[f"{start}cls"] = np.where(row == 0, cls, cls + row)
      tensors[f"{start}pos_embedding"] = table[:, 1:]
  return tensors
