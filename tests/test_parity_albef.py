"""Against the official PyTorch code of ALBEF: losses, gradients, teacher, queues.

tests/reference/albef holds what salesforce/ALBEF models/model_pretrain.py computes, in
two steps, from a small checkpoint of the official layout. Tolerance rtol 1e-4 with atol
1e-5 of the array's largest value: both sides are float32, and the reference differs
from its own float64 by up to 3e-6.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import albef
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.nn import ask
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.ops import contrastive
from vlp_jax.ops import tree

REFERENCE = pathlib.Path(__file__).parent / "reference" / "albef"
SIZE = json.loads((REFERENCE / "config.json").read_text())
BERT, VIT = SIZE["bert"], SIZE["vit"]
STEPS = {1: "", 2: "step2_"}  # prefix of a step's arrays
ALPHAS = {1: 0.4, 2: 0.2}


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = BERT["vocab_size"]
  pad: int = 0
  cls: int = 101
  sep: int = 102
  mask: int = 103
  dec: int | None = None
  enc: int | None = None
  special: tuple[int, ...] = (0, 101, 102, 103)
  continuation: tuple[int, ...] = ()


def pretrainer(alpha):
  """The model that `config.json` describes, from the modules that configs name."""
  bert = dict(
    num_heads=BERT["num_attention_heads"],
    mlp_dim=BERT["intermediate_size"],
    norm_eps=BERT["layer_norm_eps"],
  )
  width, lower = BERT["hidden_size"], BERT["fusion_layer"]
  model = vlm.VLM(
    image=vit.Encoder(
      width=VIT["embed_dim"],
      depth=VIT["depth"],
      num_heads=VIT["num_heads"],
      mlp_dim=VIT["embed_dim"] * VIT["mlp_ratio"],
      patch=VIT["patch_size"],
      res=SIZE["image_res"],
      norm_eps=VIT["norm_eps"],
    ),
    text=text.Encoder(
      vocab=Vocab(),
      width=width,
      depth=lower,
      length=BERT["max_position_embeddings"],
      **bert,
    ),
    fusion=cross_attention.Fusion(depth=BERT["num_hidden_layers"] - lower, **bert),
    embed_dim=SIZE["embed_dim"],
  )
  return pretrainer_lib.Pretrainer(
    model,
    dict(
      itc=itc.Objective(queue=SIZE["queue_size"], distill=alpha, targets="pair"),
      itm=itm.Objective(width=width, exclude="pair"),
      mlm=mlm.Objective(vocab=Vocab(), width=width, distill=alpha),
    ),
    dict(itc=1.0, itm=1.0, mlm=1.0),
  )


def load(path, **more):
  return albef.load(
    path,
    num_heads_image=VIT["num_heads"],
    num_heads_text=BERT["num_attention_heads"],
    fusion_layer=BERT["fusion_layer"],
    **more,
  )


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def by_kind(pairs):
  """ITM's pairs as officially ordered: all own, all other images, all other texts."""
  order = lambda x: x.reshape(-1, 3, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
  return jax.tree.map(order, pairs)


def forward(self, batch, ema, drawn, alpha_step):
  """Every named array of the official forward pass, and the three losses.

  What the official code draws at random (masks, negatives) comes in `drawn`.
  """
  model, objectives = self.model, self.objectives
  enc = pretrainer_lib.encode(model, ask.Live(), batch, alpha_step)
  teacher = ask.Teacher(ema)
  teacher = ask.Teacher(ema, pretrainer_lib.encode(model, teacher, batch, alpha_step))
  loss_itc, parts = objectives["itc"](model, enc, batch, teacher=teacher, train=True)
  mined = (drawn["neg_image_idx_for_text"], drawn["neg_text_idx_for_image"])
  found = jnp.ones(len(batch["text"]), bool)
  loss_itm, _ = objectives["itm"].loss(model, enc, *mined, found, train=False)
  ids, mask = drawn["mlm_input_ids"], batch["text_mask"]
  predicted = drawn["mlm_labels"] != -100
  labels = jnp.where(predicted, drawn["mlm_labels"], 0)
  loss_mlm, _ = objectives["mlm"].loss(
    model, enc, ids, mask, labels, predicted, teacher, train=False
  )
  everywhere = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  read = objectives["mlm"]._read
  pairs_image, pairs_text = by_kind(objectives["itm"].pairs(enc, *mined))
  fused = model.fuse(pairs_image, pairs_text).x
  arrays = {
    "loss_mlm": loss_mlm.value(),
    "loss_ita": loss_itc.value(),
    "loss_itm": loss_itm.value(),
    "loss_i2t": parts["i2t"].value(),
    "loss_t2i": parts["t2i"].value(),
    "image_embeds": enc.image.x,
    "text_embeds": enc.text.x,
    "image_embeds_m": teacher.enc.image.x,
    "text_embeds_m": teacher.enc.text.x,
    "image_feat": enc.zimg,
    "text_feat": enc.ztxt,
    "image_feat_m": teacher.enc.zimg,
    "text_feat_m": teacher.enc.ztxt,
    "fusion_pos": model.fuse(enc.image, enc.text).x,
    "fusion_mlm": model.fuse(enc.image, model.encode_text(ids, mask)).x,
    "itm_logits": objectives["itm"].logits(model, pairs_image, pairs_text),
    "fusion_neg": fused[len(ids) :],
    "vl_embeddings": fused[:, 0],
    "mlm_logits": read(ask.Live(), model, enc.image, ids, mask, everywhere),
    "mlm_logits_m": read(teacher, model, teacher.enc.image, ids, mask, everywhere),
  }
  total = loss_itc.value() + loss_itm.value() + loss_mlm.value()
  return total, arrays | {"loss_total": total}


@pytest.fixture(scope="module")
def official():
  """Both steps of the official run, by our modules."""
  inputs = dict(np.load(REFERENCE / "inputs.npz"))
  loaded = load(REFERENCE / "weights.safetensors")
  params, ema, memory = jax.tree.map(
    jnp.asarray, (loaded.params, loaded.ema, loaded.memory)
  )
  batch = dict(
    image=inputs["image"].transpose(0, 2, 3, 1),
    text=inputs["input_ids"].astype(np.int32),
    text_mask=inputs["attention_mask"] > 0,
    image_id=np.arange(len(inputs["image"]), dtype=np.int32),
  )
  batch = {key: jnp.asarray(value) for key, value in batch.items()}
  steps = {}
  for number, prefix in STEPS.items():
    # The momentum update comes first, inside the official forward pass.
    ema = tree.ema(ema, params, decay=SIZE["momentum"])
    names = (
      "neg_image_idx_for_text",
      "neg_text_idx_for_image",
      "mlm_input_ids",
      "mlm_labels",
    )
    drawn = {name: jnp.asarray(inputs[prefix + name], jnp.int32) for name in names}

    def loss(params, ema=ema, memory=memory, drawn=drawn, number=number):
      (total, arrays), new = pretrainer(ALPHAS[number]).apply(
        {"params": params, "memory": memory},
        batch,
        ema,
        drawn,
        jnp.int32(0),
        method=forward,
        mutable=["memory"],
      )
      return total, (arrays, new["memory"])

    (_, (arrays, memory)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    steps[number] = dict(arrays=arrays, memory=memory, grads=grads, ema=ema)
  return steps


@pytest.fixture(scope="module")
def expected():
  return dict(np.load(REFERENCE / "expected.npz"))


@pytest.mark.parametrize(
  "name",
  "loss_mlm loss_ita loss_itm loss_total loss_i2t loss_t2i image_embeds text_embeds"
  " image_embeds_m text_embeds_m image_feat text_feat image_feat_m text_feat_m"
  " fusion_pos fusion_neg fusion_mlm vl_embeddings itm_logits mlm_logits"
  " mlm_logits_m".split(),
)
def test_first_step(official, expected, name):
  got = official[1]["arrays"][name]
  close(got, expected[name], name)


@pytest.mark.parametrize("name", ["loss_mlm", "loss_ita", "loss_itm"])
def test_second_step(official, expected, name):
  close(official[2]["arrays"][name], expected[f"step2_{name}"], name)


def check_contrast(arrays, temp, queues, expected, *, hard, alpha, added=0.0):
  """Similarities, soft targets and the weights that negatives are drawn by.

  Args:
    arrays: embeddings of the model, and with "_m" of its teacher.
    queues: memory of ITC before the step.
    hard: float [B, B + Q], the targets that are softened by `alpha`.
    added: to each weight of a negative (BLIP's pretraining: 1e-4, which ours leaves
      out). None: the weights are of live embeddings alone (BLIP's retrieval).
  """
  text_all = np.concatenate([arrays["text_feat_m"], queues["text_queue"]])
  image_all = np.concatenate([arrays["image_feat_m"], queues["image_queue"]])
  sims = {
    "sim_i2t": arrays["image_feat"] @ text_all.T / temp,
    "sim_t2i": arrays["text_feat"] @ image_all.T / temp,
    "sim_i2t_m": arrays["image_feat_m"] @ text_all.T / temp,
    "sim_t2i_m": arrays["text_feat_m"] @ image_all.T / temp,
  }
  for name in sims.keys() & expected.keys():
    close(sims[name], expected[name], name)
  batch = len(hard)
  same = hard[:, :batch] > 0
  for way in ("i2t", "t2i"):
    soft = contrastive.soften(hard, sims[f"sim_{way}_m"], alpha)
    close(soft, expected[f"sim_{way}_targets"], way)
    logits, weights = sims[f"sim_{way}"][:, :batch], expected[f"weights_{way}"]
    if added is None:
      both = (arrays["image_feat"], arrays["text_feat"])
      rows, columns = both if way == "i2t" else both[::-1]
      logits = rows @ columns.T / temp
    if added:
      drawn = np.where(same, 0.0, jax.nn.softmax(logits, axis=1) + added)
      close(drawn, weights, way)
      continue
    # The official weights are a softmax with its diagonal set to zero; ours is the
    # categorical over the same logits: equal once normalised.
    drawn = jax.nn.softmax(np.where(same, -np.inf, logits), axis=1)
    close(drawn, weights / weights.sum(1, keepdims=True), way)


def test_similarities_targets_and_sampling_weights(official, expected):
  loaded = load(REFERENCE / "weights.safetensors")
  check_contrast(
    official[1]["arrays"],
    loaded.params["model"]["temp"],
    loaded.memory["objectives_itc"],
    expected,
    hard=np.eye(*expected["sim_i2t"].shape, dtype=np.float32),
    alpha=ALPHAS[1],
  )


def test_all_gradients(official):
  """Every online parameter, in the official layout.

  The bias of a key shifts all logits of a query alike, so its gradient is zero; what
  either side reports is rounding (3e-8 beside 7): it is compared on the scale of the
  largest gradient. PyTorch drops the look-up gradient of the padding row 0.
  """
  got = official[1]["grads"]
  theirs = reader.load(REFERENCE / "grads_all.safetensors")
  got = albef.export(
    jax.tree.map(np.asarray, got),
  )
  largest = max(np.abs(x).max() for x in theirs.values())
  for name, want in theirs.items():
    value = got[name]
    if name.endswith(".key.bias"):
      np.testing.assert_allclose(value, want, atol=1e-5 * largest, err_msg=name)
      continue
    close(value, want, name)
  assert len(theirs) > 80


@pytest.mark.parametrize("number", STEPS)
def test_queues_after_a_step(official, expected, number):
  prefix = "post/" if number == 1 else "step2_post/"
  memory = official[number]["memory"]["objectives_itc"]
  close(memory["image_queue"].T, expected[prefix + "image_queue"])
  close(memory["text_queue"].T, expected[prefix + "text_queue"])
  assert memory["ptr"] == expected[prefix + "queue_ptr"][0]


def test_momentum_parameters_after_the_first_step(official):
  want = reader.load(REFERENCE / "post_momentum.safetensors")
  got = albef.export(
    jax.tree.map(np.asarray, official[1]["ema"]),
    momentum=True,
  )
  for name, value in want.items():
    close(got[name], value, name)
