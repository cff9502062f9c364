"""What a global batch looks like, and which model takes it."""

import numpy as np
import pytest

from tests import tiny
from vlp_jax import batch as batch_lib
from vlp_jax.data import columns
from vlp_jax.data import vocab as vocab_lib
from vlp_jax.models import patches


def test_padded_images_want_an_encoder_that_takes_sizes():
  batch_lib.check_takes_sizes(patches.Encoder(width=8, patch=4, res=16))
  with pytest.raises(ValueError, match=r'model.image.type="patches", or resize'):
    batch_lib.check_takes_sizes(tiny.model().image)
  with pytest.raises(ValueError, match=r"say model.image.type='naflex', or resize"):
    batch_lib.check_takes_sizes(tiny.model().image, grids=True)


def test_noise_stands_for_a_batch():
  vocab = vocab_lib.Vocab(size=12, pad=0, unk=1, cls=11, sep=10, mask=None)
  specs = batch_lib.with_sizes(batch_lib.spec(64, 8, 5))
  got = batch_lib.noise(specs, vocab)
  assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
    k: (v.shape, v.dtype) for k, v in specs.items()
  }
  assert set(np.unique(got["text"][:, 1:])) == set(range(2, 10))
  assert (got["text"][:, 0] == vocab.cls).all() and got["text_mask"].all()
  assert len(np.unique(got["image_id"])) == 64
  assert (got["image_size"] == 8).all()
  again, other = batch_lib.noise(specs, vocab), batch_lib.noise(specs, vocab, seed=1)
  assert (again["image"] == got["image"]).all()
  assert (other["image"] != got["image"]).any()


def test_noise_of_regions_and_of_several_kinds_of_data():
  vocab = vocab_lib.Vocab(size=12, pad=0, unk=1, cls=2, sep=3, mask=4)
  kinds = dict(
    pairs=batch_lib.spec(
      4, (3, 7), 5, columns=columns.Columns(dict(label=((), np.int32)))
    ),
    texts=batch_lib.spec(2, 8, 5, holds="texts"),
  )
  got = batch_lib.noise(kinds, vocab)
  assert got["pairs"]["image"].dtype == np.float32 and got["pairs"]["image"].std() > 0
  assert (got["pairs"]["label"] == 0).all()
  assert set(got["texts"]) == set(kinds["texts"])
