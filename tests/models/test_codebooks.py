"""Codebooks. The dVAE: equal to transformers', frozen, and read from files.

tests/reference/hf/flava_codebook: FlavaImageCodebook of transformers; see its README.
Tolerance as in test_parity_albef.py.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_parity_albef import close
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import hf_codebook
from vlp_jax.interop import reader
from vlp_jax.models.codebooks import dvae
from vlp_jax.models.codebooks import vqkd
from vlp_jax.ops import blocks

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "hf" / "flava_codebook"
SMALL = dvae.Codebook(res=32, hidden=8, codes=20)


def read(params, pixels, made=SMALL):
  """(logits, codes) of pixels [B, 3, S, S] that are mapped."""
  x = jnp.asarray(pixels.transpose(0, 2, 3, 1))
  logits = made.apply({"params": params["model"]["codebook"]}, x, method="logits")
  codes = made.apply({"params": params["model"]["codebook"]}, (x - 0.1) / 0.8)
  return logits, codes


def test_equal_to_transformers():
  inputs = np.load(REFERENCE / "inputs.npz")
  want = np.load(REFERENCE / "expected.npz")
  logits, codes = read(hf_codebook.load(REFERENCE).params, inputs["pixel_values"])
  close(logits.reshape(2, 4, 4, 20).transpose(0, 3, 1, 2), want["logits"])
  np.testing.assert_array_equal(codes.reshape(2, 4, 4), want["codes"])
  assert codes.dtype == jnp.int32


def test_equal_to_transformers_at_other_sizes(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(1)
  config = transformers.FlavaImageCodebookConfig(
    hidden_size=12, vocab_size=31, num_blocks_per_group=1
  )
  model = transformers.FlavaImageCodebook(config).eval()
  model.save_pretrained(tmp_path / "theirs")
  pixels = np.random.default_rng(2).uniform(size=(3, 3, 48, 48)).astype(np.float32)
  with torch.no_grad():
    want = model(torch.tensor(pixels)).numpy()
  loaded = hf_codebook.load(tmp_path / "theirs")
  made = dvae.Codebook(res=48, hidden=12, blocks=1, codes=31)
  logits, _ = read(loaded.params, pixels, made)
  close(logits.reshape(3, 6, 6, 31).transpose(0, 3, 1, 2), want)
  # And what is written is read by transformers.
  hf_codebook.save(tmp_path / "ours", hf_codebook.Checkpoint(loaded.params))
  again = transformers.FlavaImageCodebook.from_pretrained(tmp_path / "ours").eval()
  with torch.no_grad():
    np.testing.assert_array_equal(again(torch.tensor(pixels)).numpy(), want)


def test_round_trip(tmp_path):
  assert formats.find(REFERENCE) == "hf_codebook"
  hf_codebook.save(tmp_path / "back", hf_codebook.load(REFERENCE))
  before, after = hf.read(REFERENCE), hf.read(tmp_path / "back")
  assert before.config == after.config
  assert before.tensors.keys() == after.tensors.keys()
  for key, x in before.tensors.items():
    assert x.tobytes() == after.tensors[key].tobytes()


def test_tensors_of_openai(tmp_path):
  """By the names that openai/DALL-E's modules have; its pickle is refused."""
  ends = {"weight": "w", "bias": "b"}
  theirs = {}
  for name, x in hf.read(REFERENCE).tensors.items():
    path, _, end = name.rpartition(".")
    inner = path.replace(".group.", ".").replace(".res_path.path.", ".res_path.")
    theirs[f"{inner}.{ends[end]}"] = x
  assert "blocks.group_2.block_1.id_path.w" in theirs
  assert "blocks.group_1.block_2.res_path.conv_4.b" in theirs
  reader.save(tmp_path / "encoder.safetensors", theirs)
  got = hf_codebook.load(tmp_path / "encoder.safetensors").params
  want = hf_codebook.load(REFERENCE).params
  jax.tree.map(np.testing.assert_array_equal, got, want)
  (tmp_path / "encoder.pkl").write_bytes(b"\x80\x02cdall_e.encoder\nEncoder\n.")
  with pytest.raises(ValueError, match="facebook/flava-image-codebook"):
    hf_codebook.load(tmp_path / "encoder.pkl")


def test_starts_a_part_of_a_model():
  params = hf_codebook.load(REFERENCE).params
  whole = {"model": params["model"] | {"other": np.zeros(3)}}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
  got = hf_codebook.init(shapes, path=REFERENCE)
  jax.tree.map(
    np.testing.assert_array_equal, got["model"]["codebook"], params["model"]["codebook"]
  )
  assert isinstance(got["model"]["other"], jax.ShapeDtypeStruct)
  with pytest.raises(ValueError, match="no dVAE"):
    hf_codebook.init({"model": {"other": np.zeros(3)}}, path=REFERENCE)
  made = lambda x: nn.unbox(SMALL.clone(codes=24).init(jax.random.key(0), x))["params"]
  wider = {"model": {"codebook": jax.eval_shape(made, jnp.zeros((1, 32, 32, 3)))}}
  with pytest.raises(ValueError, match=r"output.*24"):
    hf_codebook.init(wider, path=REFERENCE)


def test_an_image_of_another_size_is_made_small():
  image = jnp.linspace(0, 1, 64)[None, :, None, None] * jnp.ones((2, 64, 64, 3))
  small = SMALL.small(image)
  assert small.shape == (2, 32, 32, 3)
  assert 0.1 <= small.min() and small.max() <= 0.9 + 1e-6
  np.testing.assert_allclose(small[0, 16, 5, 0], 0.1 + 0.8 * 32.5 / 63, atol=2e-3)


# --- BEiT v2's tokenizer; its files are in tests/interop/test_vqkd.py -----------------


@pytest.mark.parametrize("unit", [True, False])
def test_the_nearest_code(unit):
  """Against slow numpy: the largest cosine where codes have length 1, as published."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 7, 5)).astype(np.float32)
  x[1, 2] = 0.0
  table = rng.normal(size=(40, 5)).astype(np.float32)
  table[30] = table[4]  # Of two that are as near, the first.
  if unit:
    table /= np.linalg.norm(table, axis=1, keepdims=True)
  got = vqkd.nearest(jnp.asarray(x), jnp.asarray(table))
  assert got.shape == (3, 7) and got.dtype == jnp.int32
  for b, p in np.ndindex(3, 7):
    length = np.linalg.norm(x[b, p])
    z = x[b, p] / length if length else x[b, p]
    assert got[b, p] != 30
    if unit and length:
      assert got[b, p] == max(range(40), key=lambda j: z @ table[j] - 1e-6 * j)
    if not unit:
      assert got[b, p] == min(range(40), key=lambda j: ((z - table[j]) ** 2).sum())


def test_pixels_and_sizes_of_the_tokenizer():
  made = vqkd.Codebook(
    res=16, patch=8, width=8, depth=1, num_heads=2, mlp_dim=8, codes=6, code_width=4
  )
  image = jnp.linspace(0, 1, 32)[None, :, None, None] * jnp.ones((2, 32, 32, 3))
  small = made.small(image)
  assert small.shape == (2, 16, 16, 3) and made.patches == 4
  assert -1 <= small.min() and small.max() <= 1
  np.testing.assert_allclose(small[0, 5, 3, 0], 2 * (10.5 / 31) - 1, atol=2e-3)
  np.testing.assert_array_equal(
    made.small(image[:, :16, :16]), 2 * image[:, :16, :16] - 1
  )
  # Drawn codes have length 1.
  params = nn.unbox(jax.jit(made.init)(jax.random.key(0), image))["params"]
  np.testing.assert_allclose(jnp.linalg.norm(params["table"], axis=1), 1.0, rtol=1e-6)
  with pytest.raises(
    ValueError, match=r"model\.codebook: res=16 is not a mult.*patch=7"
  ):
    jax.eval_shape(made.clone(patch=7).init, jax.random.key(0), image)


# --- Which patches are hidden ---------------------------------------------------------


def test_blocks_hide_as_many_of_each_image_and_mostly_together():
  hidden = np.asarray(blocks.hide(jax.random.key(0), 256, 196, 75 / 196, least=16))
  assert hidden.shape == (256, 196) and hidden.dtype == bool
  assert (hidden.sum(axis=1) == 75).all()
  grid = hidden.reshape(256, 14, 14)
  pairs = lambda g: (g[:, 1:] & g[:, :-1]).sum() + (g[:, :, 1:] & g[:, :, :-1]).sum()
  even = np.random.default_rng(0).permuted(hidden, axis=1).reshape(256, 14, 14)
  assert pairs(grid) > 1.8 * pairs(even)
  # Everywhere, and differently.
  assert hidden.any(axis=0).all()
  assert len({row.tobytes() for row in hidden}) == 256
  with pytest.raises(ValueError, match="square"):
    blocks.hide(jax.random.key(0), 2, 15, 0.4)
  with pytest.raises(ValueError, match="some and not all"):
    blocks.hide(jax.random.key(0), 2, 16, 1.0)
