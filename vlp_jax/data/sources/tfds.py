"""A TFDS data set in ArrayRecord, read by index: our builders, or anyone's."""

import dataclasses
import difflib
import functools
import importlib
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data.builders import prepare

BUILDERS = pathlib.Path(prepare.__file__).parent
NOT_BUILDERS = ("__init__", "prepare")


@dataclasses.dataclass(frozen=True)
class Source:
  """One split; images stay encoded until they are needed.

  Attributes:
    name: a file of data/builders/ ("flickr8k"), "my.module:Builder", or the name of a
      data set that TFDS knows.
    split: "train", "val", "train[:10%]"…
    data_dir: where prepared data lies; prepared there once if it is absent.
    builder: fields of the builder (source_dir=…, res=…).
    image, captions_feature, image_id: names of the features; "captions.text" is the
      field "text" of each of the captions. Without a whole number of that name, an
      image's id is its place in the split.
    dir: short for builder=dict(source_dir=…): the folder that a builder reads.
  """

  name: str
  split: str = "train"
  data_dir: str = "~/.cache/vlp_jax/tfds"
  builder: dict = dataclasses.field(default_factory=dict)
  image: str = "image"
  captions_feature: str = "captions"
  image_id: str = "image_id"
  dir: str | None = None

  def __post_init__(self):
    features = self._built.info.features
    for field in ("image", "captions_feature"):
      name = getattr(self, field).partition(".")[0]
      if name not in features:
        near = difflib.get_close_matches(name, list(features), n=1)
        raise ValueError(
          f"config: source.{field}={getattr(self, field)!r}: no such feature of"
          f" {self.name}"
          + (f"; did you mean {near[0]!r}?" if near else ".")
          + f" It has: {', '.join(features)}."
        )
    if not len(self):
      raise ValueError(f"config: source: split {self.split!r} of {self.name} is empty.")

  @functools.cached_property
  def _records(self) -> Any:
    built = self._built
    if built.info.file_format.value != prepare.FILE_FORMAT:
      raise ValueError(
        f"config: source.name={self.name!r}: {built.data_path} holds it as"
        f" {built.info.file_format.value}, which cannot be read by index: set"
        " data.source.data_dir to another folder, where it is prepared anew."
      )
    known = list(built.info.splits)
    named = {part.partition("[")[0].strip() for part in self.split.split("+")}
    if not named <= {*known, "all"}:
      raise ValueError(
        f"config: source.split={self.split!r}: {self.name} has {', '.join(known)}."
      )
    decoders = {self.image: tfds.decode.SkipDecoding()}
    try:
      if not _split_size(built, self.split):
        return ()
      return built.as_data_source(split=self.split, decoders=decoders)
    except (ValueError, AssertionError) as error:
      raise ValueError(
        f"config: source.split={self.split!r} of {self.name}: {error}"
      ) from error

  @functools.cached_property
  def _built(self):
    data_dir = str(pathlib.Path(self.data_dir).expanduser())
    fields = dict(self.builder)
    if self.dir is not None:
      fields["source_dir"] = self.dir
    ours = sorted(f.stem for f in BUILDERS.glob("*.py") if f.stem not in NOT_BUILDERS)
    if self.name in ours:
      builder = importlib.import_module(f"vlp_jax.data.builders.{self.name}").Builder
    elif ":" in self.name:
      builder = self._outside()
    else:
      return self._registered(data_dir, fields, ours)
    try:
      return prepare.prepare(builder, data_dir=data_dir, **fields)
    except TypeError as error:
      hint = ""
      if "'source_dir'" in str(error):
        hint = " Set --config.data.source.dir=… to the folder that it reads."
      raise ValueError(
        f"config: source.builder of {self.name}: {error}.{hint}"
      ) from error

  def _outside(self):
    module, _, cls = self.name.partition(":")
    try:
      return getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
      raise ValueError(f"config: source.name={self.name!r}: {error}.") from error

  def _registered(self, data_dir, fields, ours):
    try:
      built = tfds.builder(
        self.name, data_dir=data_dir, file_format=prepare.FILE_FORMAT, **fields
      )
    except tfds.core.registered.DatasetNotFoundError as error:
      raise ValueError(
        f"config: source.name={self.name!r}: neither a file of data/builders/ (there"
        f" are {', '.join(ours)}) nor a data set of TFDS."
      ) from error
    built.download_and_prepare(file_format=prepare.FILE_FORMAT)
    return built

  def __len__(self) -> int:
    return len(self._records)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples, see sources/__init__.py; words if the data set has them."""
    indices = [int(index) for index in indices]
    records = self._records.__getitems__(indices)
    return [
      self._example(i, record) for i, record in zip(indices, records, strict=True)
    ]

  def captions(self, indices: np.ndarray) -> list[str]:
    """All captions of these examples."""
    texts = []
    for start in range(0, len(indices), 1024):
      for example in self.read(indices[start : start + 1024]):
        texts += example["captions"]
    return [t if isinstance(t, str) else t.decode("utf-8", "replace") for t in texts]

  def _example(self, index, record):
    captions = record
    for name in self.captions_feature.split("."):
      captions = captions[name]
    if isinstance(captions, str | bytes):
      captions = [captions]
    image_id = record.get(self.image_id, index)
    key = record.get("key", f"{self.name}/{self.split}/{index}")
    example = {
      "image": record[self.image],
      "captions": list(captions),
      "image_id": int(image_id) if isinstance(image_id, int | np.integer) else index,
      "key": key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key),
    }
    if "words" in record:
      example["words"] = [
        w.decode() if isinstance(w, bytes) else w for w in record["words"]
      ]
    return example


def _split_size(built, split):
  """TFDS makes no data source of nothing."""
  return built.info.splits[split].num_examples
