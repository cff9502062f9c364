"""Against the official PyTorch code of BLIP: losses, gradients, teacher, queues, ids.

tests/reference/blip_* hold what salesforce/BLIP models/blip_pretrain.py and blip.py
compute from small checkpoints of the official layout. Tolerance as in
test_parity_albef.py.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_albef
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import blip
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import interleaved
from vlp_jax.nn import ask
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import lm
from vlp_jax.ops import decode
from vlp_jax.ops import tree

REFERENCE = pathlib.Path(__file__).parent / "reference"
HEADS = dict(num_heads_image=4, num_heads_text=4)


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = 202
  pad: int = 0
  cls: int = 101
  sep: int = 102
  mask: int = 103
  dec: int | None = 200
  enc: int | None = 201


def sizes(name):
  return json.loads((REFERENCE / name / "config.json").read_text())


def arrays(name, file):
  return dict(np.load(REFERENCE / name / f"{file}.npz"))


def vlm_of(size, **fields):
  """The model that a `config.json` describes, from the modules that configs name."""
  bert, image = size["med_config"], size["vit"]
  common = dict(
    num_heads=bert["num_attention_heads"],
    mlp_dim=bert["intermediate_size"],
    norm_eps=bert["layer_norm_eps"],
  )
  fields = dict(vocab=Vocab(), reads=("bidirectional", "causal")) | fields
  return vlm.VLM(
    image=vit.Encoder(
      width=image["embed_dim"],
      depth=image["depth"],
      num_heads=image["num_heads"],
      mlp_dim=image["embed_dim"] * image["mlp_ratio"],
      patch=image["patch_size"],
      res=image["img_size"],
      norm_eps=image["norm_eps"],
    ),
    text=text.Encoder(
      vocab=fields["vocab"],
      width=bert["hidden_size"],
      depth=0,
      length=bert["max_position_embeddings"],
      types=0,
      **common,
    ),
    fusion=interleaved.Fusion(
      depth=bert["num_hidden_layers"],
      image_width=image["embed_dim"],
      reads=fields["reads"],
      **common,
    ),
    embed_dim=size.get("embed_dim"),
  )


def pretrainer():
  size = sizes("blip_pretrain")
  width = size["med_config"]["hidden_size"]
  return pretrainer_lib.Pretrainer(
    vlm_of(size),
    dict(
      itc=itc.Objective(
        queue=size["queue_size"], distill=size["alpha"], targets="pair"
      ),
      itm=itm.Objective(width=width, exclude="pair"),
      lm=lm.Objective(vocab=Vocab(), width=width, smoothing=0.1),
    ),
    dict(itc=1.0, itm=1.0, lm=1.0),
  )


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def gradients_close(params, theirs):
  """As in test_parity_albef.py: the bias of a key has no gradient but rounding."""
  got = blip.export(jax.tree.map(np.asarray, params))
  largest = max(np.abs(x).max() for x in theirs.values())
  for name, want in theirs.items():
    if name.endswith(".key.bias"):
      np.testing.assert_allclose(got[name], want, atol=1e-5 * largest, err_msg=name)
      continue
    close(got[name], want, name)


def batch_of(inputs, text="input_ids", mask="attention_mask"):
  batch = dict(
    image=inputs["image"].transpose(0, 2, 3, 1),
    text=inputs[text].astype(np.int32),
    text_mask=inputs[mask] > 0,
    image_id=np.arange(len(inputs["image"]), dtype=np.int32),
  )
  return {key: jnp.asarray(value) for key, value in batch.items()}


def forward(self, batch, ema, mined):
  """Every named array of the official forward pass, and the three losses."""
  model, objectives = self.model, self.objectives
  enc = pretrainer_lib.encode(model, ask.Live(), batch, jnp.int32(0))
  teacher = ask.Teacher(ema)
  teacher = ask.Teacher(ema, pretrainer_lib.encode(model, teacher, batch, jnp.int32(0)))
  loss_itc, _ = objectives["itc"](model, enc, batch, teacher=teacher, train=True)
  found = jnp.ones(len(batch["text"]), bool)
  loss_itm, _ = objectives["itm"].loss(model, enc, *mined, found, train=False)
  loss_lm, _ = objectives["lm"](model, enc, batch)
  pairs = objectives["itm"].pairs(enc, *mined)
  images, texts = test_parity_albef.by_kind(pairs)
  fused = model.fuse(images, texts).x
  count = len(found)
  ids, mask = batch["text"], batch["text_mask"]
  named = {
    "loss_ita": loss_itc.value(),
    "loss_itm": loss_itm.value(),
    "loss_lm": loss_lm.value(),
    "image_embeds": enc.image.x,
    "text_hidden": enc.text.x,
    "image_feat": enc.zimg,
    "text_feat": enc.ztxt,
    "image_feat_m": teacher.enc.zimg,
    "text_feat_m": teacher.enc.ztxt,
    "itm_pos_hidden": fused[:count],
    "itm_neg_hidden": fused[count:],
    "vl_embeddings": fused[:, 0],
    "itm_logits": objectives["itm"].logits(model, images, texts),
    "lm_logits": objectives["lm"].logits(model, enc.image, ids, mask),
  }
  return loss_itc.value() + loss_itm.value() + loss_lm.value(), named


@pytest.fixture(scope="module")
def official():
  """The official pass by our modules."""
  inputs = arrays("blip_pretrain", "inputs")
  loaded = blip.load(REFERENCE / "blip_pretrain" / "weights.safetensors", **HEADS)
  params, ema, memory = jax.tree.map(
    jnp.asarray, (loaded.params, loaded.ema, loaded.memory)
  )
  # The momentum update comes first, inside the official forward pass.
  ema = tree.ema(ema, params, decay=sizes("blip_pretrain")["momentum"])
  names = ("neg_image_idx_for_text", "neg_text_idx_for_image")
  mined = [jnp.asarray(inputs[name], jnp.int32) for name in names]

  @jax.jit
  def run(params, ema, memory):
    def loss(params):
      (total, named), new = pretrainer().apply(
        {"params": params, "memory": memory},
        batch_of(inputs),
        ema,
        mined,
        method=forward,
        mutable=["memory"],
      )
      return total, (named, new["memory"])

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, (named, memory)), grads = run(params, ema, memory)
  return dict(arrays=named, memory=memory, grads=grads, ema=ema)


@pytest.mark.parametrize(
  "name",
  "loss_ita loss_itm loss_lm image_embeds text_hidden image_feat text_feat"
  " image_feat_m text_feat_m itm_pos_hidden itm_neg_hidden vl_embeddings itm_logits"
  " lm_logits".split(),
)
def test_pretraining(official, name):
  close(official["arrays"][name], arrays("blip_pretrain", "expected")[name], name)


def test_similarities_targets_and_sampling_weights(official):
  expected = arrays("blip_pretrain", "expected")
  loaded = blip.load(REFERENCE / "blip_pretrain" / "weights.safetensors", **HEADS)
  test_parity_albef.check_contrast(
    official["arrays"],
    loaded.params["model"]["temp"],
    loaded.memory["objectives_itc"],
    expected,
    hard=np.eye(*expected["sim_i2t"].shape, dtype=np.float32),
    alpha=sizes("blip_pretrain")["alpha"],
    added=1e-4,
  )


def test_all_gradients_of_pretraining(official):
  theirs = reader.load(REFERENCE / "blip_pretrain" / "grads_all.safetensors")
  assert len(theirs) == 154
  gradients_close(official["grads"], theirs)


def test_queues_and_momentum_after_the_forward_pass(official):
  expected = arrays("blip_pretrain", "expected")
  memory = official["memory"]["objectives_itc"]
  close(memory["image_queue"].T, expected["post/image_queue"])
  close(memory["text_queue"].T, expected["post/text_queue"])
  assert memory["ptr"] == expected["post/queue_ptr"][0]
  got = blip.export(jax.tree.map(np.asarray, official["ema"]), momentum=True)
  for name, want in arrays("blip_pretrain", "post_momentum").items():
    close(got[name], want, name)


@functools.cache
def captioner():
  size = sizes("blip_caption")
  model = vlm_of(size, reads=("causal",))
  prompt = int(arrays("blip_caption", "inputs")["prompt_length"])
  objective = lm.Objective(
    vocab=Vocab(), width=model.text.width, smoothing=0.1, prompt=prompt
  )
  loaded = blip.load(REFERENCE / "blip_caption" / "checkpoint.pth", **HEADS)
  params = jax.tree.map(jnp.asarray, loaded.params)
  return pretrainer_lib.Pretrainer(model, dict(lm=objective), dict(lm=1.0)), params


def caption(self, batch):
  image = self.model.encode_image(batch["image"])
  enc = pretrainer_lib.Encoded(image, None, None, None, None, jnp.int32(0))
  loss, _ = self.objectives["lm"](self.model, enc, batch)
  ids, mask = batch["text"], batch["text_mask"]
  logits = self.objectives["lm"].logits(self.model, image, ids, mask)
  return loss.value(), (logits, image.x)


def test_captioner():
  module, params = captioner()
  batch = batch_of(arrays("blip_caption", "inputs"))

  @jax.jit
  def run(params):
    loss = lambda p: module.apply({"params": p}, batch, method=caption)
    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, (logits, image)), grads = run(params)
  expected = arrays("blip_caption", "expected")
  close(image, expected["image_embeds"])
  close(loss, expected["loss_lm"])
  close(logits, expected["logits"])
  theirs = reader.load(REFERENCE / "blip_caption" / "grads_all.safetensors")
  gradients_close(grads, theirs)


@pytest.mark.parametrize("name", ["greedy", "beam3", "beam3_min8_rep", "beam5_long"])
def test_captions(name):
  """The ids that transformers 4.15 writes, by the official `generate`."""
  module, params = captioner()
  given = json.loads((REFERENCE / "blip_caption" / "generation.json").read_text())
  args = given[name]["args"]
  settings = decode.Settings(
    max_length=args["max_length"],
    min_length=args["min_length"],
    beams=args["num_beams"],
    repetition_penalty=args.get("repetition_penalty", 1.0),
    eos=Vocab.sep,
    pad=Vocab.pad,
  )

  def write(self, image, start):
    tokens = self.model.encode_image(image)
    return self.objectives["lm"].generate(self.model, tokens, start, settings)

  inputs = arrays("blip_caption", "inputs")
  image = batch_of(inputs)["image"]
  start = jnp.asarray(inputs["prompt_ids"], jnp.int32)
  run = jax.jit(lambda p: module.apply({"params": p}, image, start, method=write))
  want = arrays("blip_caption", "expected")[f"generate/{name}/ids"]
  np.testing.assert_array_equal(run(params)[:, : want.shape[1]], want)
