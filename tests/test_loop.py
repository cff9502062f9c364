"""What a run says of itself."""

import types

import numpy as np
import pytest

from vlp_jax import loop


@pytest.mark.parametrize(
  ("sizes", "text"),
  [
    (dict(image=500_000, text=200_000), "0.7 M parameters (image 0.5 M, text 0.2 M);"),
    (dict(image=600_000, temp=1), "0.6 M parameters (image 0.6 M);"),
    (dict(image=40_000, text=20_000), "0.1 M parameters;"),
  ],
)
def test_the_first_line_names_the_parts_that_are_large(sizes, text):
  params = dict(model={name: np.zeros(size) for name, size in sizes.items()})
  device = types.SimpleNamespace(device_kind="cpu")
  job = types.SimpleNamespace(
    mesh=types.SimpleNamespace(devices=np.array([[[device]]]), size=1),
    time=types.SimpleNamespace(total=40),
    config=types.SimpleNamespace(batch_size=16),
  )
  line = loop._summary(job, types.SimpleNamespace(params=params))
  assert line == f"{text} 40 steps of 16 examples; 1 x cpu, mesh 1x1x1"
