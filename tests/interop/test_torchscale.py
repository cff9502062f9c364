"""Live parity with torchscale's BEiT3, at other sizes than the stored outputs.

Runs where torch and torchscale (with fairscale and timm, which it imports) are
installed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_parity_albef import close
from vlp_jax.interop import beit3
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import experts

torch = pytest.importorskip("torch")
model_lib = pytest.importorskip("torchscale.model.BEiT3")
config_lib = pytest.importorskip("torchscale.architecture.config")

WIDTH, HEADS, MLP, DEPTH, WORDS = 40, 5, 72, 2, 61


@pytest.fixture(scope="module")
def theirs():
  torch.manual_seed(3)
  config = config_lib.EncoderConfig(
    multiway=True,
    img_size=36,
    patch_size=12,
    vocab_size=WORDS,
    encoder_embed_dim=WIDTH,
    encoder_attention_heads=HEADS,
    encoder_ffn_embed_dim=MLP,
    encoder_layers=DEPTH,
    max_source_positions=24,
    no_output_layer=True,
  )
  model = model_lib.BEiT3(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn(parameter.shape))
  return model


def test_pairs_images_and_texts(theirs, tmp_path):
  tensors = {f"beit3.{k}": x.numpy() for k, x in theirs.state_dict().items()}
  reader.save(tmp_path / "beit3.pth", tensors, key="model")
  loaded = beit3.load(tmp_path / "beit3.pth", num_heads=HEADS, key="model")
  sizes = dict(num_heads=HEADS, mlp_dim=MLP)
  vocab = dataclasses.replace(tiny.VOCAB, size=WORDS)
  words = dict(vocab=vocab, length=24, types=0, first_position=2, norm="pre")
  net = vlm.VLM(
    image=vit.Encoder(WIDTH, 0, HEADS, MLP, patch=12, res=36, mask_token=True),
    text=text.Encoder(width=WIDTH, depth=0, **sizes, **words),
    fusion=experts.Fusion(WIDTH, WIDTH, depth=DEPTH, **sizes),
    embed_dim=None,
  )
  rng = np.random.default_rng(0)
  image = rng.normal(size=(3, 3, 36, 36)).astype(np.float32)
  ids = rng.integers(4, WORDS, (3, 9))
  real = np.arange(9) < np.array([[9], [5], [2]])
  pixels = jnp.asarray(image.transpose(0, 2, 3, 1))

  @jax.jit
  def ours(params):
    def read(self):
      seen, written = self.encode_image(pixels), self.words(jnp.asarray(ids), real)
      return (
        seen.x,
        self.encode_text(jnp.asarray(ids), real).x,
        self.fuse(seen, written),
      )

    return net.apply({"params": params}, method=read)

  def run(**given):
    with torch.no_grad():
      return theirs(**given)["encoder_out"].numpy()

  seen, read, fused = ours(loaded.params["model"])
  words = dict(
    textual_tokens=torch.tensor(ids), text_padding_position=torch.tensor(~real)
  )
  shown = dict(visual_tokens=torch.tensor(image))
  close(seen, run(**shown))
  at = real[..., None]
  close(np.where(at, read, 0), np.where(at, run(**words), 0))
  both = run(**words, **shown)
  close(fused.image.x, both[:, :10])
  close(np.where(at, fused.x, 0), np.where(at, both[:, 10:], 0))
  # And what is written is what was read.
  back = beit3.export(loaded.params)
  state = {k.removeprefix("beit3."): torch.tensor(x) for k, x in back.items()}
  theirs.load_state_dict(state, strict=True)
  np.testing.assert_array_equal(run(**words, **shown), both)
