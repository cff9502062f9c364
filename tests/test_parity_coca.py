"""Against open_clip's CoCa: features, losses, all gradients, and the texts it writes.

tests/reference/openclip_coca holds what coca_model.CoCa and CoCaLoss compute from a
small checkpoint. Tolerance as in test_parity_albef.py. Its decoder masks no padding;
ours does, so rows of padding, which no loss reads, differ and are left out.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import coca
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.nn import ask
from vlp_jax.objectives import itc
from vlp_jax.objectives import lm
from vlp_jax.ops import decode

REFERENCE = pathlib.Path(__file__).parent / "reference" / "openclip_coca"
SIZE = json.loads((REFERENCE / "config.json").read_text())
HEADS = dict(num_heads_image=4, num_heads_text=4, num_heads_pool=4)


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = SIZE["text_cfg"]["vocab_size"]
  pad: int = SIZE["pad_id"]
  cls: int = SIZE["sot"]
  sep: int = SIZE["eot"]
  mask: int = 1


def pretrainer():
  """The model that `config.json` describes, from the modules that configs name."""
  image, words = SIZE["vision_cfg"], SIZE["text_cfg"]
  clip = dict(norm="pre", norm_eps=1e-5)
  stack = dict(num_heads=words["heads"], mlp_dim=4 * words["width"], **clip)
  model = vlm.VLM(
    image=vit.Encoder(
      width=SIZE["embed_dim"],
      trunk_width=image["width"],
      depth=image["layers"],
      num_heads=image["width"] // image["head_width"],
      mlp_dim=4 * image["width"],
      patch=image["patch_size"],
      res=image["image_size"],
      patch_bias=False,
      norm_pre=True,
      queries=image["attn_pooler_queries"],
      query_heads=image["attn_pooler_heads"],
      **clip,
    ),
    text=text.Encoder(
      vocab=Vocab(),
      width=words["width"],
      depth=words["layers"],
      length=words["context_length"] + 1,
      types=0,
      attention="causal",
      class_token="shifted",
      **stack,
    ),
    fusion=cross_attention.Fusion(
      depth=SIZE["multimodal_cfg"]["layers"],
      mlp_before=True,
      norm_memory=True,
      **stack,
    ),
    embed_dim=SIZE["embed_dim"],
    scale="log_scale",
    project_bias=False,
  )
  plain = dict(transform=False, tied=False, bias=False)
  return pretrainer_lib.Pretrainer(
    model,
    dict(itc=itc.Objective(), lm=lm.Objective(Vocab(), words["width"], **plain)),
    dict(itc=SIZE["clip_loss_weight"], lm=SIZE["caption_loss_weight"]),
  )


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def inputs():
  given = np.load(REFERENCE / "inputs.npz")
  ids = given["text"].astype(np.int32)
  batch = dict(
    image=given["image"].transpose(0, 2, 3, 1),
    text=ids,
    text_mask=ids != SIZE["pad_id"],
    image_id=np.arange(len(ids), dtype=np.int32),
  )
  return {key: jnp.asarray(value) for key, value in batch.items()}


def forward(self, batch):
  loss, parts = self(batch)
  enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
  ids, mask = batch["text"], batch["text_mask"]
  named = {
    "loss": loss.value(),
    "contrastive_loss": parts["itc"].value() * self.weights["itc"],
    "caption_loss": parts["lm"].value() * self.weights["lm"],
    "image_features": enc.zimg,
    "text_features": enc.ztxt,
    "image_embs": enc.image.x,
    "token_embs": enc.text.x,
    "logits": self.objectives["lm"].logits(self.model, enc.image, ids, mask),
    "logit_scale": self.model.inverse_temperature(),
  }
  return loss.value(), named


@pytest.fixture(scope="module")
def params():
  loaded = coca.load(REFERENCE / "checkpoint.pt", **HEADS)
  return jax.tree.map(jnp.asarray, loaded.params)


@pytest.fixture(scope="module")
def official(params):
  """(named arrays, gradients) by our modules."""
  run = lambda p: pretrainer().apply({"params": p}, inputs(), method=forward)
  (_, named), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  return named, grads


@pytest.mark.parametrize(
  "name",
  "loss contrastive_loss caption_loss image_features text_features image_embs"
  " token_embs logits logit_scale".split(),
)
def test_forward(official, name):
  got, want = official[0][name], np.load(REFERENCE / "expected.npz")[name]
  if name in ("token_embs", "logits"):
    real = np.asarray(inputs()["text_mask"])
    got, want = got[real], want[real]
  close(got, want, name)


def test_all_gradients(official):
  got = coca.export(jax.tree.map(np.asarray, official[1]))
  theirs = reader.load(REFERENCE / "grads_all.safetensors")
  assert len(theirs) == 127
  for name, want in theirs.items():
    close(got[name], want, name)


@pytest.mark.parametrize("name", ["greedy", "beam3"])
def test_generation(params, name):
  """The ids that transformers 5 writes, by the official `generate`."""
  args = SIZE["generate"][name]
  settings = decode.Settings(
    max_length=args["max_length"],
    min_length=args["min_length"],
    beams=args["num_beams"],
    eos=Vocab.sep,
    pad=Vocab.pad,
    rules="since_4.50",
  )

  def write(self, image):
    start = jnp.full((image.shape[0], 1), Vocab.cls, jnp.int32)
    tokens = self.model.encode_image(image)
    return self.objectives["lm"].generate(self.model, tokens, start, settings)

  run = jax.jit(
    lambda p: pretrainer().apply({"params": p}, inputs()["image"], method=write)
  )
  want = np.load(REFERENCE / "expected.npz")[f"generate/{name}"]
  np.testing.assert_array_equal(run(params), want)
