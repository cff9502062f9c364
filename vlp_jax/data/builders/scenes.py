"""Rendered scenes as a TFDS data set: drawn once, then read at the disk's speed."""

import hashlib

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import scenes
from vlp_jax.data.builders import prepare
from vlp_jax.data.sources import scenes as source_lib


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The examples of sources/scenes.py, in the same order.

  The folder's name holds the fields and a digest of a few drawn examples, so that
  data which another version of the drawing made are never taken for these.

  Args:
    data_dir: where prepared data go, to `data_dir/scenes/CONFIG/VERSION`.
    train_size, val_size, test_size: see the Source's size.
    res, seed, one, twins, rivalry: as its fields.
  """

  name = "scenes"
  VERSION = tfds.core.Version("1.0.0")
  url_infos = prepare.NO_DOWNLOADS

  def __init__(
    self,
    *,
    data_dir: str,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    res: int = 64,
    seed: int = 0,
    one: float = 0.2,
    twins: float = 0.5,
    rivalry: float = 0.0,
  ):
    fields = dict(res=res, seed=seed, one=one, twins=twins, rivalry=rivalry)
    sizes = dict(train=train_size, val=val_size, test=test_size)
    self._sources = {
      name: source_lib.Source(split=name, size=sizes[name], **fields)
      for name in scenes.SPLITS
    }
    counts = "-".join(f"{name}{len(s)}" for name, s in self._sources.items())
    config = f"{counts}-res{res}-seed{seed}-{_digest(self._sources.values())}"
    super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=config))

  def _info(self) -> tfds.core.DatasetInfo:
    return prepare.Info(
      builder=self,
      description="Scenes of one or two coloured shapes, with captions.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "image_id": tfds.features.Scalar(np.int32),
          "key": tfds.features.Text(),
          "words": tfds.features.Sequence(tfds.features.Text()),
        }
      ),
      disable_shuffling=True,  # example i is example i of the Source
    )

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(name) for name in self._sources}

  def _generate_examples(self, name):
    source = self._sources[name]
    for index in range(len(source)):
      (example,) = source.read([index])
      yield index, example


def _digest(sources) -> str:
  """Eight letters that change with the drawing, the captions and the splits."""
  digest = hashlib.blake2b(digest_size=4)
  for source in sources:
    for example in source.read(range(min(4, len(source)))):
      digest.update(repr(sorted(example.items())).encode())
    # The held-out descriptions, all of them: twins and singles change no picture.
    digest.update(source.numbers.tobytes())
    digest.update(repr(source.rivalry).encode())
  return digest.hexdigest()
