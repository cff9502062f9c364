"""Tests of data read as a run does when it has been going on for a while."""

import pytest

from vlp_jax.data import pipeline


@pytest.fixture(autouse=True, scope="session")
def imported():
  """TensorFlow is there: batches come from tf.data from the first on."""
  pipeline.tensorflow()
