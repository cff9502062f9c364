"""What a global batch looks like, and which model takes it."""

import pytest

from tests import tiny
from vlp_jax import batch as batch_lib
from vlp_jax.models import patches


def test_padded_images_want_an_encoder_that_takes_sizes():
  batch_lib.check_takes_sizes(patches.Encoder(width=8, patch=4, res=16))
  with pytest.raises(ValueError, match=r'model.image.type="patches", or resize'):
    batch_lib.check_takes_sizes(tiny.model().image)
  with pytest.raises(ValueError, match=r"say model.image.type='naflex', or resize"):
    batch_lib.check_takes_sizes(tiny.model().image, grids=True)
