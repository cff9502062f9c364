"""Directories as Hugging Face's transformers write them: config.json and weights.

A name of the hub (google/vit-base-patch16-224) is such a directory too: its files come
through `huggingface_hub` and its cache. Nothing here needs transformers or torch.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from vlp_jax.interop import reader

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Of weights in several files, in the order of WEIGHTS.
INDICES = tuple(f"{name}.index.json" for name in WEIGHTS)
# What holds weights; the first that is there is read, or fetched.
FILES = (INDICES[0], WEIGHTS[0], INDICES[1], WEIGHTS[1])
HUB_FILES = (WEIGHTS[0], INDICES[0], WEIGHTS[1], INDICES[1])
# Their names of activations (transformers/activations.py ACT2FN) and ours.
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
# Of BERT-base and ViT-B, which are the defaults of most classes of config.json.
BASE = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
)
# Names that BERT's first files have, and today's.
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclasses.dataclass(frozen=True)
class Directory:
  """path: on this machine. config: of config.json. tensors: name to array."""

  path: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, np.ndarray]


def read(name: str | os.PathLike) -> Directory:
  """A directory on this machine, or one of the hub.

  Raises:
    FileNotFoundError: there is none; says which files to put where.
    ValueError: its files cannot be read.
  """
  path = folder(name)
  settings = _json(path / "config.json")
  found = [path / file for file in FILES if (path / file).is_file()]
  if not found:
    raise FileNotFoundError(
      f"{path} has no weights: want {' or '.join(WEIGHTS)} beside its config.json."
    )
  if found[0].name in INDICES:
    tensors = _shards(found[0])
  else:
    tensors = reader.load(found[0])
  for old, new in LEGACY.items():
    tensors = {
      f"{key.removesuffix(old)}{new}" if key.endswith(old) else key: x
      for key, x in tensors.items()
    }
  return Directory(path, settings, tensors)


def config(name: str | os.PathLike) -> dict[str, Any]:
  """config.json alone of a directory; errors as of `read`."""
  return _json(folder(name) / "config.json")


def write(
  path: str | os.PathLike,
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> None:
  """Writes config.json and model.safetensors; `from_pretrained` reads them."""
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dict(config), indent=2, sort_keys=True)
  (path / "config.json").write_text(text + "\n", "utf-8")
  reader.save(path / "model.safetensors", tensors)


def folder(name: str | os.PathLike) -> pathlib.Path:
  """Where the directory is on this machine, after it was fetched if need be."""
  path = pathlib.Path(name)
  if path.is_dir():
    return path
  if path.exists():
    raise ValueError(f"{path} is a file: name the directory that has its config.json.")
  if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
    raise FileNotFoundError(f"no directory {path}.")
  return _from_hub(str(name))


def check(
  found: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str, model: str
) -> None:
  """Compares what a file says of itself with a model's fields.

  Args:
    found, wanted: field -> value, of the file and of the model.
    what, model: the file, and the model's path in the config, for the message.

  Raises:
    ValueError: one that lists all fields that differ.
  """
  wrong = [
    f"  {model}.{name}={wanted[name]!r}, there it is {found[name]!r}"
    for name in wanted
    if name in found and not _equal(found[name], wanted[name])
  ]
  if wrong:
    raise ValueError("\n".join([f"{what} is of another model:", *wrong]))


def activation(config: Mapping[str, Any], what: str) -> str:
  """Our name of config.json's hidden_act."""
  name = config.get("hidden_act", "gelu")
  if name not in ACTIVATIONS:
    raise ValueError(
      f"{what}: hidden_act={name!r}: there are {', '.join(sorted(ACTIVATIONS))}."
    )
  return ACTIVATIONS[name]


def their_activation(name: str) -> str:
  """transformers' name of one of our activations."""
  names = {"gelu_tanh": "gelu_pytorch_tanh"}
  return names.get(name, name)


def side(value: Any, where: str) -> int:
  """Of a square that config.json describes by one number or by two.

  Raises:
    ValueError: it is no square, which no tower of ours can read.
  """
  sides = value if isinstance(value, list | tuple) else [value]
  if len(set(sides)) != 1:
    raise ValueError(f"{where}={value}: want a square.")
  return sides[0]


def require(config: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
  """Refuses a config.json with a setting that our towers do not have.

  Args:
    wanted: key -> the only value that is understood, where the key is there at all.
  """
  wrong = [
    f"{key}={config[key]!r} (want {value!r})"
    for key, value in wanted.items()
    if key in config and config[key] != value
  ]
  if wrong:
    raise ValueError(f"{what}: not understood: {', '.join(wrong)}.")


def _equal(a, b):
  if isinstance(a, float) or isinstance(b, float):
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
  return a == b


def _json(path):
  if not path.is_file():
    raise FileNotFoundError(
      f"{path.parent} has no {path.name}: want a directory of save_pretrained."
    )
  try:
    content = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: no JSON: {error}.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: wants fields, has a {type(content).__name__}.")
  return content


def _places(index):
  """{tensor: file beside the index} of an index."""
  places = _json(index).get("weight_map")
  if not isinstance(places, dict) or not places:
    raise ValueError(f"{index}: has no weight_map.")
  for file in places.values():
    # A name, not a path: an index may not reach out of its directory.
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise ValueError(f"{index}: {file!r} is no file of this directory.")
  return places


def _shards(index):
  """All tensors of a directory whose weights are several files."""
  places = _places(index)
  tensors = {}
  for file in sorted(set(places.values())):
    if not (index.parent / file).is_file():
      raise FileNotFoundError(f"{index} names {file}, which is not there.")
    tensors |= reader.load(index.parent / file)
  missing = sorted(set(places) - set(tensors))
  if missing:
    raise ValueError(f"{index.parent}: its files lack {', '.join(missing[:12])}.")
  return tensors


def _from_hub(name):
  # Here, because only names of the hub need it, and it loads a client for the network.
  import huggingface_hub
  from huggingface_hub import constants
  from huggingface_hub import errors

  def get(file):
    return pathlib.Path(huggingface_hub.hf_hub_download(name, file))

  def weights():
    """The first of the files that the repository has, and all that an index names."""
    for file in HUB_FILES:
      try:
        found = get(file)
      except errors.EntryNotFoundError:
        # Not there, or offline and not in the cache, where another may be.
        if file == HUB_FILES[-1]:
          raise
      else:
        if file in INDICES:
          for part in sorted(set(_places(found).values())):
            get(part)
        return

  try:
    path = get("config.json").parent
    weights()
  except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
    raise FileNotFoundError(
      f"{name}: no such directory here, and the Hugging Face hub did not give it"
      f" ({type(error).__name__}); its cache is {constants.HF_HUB_CACHE}. Put"
      f" config.json and {WEIGHTS[0]} of https://huggingface.co/{name} into a folder,"
      " and say path=FOLDER."
    ) from error
  return path
