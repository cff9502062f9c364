"""Checkpoint files as {name: array}: safetensors, npz, and torch's, without torch.

The format is found from the first bytes, not from the suffix. Arrays are read-only
views of the memory-mapped file where the format allows (safetensors, torch): a file
of several GB costs what is used of it. Nothing in a file is executed.
"""

from collections.abc import Callable, Mapping
import json
import math
import os
import pathlib
import struct
from typing import IO, Any
import zipfile
import zlib

import ml_dtypes
import numpy as np

from vlp_jax.interop import torch_file
from vlp_jax.interop import unpickler

# https://github.com/huggingface/safetensors: dtype names of the header.
SAFETENSORS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "C64": np.dtype(np.complex64),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
# Where training scripts put the state dict: ALBEF and BLIP; Lightning and open_clip.
KEYS = ("model", "state_dict")
MOST_MODULES = 100_000  # of a TorchScript archive
LFS = b"version https://git-lfs"
# What flipped bits make of a header: zipfile raises the first five.
DAMAGE = (
  zipfile.BadZipFile,
  NotImplementedError,
  RuntimeError,
  EOFError,
  OSError,
  struct.error,
  zlib.error,
  MemoryError,
  AttributeError,
  LookupError,
  TypeError,
  UnicodeError,
)


def load(path: str | os.PathLike, *, key: str | None = None) -> dict[str, np.ndarray]:
  """The tensors of a checkpoint file, in the file's order.

  Args:
    path: .safetensors, .npz, or .pth, .pt, .bin, .ckpt as torch.save writes them, in
      the zip format or in that before torch 1.6; or an archive of torch.jit.save, whose
      parameters and buffers are read and whose code is not.
    key: entry of a torch file that holds the state dict; None: the whole file where it
      is a state dict, else its entry "model" or "state_dict".

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a checkpoint, is cut short, wants code to be run (the
      refused global is named), or has no state dict where it was looked for.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f"{path} is a folder: name the checkpoint file in it.")
  if not path.is_file():
    raise FileNotFoundError(f"no checkpoint file {path}.")
  with path.open("rb") as f:
    head = f.read(len(LFS))
  try:
    if head.startswith(b"PK\x03\x04"):
      return _load_zip(path, key)
    if head.startswith(torch_file.LEGACY):
      return unwrap(torch_file.load_legacy(path), path, key)
    if head[8:9] == b"{":
      return _load_safetensors(path)
  except DAMAGE as e:
    raise ValueError(f"{path} is damaged or cut short: {e!r}.") from e
  if head == LFS:
    raise ValueError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`.")
  raise ValueError(
    f"{path} is not a checkpoint: neither safetensors, npz nor a file of torch.save"
    f" (it starts with {head[:8]!r})."
  )


def save(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  *,
  key: str | None = None,
) -> None:
  """Writes {name: array} so that others can read it; the suffix chooses the format.

  Arrays that are one memory (the same object under two names) are written once in
  torch's format, where they stay tied, and twice in the others. The file appears under
  its name when it is whole.

  Args:
    path: .safetensors, .npz, or .pth, .pt, .bin, .ckpt (torch's zip format).
    tensors: name to array.
    key: torch only: writes {key: tensors}, as `torch.save({"model": …})` does.

  Raises:
    ValueError: if the suffix or an array's dtype is of no such format.
  """
  path = pathlib.Path(path)
  tensors = {name: np.asarray(x) for name, x in tensors.items()}
  if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
    _write_whole(path, lambda f: torch_file.write(f, tensors, key=key))
  elif path.suffix not in (".safetensors", ".npz"):
    raise ValueError(f"{path}: unknown suffix: say .safetensors, .npz or .pth.")
  elif key is not None:
    raise ValueError(f"{path}: key={key!r} is for .pth files; {path.suffix} is flat.")
  elif path.suffix == ".npz":
    _write_whole(path, lambda f: np.savez(f, **tensors))
  else:
    _write_whole(path, lambda f: _write_safetensors(f, tensors))


def unwrap(
  content: Any, path: str | os.PathLike, key: str | None = None
) -> dict[str, np.ndarray]:
  """The state dict in what a torch file holds; see `load` for `key`."""
  if isinstance(content, unpickler.Module):
    content = _parameters(content, path)
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
  if key is None and not _is_state_dict(content):
    key = next((k for k in KEYS if isinstance(content.get(k), dict)), None)
    if key is None:
      raise ValueError(
        f"{path} holds no state dict under {' or '.join(map(repr, KEYS))}: say key=… ;"
        f" its entries are {_some(content)}."
      )
  found = content
  if key is not None:
    if key not in content:
      raise ValueError(
        f"{path} has no entry {key!r}; its entries are {_some(content)}."
      )
    found = content[key]
  if not isinstance(found, dict) or not _is_state_dict(found):
    odd = found if not isinstance(found, dict) else _odd(found)
    raise ValueError(
      f"{path}: entry {key!r} is not a state dict of tensors: it has {_some(odd)}."
    )
  arrays = {}
  for name, x in found.items():
    try:
      arrays[name] = x.array() if isinstance(x, torch_file.Tensor) else np.asarray(x)
    except ValueError as e:
      raise ValueError(f"{path} is damaged: {name!r} is {e}") from e
  return arrays


def _parameters(module, path, above=(), seen=None):
  """{name: tensor} of a TorchScript module and those below it: its state dict."""
  if any(module is other for other in above):
    raise ValueError(f"{path} is damaged: a module lies within itself.")
  # Modules that several share are read as often: a few could stand for any number.
  seen = [] if seen is None else seen
  seen.append(module)
  if len(seen) > MOST_MODULES:
    raise ValueError(f"{path} is damaged: it has more than {MOST_MODULES:,} modules.")
  found = {}
  for name, x in module.items():
    if isinstance(x, unpickler.Module):
      below = _parameters(x, path, (*above, module), seen)
      found |= {f"{name}.{key}": tensor for key, tensor in below.items()}
    elif isinstance(x, torch_file.Tensor):
      found[name] = x
    elif x is not None and not isinstance(x, (bool, int, float, str)):
      # Flags such as `training` say nothing about weights; lists could hold some.
      raise ValueError(
        f"{path}: attribute {name!r} of a scripted module is a {type(x).__name__}:"
        " only tensors, numbers and modules are read."
      )
  return found


def _odd(content):
  """{name: type} of what a state dict may not hold."""
  allowed = (torch_file.Tensor, int, float, np.generic)
  return {
    name: type(x).__name__
    for name, x in content.items()
    if not isinstance(name, str) or not isinstance(x, allowed)
  }


def _is_state_dict(content):
  return not _odd(content)


def _some(names, most=12):
  if not isinstance(names, dict):
    # What is nested could be of any length.
    plain = isinstance(names, str | int | float)
    return repr(names) if plain else f"a {type(names).__name__}"
  names = [str(name) for name in names]
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def _load_zip(path, key):
  with zipfile.ZipFile(path) as f:
    names = f.namelist()
  if any(name.endswith("data.pkl") for name in names):
    return unwrap(torch_file.load_zip(path), path, key)
  if not names or not all(name.endswith(".npy") for name in names):
    raise ValueError(
      f"{path} is a zip file, but neither of numpy nor of torch.save: it has"
      f" {_some(dict.fromkeys(names))}."
    )
  arrays = {}
  with np.load(path, allow_pickle=False) as f:
    for name in f.files:
      try:
        x = f[name]
      except ValueError as e:
        raise ValueError(f"{path}: array {name!r} cannot be read: {e}.") from e
      # numpy has no bfloat16 and writes two bytes without a type (big_vision's files).
      arrays[name] = x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x
  return arrays


def _load_safetensors(path):
  size = path.stat().st_size
  with path.open("rb") as f:
    (length,) = struct.unpack("<Q", f.read(8))
    header = f.read(min(length, size))
  start = 8 + length
  if start > size:
    raise ValueError(f"{path} is cut short: its header is of {length} bytes.")
  try:
    entries = json.loads(header)
  except ValueError as e:
    raise ValueError(f"{path} is not a safetensors file: its header is no JSON.") from e
  entries.pop("__metadata__", None)
  memory = np.memmap(path, np.uint8, mode="r")
  arrays = {}
  for name, entry in entries.items():
    try:
      kind, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
      first, last = (int(n) for n in entry["data_offsets"])
    except (LookupError, TypeError, ValueError) as e:
      raise ValueError(f"{path} is damaged: the entry of {name!r} is {entry}.") from e
    if kind not in SAFETENSORS:
      raise ValueError(f"{path}: tensor {name!r} is of unknown type {kind!r}.")
    dtype = SAFETENSORS[kind]
    if start + last > size:
      raise ValueError(f"{path} is cut short: it ends within tensor {name!r}.")
    count = math.prod(shape)
    if min((first, *shape)) < 0 or last - first != count * dtype.itemsize:
      raise ValueError(
        f"{path}: tensor {name!r} of shape {list(shape)} does not fill its bytes."
      )
    bytes_ = np.asarray(memory[start + first : start + last])
    arrays[name] = bytes_.view(dtype).reshape(shape)
  return arrays


def _write_safetensors(f, tensors):
  names = {dtype: name for name, dtype in SAFETENSORS.items()}
  # transformers refuses files that do not say which framework's layout they have.
  header = {"__metadata__": {"format": "pt"}}
  at = 0
  # Wide types first, as the format's own writer does, so that all are aligned.
  order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  for name in order:
    x = tensors[name]
    if x.dtype not in names:
      raise ValueError(f"tensor {name!r}: safetensors has no type {x.dtype}.")
    header[name] = dict(
      dtype=names[x.dtype], shape=list(x.shape), data_offsets=[at, at + x.nbytes]
    )
    at += x.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  f.write(struct.pack("<Q", len(text)) + text)
  for name in order:
    f.write(torch_file.raw(tensors[name]))


def _write_whole(path: pathlib.Path, write: Callable[[IO[bytes]], None]) -> None:
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as f:
      write(f)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
