"""Grad-CAM against ALBEF's visualization.ipynb: weights, gradients and maps.

tests/reference/albef holds them of the first pair, of both layers that see the image;
tolerance as in test_parity_albef.py.
"""

import jax
import numpy as np
import pytest

from tests import test_parity_albef
from vlp_jax.explain import attention

close = test_parity_albef.close


@pytest.fixture(scope="module")
def seen():
  """(weights, gradient) [K, 1, N, L, S] of the first pair."""
  inputs = dict(np.load(test_parity_albef.REFERENCE / "inputs.npz"))
  params = test_parity_albef.load(test_parity_albef.REFERENCE / "weights.safetensors")
  return attention.cross_attention(
    test_parity_albef.pretrainer(alpha=0.0),
    jax.tree.map(np.asarray, params.params),
    inputs["image"][:1].transpose(0, 2, 3, 1),
    inputs["input_ids"][:1].astype(np.int32),
    inputs["attention_mask"][:1] > 0,
  )


@pytest.mark.parametrize("layer", [0, 1])
def test_maps_of_the_notebook(seen, layer):
  expected = np.load(test_parity_albef.REFERENCE / "expected.npz")
  lower = test_parity_albef.BERT["fusion_layer"]
  name = f"gradcam/layer{lower + layer}"
  weights, gradient = seen
  close(weights[layer], expected[f"{name}/attention_item0"])
  close(gradient[layer], expected[f"{name}/attention_grad_item0"])
  maps = attention.word_maps(weights, (4, 4), layer=layer, gradient=gradient)
  close(maps[0], expected[f"{name}/map_item0"])
