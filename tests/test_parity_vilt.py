"""Against the official PyTorch code of ViLT: outputs, losses, transport, gradients.

tests/reference/vilt* hold what dandelin/ViLT computes from small checkpoints of the
official layout, on images of four sizes. Tolerance rtol 1e-4 with atol 1e-5 of the
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
from vlp_jax.interop import reader
from vlp_jax.interop import vilt
from vlp_jax.models import patches
from vlp_jax.models import text
from vlp_jax.models import vlm
from vlp_jax.models.fusion import merged
from vlp_jax.nn import ask
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.objectives import pair_classify
from vlp_jax.objectives import text_rank
from vlp_jax.objectives import vqa_scores
from vlp_jax.objectives import wpa
from vlp_jax.ops import transport

REFERENCE = pathlib.Path(__file__).parent / "reference"
SIZE = json.loads((REFERENCE / "vilt" / "config.json").read_text())
WIDTH = SIZE["hidden_size"]


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = SIZE["vocab_size"]
  mask: int = 1
  special: tuple[int, ...] = ()
  continuation: tuple[int, ...] = ()


def arrays(name, file):
  return dict(np.load(REFERENCE / name / f"{file}.npz"))


def model(*, types=2, max_patches=16):
  """The model that `config.json` describes, from the modules that configs name."""
  sizes = dict(num_heads=SIZE["num_heads"], mlp_dim=WIDTH * SIZE["mlp_ratio"])
  return vlm.VLM(
    image=patches.Encoder(
      width=WIDTH,
      patch=SIZE["patch_size"],
      res=80,
      table_res=SIZE["image_size"],
      max_patches=max_patches,
    ),
    text=text.Encoder(
      vocab=Vocab(), width=WIDTH, depth=0, length=SIZE["max_text_len"], **sizes
    ),
    fusion=merged.Fusion(
      text_width=WIDTH,
      image_width=WIDTH,
      depth=SIZE["num_layers"],
      norm_eps=SIZE["layer_norm_eps_vit"],
      types=types,
      **sizes,
    ),
    embed_dim=None,
  )


def pretrainer(objectives, **fields):
  return pretrainer_lib.Pretrainer(
    model(**fields), objectives, dict.fromkeys(objectives, 1.0)
  )


@functools.cache
def params_of(name):
  path = REFERENCE / name / "weights.safetensors"
  return vilt.load(path, num_heads=SIZE["num_heads"]).params


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def compare_gradients(grads, file):
  """All of them; on the scale of each, and where that is rounding, of the largest.

  The bias of a key shifts all logits of a query alike, and that of a rank all scores:
  their gradients are nothing.
  """
  want = reader.load(file)
  got = vilt.export(jax.tree.map(np.asarray, grads))
  largest = max(np.abs(x).max() for x in want.values())
  for name, x in want.items():
    value = got[name]
    if name == "rank_output.bias":
      np.testing.assert_allclose(value, x, atol=1e-5 * largest, err_msg=name)
      continue
    if name.endswith("attn.qkv.bias"):
      value, x = value.reshape(3, -1), x.reshape(3, -1)
      np.testing.assert_allclose(value[1], x[1], atol=1e-5 * largest, err_msg=name)
      value, x = value[::2], x[::2]
    close(value, x, name)
  return want


def pixels(image):
  return jnp.asarray(image.transpose(0, 2, 3, 1))


def integers(inputs, *names):
  return {name: jnp.asarray(inputs[name], jnp.int32) for name in names}


PRETRAINING = dict(
  itm=itm.Objective(width=WIDTH, negatives="random", layout="half", align=0.1),
  mlm=mlm.Objective(vocab=Vocab(), width=WIDTH, tied=False),
)


def forward(self, batch, drawn):
  """Every named array of the official forward pass, and its losses.

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
  images = net.encode_image(drawn["itm_images"], drawn["itm_sizes"])
  weight = jnp.ones(len(ids))
  match = objectives["itm"].match
  loss_itm, parts = match(
    net, images, enc.text, drawn["itm_labels"], weight, train=False
  )
  paired = net.fuse(images, enc.text)
  words = wpa.words_of(paired.mask)
  places = paired.image.mask.at[:, 0].set(False)
  plan, cost = transport.plan(paired.x, paired.image.x, words, places)
  alignment = 0.1 * parts["wpa"].value()
  out = {
    "infer/text_feats": fused.x,
    "infer/image_feats": fused.image.x,
    "infer/cls_feats": net.pool_pair(fused),
    "infer/raw_cls_feats": fused.x[:, 0],
    "infer/image_masks": fused.image.mask,
    "mlm_logits": objectives["mlm"].predict(net, ids, mask, enc.image),
    "itm_logits": objectives["itm"].logits(net, images, enc.text),
    "mlm_loss": loss_mlm.value(),
    "itm_loss": loss_itm.value() - alignment,
    "itm_wpa_loss": alignment,
    "wpa/ot_loss": parts["wpa"].value(),
    "wpa/cost": cost,
    "wpa/T": plan.transpose(0, 2, 1),
    "wpa/distance": wpa.distance(paired, paired.image),
    "wpa/txt_pad": ~words,
    "wpa/img_pad": ~places,
  }
  return loss_mlm.value() + loss_itm.value(), out


def batch_of(inputs):
  return dict(
    image=pixels(inputs["image"]),
    image_size=jnp.asarray(inputs["image_sizes"], jnp.int32),
    text=jnp.asarray(inputs["text_ids"], jnp.int32),
    text_mask=jnp.asarray(inputs["text_masks"] > 0),
  )


@pytest.fixture(scope="module")
def official():
  """(our arrays, our gradients) of the pretraining step."""
  inputs = arrays("vilt", "inputs")
  real = inputs["itm_labels"] == 1
  drawn = integers(inputs, "text_ids_mlm", "text_labels_mlm", "itm_labels")
  images = np.where(real[:, None, None, None], inputs["image"], inputs["false_image"])
  drawn |= dict(itm_images=pixels(images), itm_sizes=sizes_of(images))

  def loss(params):
    module = pretrainer(PRETRAINING)
    return module.apply({"params": params}, batch_of(inputs), drawn, method=forward)

  params = jax.tree.map(jnp.asarray, params_of("vilt"))
  (_, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return got, grads


def sizes_of(images):
  """int32 [B, 2] of images [B, 3, R, R] that zeros pad."""
  lit = images.any(axis=1)
  sides = [lit.any(axis=axis).sum(axis=1) for axis in (2, 1)]
  return jnp.asarray(np.stack(sides, axis=1), jnp.int32)


@pytest.mark.parametrize(
  "name",
  "infer/text_feats infer/image_feats infer/cls_feats infer/raw_cls_feats"
  " infer/image_masks mlm_logits itm_logits mlm_loss itm_loss itm_wpa_loss wpa/ot_loss"
  " wpa/cost wpa/T wpa/distance wpa/txt_pad wpa/img_pad".split(),
)
def test_outputs_and_losses(official, name):
  close(official[0][name], arrays("vilt", "expected")[name], name)


def test_all_gradients(official):
  want = compare_gradients(official[1], REFERENCE / "vilt" / "grads_all.safetensors")
  assert len(want) > 50


def test_patches_beyond_the_most_are_left_out():
  inputs, want = arrays("vilt", "inputs"), arrays("vilt", "expected")

  def run(self, batch):
    image = self.encode_image(batch["image"], batch["image_size"])
    fused = self.fuse(image, self.encode_text(batch["text"], batch["text_mask"]))
    return fused.image.x, fused.image.mask, fused.pooled

  params = {"params": params_of("vilt")["model"]}
  got = jax.jit(lambda batch: model(max_patches=6).apply(params, batch, method=run))(
    batch_of(inputs)
  )
  names = ("image_feats", "image_masks", "cls_feats")
  for name, value in zip(names, got, strict=True):
    close(value, want[f"infer_max6/{name}"], name)


@pytest.mark.parametrize("most, name", [(16, "infer"), (6, "infer_max6")])
def test_patches_stand_in_the_official_order(most, name):
  sizes = batch_of(arrays("vilt", "inputs"))["image_size"]
  encoder = patches.Encoder(width=4, patch=16, res=80, max_patches=most)
  at, real = encoder._choose((80, 80), sizes, False)
  index = arrays("vilt", "expected")[f"{name}/patch_index"]
  np.testing.assert_array_equal(np.stack([at // 5, at % 5], -1), index)
  np.testing.assert_array_equal(
    real, arrays("vilt", "expected")[f"{name}/image_masks"][:, 1:]
  )


def test_transport_alone():
  inputs, want = arrays("vilt", "inputs"), arrays("vilt", "expected")
  real = ~inputs["ot_txt_pad"], ~inputs["ot_img_pad"]
  plan, cost = transport.plan(inputs["ot_txt"], inputs["ot_img"], *real)
  close(plan.transpose(0, 2, 1), want["ot/T"])
  close(cost, want["ot/cost"])
  close((plan * cost).sum((1, 2)), want["ot/distance"])


# --- Downstream tasks -----------------------------------------------------------------

TASKS = {
  "vilt_vqa": {"vqa_scores": vqa_scores.Objective(width=WIDTH, answers=17)},
  "vilt_nlvr2": {"pair_classify": pair_classify.Objective(width=WIDTH)},
  "vilt_irtr": {"text_rank": text_rank.Objective(width=WIDTH, negatives=3)},
}


def answer(self, batch):
  """(loss, logits) of the one objective."""
  net = self.model
  enc = pretrainer_lib.encode(net, ask.Live(), batch, jnp.int32(0))
  (name,) = self.objectives
  objective = self.objectives[name]
  if name == "text_rank":
    ids, mask = batch["false_ids"], batch["false_mask"]
    flat = net.encode_text(ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, 16))
    texts = jax.tree.map(lambda x: x.reshape(*ids.shape[:2], *x.shape[1:]), flat)
    texts = jax.tree.map(
      lambda own, others: jnp.concatenate([own[:, None], others], 1), enc.text, texts
    )
    found = jnp.ones(len(ids), bool)
    loss, _ = objective.loss(net, enc.image, texts, found, train=False)
    return loss.value(), objective.scores(net, enc.image, texts)
  loss, _ = objective(net, enc, batch)
  if name == "vqa_scores":
    return loss.value(), objective.logits(net, enc.image, enc.text)
  second = net.encode_image(batch["image2"], batch["image2_size"])
  return loss.value(), objective.logits(net, enc.image, second, enc.text)


def task_batch(inputs):
  """What our objectives read, of the official names."""
  image = inputs["image" if "image" in inputs else "image_0"]
  batch = dict(
    image=pixels(image),
    image_size=sizes_of(image),
    text=jnp.asarray(inputs["text_ids"], jnp.int32),
    text_mask=jnp.asarray(inputs["text_masks"] > 0),
  )
  if "image_1" in inputs:
    batch |= dict(
      image2=pixels(inputs["image_1"]),
      image2_size=sizes_of(inputs["image_1"]),
      label=jnp.asarray(inputs["answers"], jnp.int32),
    )
  if "vqa_targets" in inputs:
    batch["answer_scores"] = jnp.asarray(inputs["vqa_targets"])
  if "false_text_0_ids" in inputs:
    stack = lambda kind: np.stack(
      [inputs[f"false_text_{i}_{kind}"] for i in range(3)], axis=1
    )
    batch["false_ids"] = jnp.asarray(stack("ids"), jnp.int32)
    batch["false_mask"] = jnp.asarray(stack("masks") > 0)
  return batch


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
  """Loss, logits and all gradients."""
  types = 3 if name == "vilt_nlvr2" else 2
  module = pretrainer(TASKS[name], types=types, max_patches=None)
  batch = task_batch(arrays(name, "inputs"))

  def loss(params):
    return module.apply({"params": params}, batch, method=answer)

  params = jax.tree.map(jnp.asarray, params_of(name))
  (total, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  want = arrays(name, "expected")
  (loss_name,) = [key for key in want if key.endswith("_loss")]
  (logits_name,) = [key for key in want if key != loss_name]
  close(total, want[loss_name], loss_name)
  close(logits, want[logits_name], logits_name)
  compare_gradients(grads, REFERENCE / name / "grads_all.safetensors")
