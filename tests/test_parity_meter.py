"""Against the official PyTorch code of METER: outputs, losses, gradients.

tests/reference/meter* hold what zdou0830/METER computes from small checkpoints of the
official layout, with RoBERTa and with BERT. Tolerance rtol 1e-4 with atol 1e-5 of the
array's largest value, as for ALBEF: both sides are float32.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import meter
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import co_attention
from vlp_jax.nn import ask
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.objectives import pair_classify
from vlp_jax.objectives import vqa_scores
from vlp_jax.ops import posembed

REFERENCE = pathlib.Path(__file__).parent / "reference"
NAMES = ("meter", "meter_bert")


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int
  mask: int = 1
  special: tuple[int, ...] = ()
  continuation: tuple[int, ...] = ()


@functools.cache
def size(name):
  return json.loads((REFERENCE / name / "config.json").read_text())


def arrays(name, file):
  return dict(np.load(REFERENCE / name / f"{file}.npz"))


def model(name, types=2):
  """The model that `config.json` describes, from the modules that configs name."""
  spec = size(name)
  bert, width = spec["text_model"], spec["input_image_embed_size"]
  image = vit.Encoder(
    width=width,
    depth=2,
    num_heads=width // 64,
    mlp_dim=4 * width,
    patch=spec["patch_size"],
    res=spec["image_size"],
    norm_pre=True,
    patch_bias=False,
    act="quick_gelu",
    norm_eps=spec["clip_norm_eps"],
  )
  words = text.Encoder(
    vocab=Vocab(bert["vocab_size"]),
    width=bert["hidden_size"],
    depth=bert["num_hidden_layers"],
    num_heads=bert["num_attention_heads"],
    mlp_dim=bert["intermediate_size"],
    length=bert["max_position_embeddings"],
    types=bert["type_vocab_size"],
    norm_eps=bert["layer_norm_eps"],
    first_position=2 if "roberta" in spec["tokenizer"] else 0,
  )
  fusion = co_attention.Fusion(
    text_width=words.width,
    image_width=width,
    width=spec["hidden_size"],
    depth=spec["num_top_layer"],
    num_heads=spec["num_heads"],
    mlp_dim=spec["hidden_size"] * spec["mlp_ratio"],
    norm_eps=spec["cross_layer_norm_eps"],
    types=types,
  )
  return vlm.VLM(image=image, text=words, fusion=fusion, embed_dim=None)


def pretrainer(name):
  built = model(name)
  width, pooled = built.fusion.widths(built.text.width)
  vocab = built.text.vocab
  return pretrainer_lib.Pretrainer(
    built,
    dict(
      itm=itm.Objective(
        width=width, pooled_width=pooled, negatives="random", layout="half"
      ),
      mlm=mlm.Objective(vocab=vocab, width=width, tied=False),
    ),
    dict(itm=1.0, mlm=1.0),
  )


def heads(name):
  spec = size(name)
  return dict(
    num_heads_image=spec["input_image_embed_size"] // 64,
    num_heads_text=spec["text_model"]["num_attention_heads"],
    num_heads_fusion=spec["num_heads"],
  )


@functools.cache
def checkpoint(name):
  return meter.load(REFERENCE / name / "weights.safetensors", **heads(name))


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def pixels(image):
  return jnp.asarray(image.transpose(0, 2, 3, 1))


def forward(self, batch, drawn):
  """Every named array of the official forward pass, and its two losses.

  What the official code draws at random (masked words, matching pairs) is in `drawn`.
  """
  net, objectives = self.model, self.objectives
  enc = pretrainer_lib.encode(net, ask.Live(), batch, jnp.int32(0))
  fused = net.fuse(enc.image, enc.text)
  ids, mask = drawn["text_ids_mlm"], batch["text_mask"]
  predicted = drawn["text_labels_mlm"] != -100
  labels = jnp.where(predicted, drawn["text_labels_mlm"], 0)
  loss_mlm, _ = objectives["mlm"].loss(
    net, enc, ids, mask, labels, predicted, None, train=False
  )
  images = net.encode_image(drawn["itm_images"])
  weight = jnp.ones(len(ids))
  match = objectives["itm"].match
  loss_itm, _ = match(net, images, enc.text, drawn["itm_labels"], weight, train=False)
  out = {
    "infer/text_feats": fused.x,
    "infer/image_feats": fused.image.x,
    "infer/cls_feats": net.pool_pair(fused),
    "vit_model_output": enc.image.x,
    "text_transformer_output": enc.text.x,
    "mlm_logits": objectives["mlm"].predict(net, ids, mask, enc.image),
    "itm_logits": objectives["itm"].logits(net, images, enc.text),
    "mlm_loss": loss_mlm.value(),
    "itm_loss": loss_itm.value(),
  }
  return out["mlm_loss"] + out["itm_loss"], out


@pytest.fixture(scope="module", params=NAMES)
def official(request):
  """(name, expected arrays, our arrays, our gradients under official names)."""
  name = request.param
  inputs = arrays(name, "inputs")
  batch = dict(
    image=pixels(inputs["image"]),
    text=jnp.asarray(inputs["text_ids"], jnp.int32),
    text_mask=jnp.asarray(inputs["text_masks"] > 0),
  )
  real = inputs["itm_labels"][:, None, None, None] == 1
  drawn = dict(
    text_ids_mlm=jnp.asarray(inputs["text_ids_mlm"], jnp.int32),
    text_labels_mlm=jnp.asarray(inputs["text_labels_mlm"], jnp.int32),
    itm_labels=jnp.asarray(inputs["itm_labels"], jnp.int32),
    itm_images=pixels(np.where(real, inputs["image"], inputs["false_image"])),
  )

  def loss(params):
    return pretrainer(name).apply({"params": params}, batch, drawn, method=forward)

  params = jax.tree.map(jnp.asarray, checkpoint(name).params)
  (_, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  grads = meter.export(jax.tree.map(np.asarray, grads))
  return name, arrays(name, "expected"), got, grads


@pytest.mark.parametrize(
  "array",
  "infer/text_feats infer/image_feats infer/cls_feats vit_model_output"
  " text_transformer_output mlm_logits itm_logits mlm_loss itm_loss".split(),
)
def test_outputs_and_losses(official, array):
  _, want, got, _ = official
  close(got[array], want[array], array)


def test_gradients(official):
  _, want, _, grads = official
  names = [name.removeprefix("grad/") for name in want if name.startswith("grad/")]
  assert len(names) >= 11
  for name in names:
    close(grads[name], want[f"grad/{name}"], name)


def test_positions_are_resized_as_officially():
  before = arrays("meter", "inputs")["pos_resize/before"]
  after = arrays("meter", "expected")["pos_resize/after"]
  close(posembed.resize_posembed(before, 6), after)
  name = "model/image/posemb"
  (rule,) = [
    r
    for r in meter._rules(depth_image=1, depth_text=1, depth_fusion=1, heads=[])
    if getattr(r, "ours", None) == name
  ]
  close(rule.fit(before, after.shape), after)


# --- Downstream tasks -----------------------------------------------------------------


def answer(self, batch):
  """(loss, logits) of the one objective."""
  net = self.model
  enc = pretrainer_lib.encode(net, ask.Live(), batch, jnp.int32(0))
  (objective,) = self.objectives.values()
  loss, _ = objective(net, enc, batch)
  second = (net.encode_image(batch["image2"]),) if "image2" in batch else ()
  return loss.value(), objective.logits(net, enc.image, *second, enc.text)


@pytest.mark.parametrize("name", ["meter_vqa", "meter_nlvr2"])
def test_tasks(name):
  """Loss and logits."""
  inputs, want = arrays(name, "inputs"), arrays(name, "expected")
  batch = dict(
    text=jnp.asarray(inputs["text_ids"], jnp.int32),
    text_mask=jnp.asarray(inputs["text_masks"] > 0),
  )
  width = size(name)["hidden_size"]
  if name == "meter_vqa":
    batch |= dict(image=pixels(inputs["image"]), answer_scores=inputs["vqa_targets"])
    objectives = {"vqa_scores": vqa_scores.Objective(width=width, answers=17)}
  else:
    batch |= dict(image=pixels(inputs["image_0"]), image2=pixels(inputs["image_1"]))
    batch["label"] = jnp.asarray(inputs["answers"], jnp.int32)
    objectives = {"pair_classify": pair_classify.Objective(width=width)}
  net = model(name, types=2 + ("image2" in batch))
  module = pretrainer_lib.Pretrainer(net, objectives, dict.fromkeys(objectives, 1.0))
  run = jax.jit(lambda params: module.apply({"params": params}, batch, method=answer))
  loss, logits = run(checkpoint(name).params)
  task = name.removeprefix("meter_")
  close(loss, want[f"{task}_loss"])
  close(logits, want[f"{task}_logits"])
