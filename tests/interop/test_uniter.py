"""UNITER's layout there and back: a random state dict of the official names and shapes.

The names are those of ChenRocks/UNITER model/pretrain.py UniterForPretraining, written
out here by hand; what they compute is tested in tests/test_uniter.py.
"""

import jax
import numpy as np
import pytest

from vlp_jax.interop import formats
from vlp_jax.interop import initial
from vlp_jax.interop import reader
from vlp_jax.interop import uniter
from vlp_jax.ops import tree

WIDTH, MLP, LAYERS, WORDS, LENGTH, FEATURES, CLASSES = 16, 32, 2, 60, 20, 12, 9
TIED = {
  "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
  "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}


def shapes():
  """{official name: shape} of a small UniterForPretraining."""
  found = {}

  def linear(name, into, out):
    found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

  def norm(name):
    found.update({f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)})

  text, image = "uniter.embeddings", "uniter.img_embeddings"
  found[f"{text}.word_embeddings.weight"] = (WORDS, WIDTH)
  found[f"{text}.position_embeddings.weight"] = (LENGTH, WIDTH)
  found[f"{text}.token_type_embeddings.weight"] = (2, WIDTH)
  norm(f"{text}.LayerNorm")
  linear(f"{image}.img_linear", FEATURES, WIDTH)
  norm(f"{image}.img_layer_norm")
  norm(f"{image}.pos_layer_norm")
  linear(f"{image}.pos_linear", 7, WIDTH)
  found[f"{image}.mask_embedding.weight"] = (2, FEATURES)
  norm(f"{image}.LayerNorm")
  for i in range(LAYERS):
    layer = f"uniter.encoder.layer.{i}"
    for part in ("query", "key", "value"):
      linear(f"{layer}.attention.self.{part}", WIDTH, WIDTH)
    linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
    norm(f"{layer}.attention.output.LayerNorm")
    linear(f"{layer}.intermediate.dense", WIDTH, MLP)
    linear(f"{layer}.output.dense", MLP, WIDTH)
    norm(f"{layer}.output.LayerNorm")
  linear("uniter.pooler.dense", WIDTH, WIDTH)
  found["cls.predictions.bias"] = (WORDS,)
  linear("cls.predictions.transform.dense", WIDTH, WIDTH)
  norm("cls.predictions.transform.LayerNorm")
  linear("feat_regress.net.0", WIDTH, WIDTH)
  norm("feat_regress.net.2")
  found["feat_regress.bias"] = (FEATURES,)
  linear("region_classifier.net.0", WIDTH, WIDTH)
  norm("region_classifier.net.2")
  linear("region_classifier.net.3", WIDTH, CLASSES)
  linear("itm_output", WIDTH, 2)
  return found


def state(seed=0):
  """A random state dict; norms are near 1, and tied tensors are there twice."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in shapes().items():
    x = 0.5 * rng.normal(size=shape)
    is_norm = name.endswith("weight") and len(shape) == 1
    tensors[name] = (1.0 + 0.2 * x if is_norm else x).astype(np.float32)
  tensors["uniter.img_embeddings.mask_embedding.weight"][0] = 0.0
  return tensors | {copy: tensors[name] for copy, name in TIED.items()}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "uniter.pt"
  reader.save(path, state())
  return path


def test_there_and_back_bit_by_bit(tmp_path, file):
  assert formats.find(file) == "uniter"
  again = tmp_path / "again.pt"
  loaded = formats.load(file, None, dict(num_heads=4))
  formats.save(again, loaded, "uniter")
  got, want = reader.load(again), state()
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].dtype, got[name].tobytes()) == (x.dtype, x.tobytes()), name


def test_names_of_before_the_renaming(tmp_path, file):
  old = {name.replace("uniter.", "bert."): x for name, x in state().items()}
  path = tmp_path / "bert.pt"
  reader.save(path, old)
  assert formats.find(path) == "uniter"
  one, two = (uniter.load(p, num_heads=4).params for p in (path, file))
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_types_and_the_mask_go_where_they_are_read(file):
  params, theirs = tree.flatten(uniter.load(file, num_heads=4).params), state()
  types = theirs["uniter.embeddings.token_type_embeddings.weight"]
  np.testing.assert_array_equal(params["model/text/type/embedding"], types[:1])
  np.testing.assert_array_equal(params["model/image/type/embedding"], types[1:])
  mask = theirs["uniter.img_embeddings.mask_embedding.weight"]
  np.testing.assert_array_equal(params["model/image/mask"], mask[1])


def test_what_does_not_fit_is_told(tmp_path, file):
  params = uniter.load(file, num_heads=4).params
  spec = dict(type="uniter", path=str(file))
  got = initial.load(spec, params)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  wider = dict(params) | dict(
    objectives_mrc=dict(decoder=dict(kernel=np.zeros((3, 2))))
  )
  with pytest.raises(ValueError) as error:
    initial.load(spec, wider)
  for text in ("objectives_mrc/decoder/kernel", "no place for", "region_classifier"):
    assert text in str(error.value)
  broken = state()
  broken["feat_regress.weight"] = broken["feat_regress.weight"] + 1
  del broken["itm_output.bias"]
  path = tmp_path / "broken.pt"
  reader.save(path, broken)
  with pytest.raises(ValueError, match="tied tensors that differ"):
    uniter.load(path, num_heads=4)
  with pytest.raises(ValueError, match="not of UNITER's kind"):
    uniter.export({"model": {"image": {"patch": np.zeros(2)}}})
