"""Live parity with transformers, at other sizes than the reference directories.

Runs where torch and transformers are installed: random models of theirs by our towers,
and what we write read by `from_pretrained`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_albef
from tests.interop import test_hf
from vlp_jax.interop import hf_bert
from vlp_jax.interop import hf_vit
from vlp_jax.models import vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

close = test_parity_albef.close
SIZES = dict(
  hidden_size=40,
  num_hidden_layers=3,
  num_attention_heads=5,
  intermediate_size=72,
  initializer_range=0.3,
  attn_implementation="eager",
)


@pytest.mark.parametrize("kind, act", [("Bert", "gelu_new"), ("Roberta", "relu")])
def test_text(kind, act, tmp_path):
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(
    vocab_size=160, max_position_embeddings=24, hidden_act=act, **SIZES
  )
  model = getattr(transformers, f"{kind}Model")(config).eval()
  rng = np.random.default_rng(0)
  mask = np.arange(11) < np.array([[11], [6], [3]])
  ids = np.where(mask, rng.integers(5, 160, (3, 11)), config.pad_token_id)

  def theirs(model):
    tensors = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    with torch.no_grad():
      return model(**tensors).last_hidden_state.numpy()

  model.save_pretrained(tmp_path / "theirs")
  loaded = hf_bert.load(tmp_path / "theirs")
  inputs = jnp.asarray(ids, jnp.int32), jnp.asarray(mask), None
  got = test_hf.read_text(loaded.fields, loaded.params["model"]["text"], *inputs)
  close(got, theirs(model))
  hf_bert.save(tmp_path / "ours", loaded)
  again = getattr(transformers, f"{kind}Model").from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  )
  np.testing.assert_array_equal(theirs(again.eval()), theirs(model))


def test_images(tmp_path):
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    image_size=36, patch_size=12, layer_norm_eps=1e-6, hidden_act="quick_gelu", **SIZES
  )
  model = transformers.ViTModel(config).eval()
  image = np.random.default_rng(0).normal(size=(2, 3, 36, 36)).astype(np.float32)

  def theirs(model):
    with torch.no_grad():
      return model(torch.tensor(image)).last_hidden_state.numpy()

  model.save_pretrained(tmp_path / "theirs")
  loaded = hf_vit.load(tmp_path / "theirs")
  module = vit.Encoder(**loaded.fields)
  params = jax.tree.map(jnp.asarray, loaded.params["model"]["image"])
  got = module.apply({"params": params}, jnp.asarray(image.transpose(0, 2, 3, 1))).x
  close(got, theirs(model))
  hf_vit.save(tmp_path / "ours", loaded)
  again = transformers.ViTModel.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  )
  np.testing.assert_array_equal(theirs(again.eval()), theirs(model))
