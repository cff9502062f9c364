"""A TFDS data set in ArrayRecord, read by index: our builders, or anyone's."""

import dataclasses
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
    image, captions: names of the features.
    dir: short for builder=dict(source_dir=…): the folder that a builder reads.
  """

  name: str
  split: str = "train"
  data_dir: str = "~/.cache/vlp_jax/tfds"
  builder: dict = dataclasses.field(default_factory=dict)
  image: str = "image"
  captions_feature: str = "captions"
  dir: str | None = None

  def __post_init__(self):
    if not len(self):
      raise ValueError(f"config: source: split {self.split!r} of {self.name} is empty.")

  @functools.cached_property
  def _records(self) -> Any:
    built = self._built
    decoders = {self.image: tfds.decode.SkipDecoding()}
    try:
      return built.as_data_source(split=self.split, decoders=decoders)
    except (ValueError, KeyError) as error:
      raise ValueError(
        f"config: source.split={self.split!r}: {self.name} has"
        f" {', '.join(built.info.splits)}."
      ) from error

  @functools.cached_property
  def _built(self):
    data_dir = str(pathlib.Path(self.data_dir).expanduser())
    fields = dict(self.builder)
    if self.dir is not None:
      fields["source_dir"] = self.dir
    ours = sorted(f.stem for f in BUILDERS.glob("*.py") if f.stem not in NOT_BUILDERS)
    if self.name in ours:
      module, cls = f"vlp_jax.data.builders.{self.name}", "Builder"
    elif ":" in self.name:
      module, _, cls = self.name.partition(":")
    else:
      return self._registered(data_dir, fields, ours)
    builder = getattr(importlib.import_module(module), cls)
    try:
      return prepare.prepare(builder, data_dir=data_dir, **fields)
    except TypeError as error:
      raise ValueError(f"config: source.builder of {self.name}: {error}.") from error

  def _registered(self, data_dir, fields, ours):
    try:
      built = tfds.builder(
        self.name, data_dir=data_dir, file_format="array_record", **fields
      )
    except tfds.core.registered.DatasetNotFoundError as error:
      raise ValueError(
        f"config: source.name={self.name!r}: neither a file of data/builders/ (there"
        f" are {', '.join(ours)}) nor a data set of TFDS."
      ) from error
    built.download_and_prepare()
    return built

  def __len__(self) -> int:
    return len(self._records)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples: image (bytes), captions, image_id, key, and words if it has them."""
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
    captions = record[self.captions_feature]
    if isinstance(captions, str | bytes):
      captions = [captions]
    key = record.get("key", f"{self.name}/{self.split}/{index}")
    example = {
      "image": record[self.image],
      "captions": list(captions),
      "image_id": int(record.get("image_id", index)),
      "key": key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key),
    }
    if "words" in record:
      example["words"] = [
        w.decode() if isinstance(w, bytes) else w for w in record["words"]
      ]
    return example
