"""Against the official PyTorch code of BLIP's downstream tasks.

tests/reference/blip_*: what salesforce/BLIP models/blip_retrieval.py, blip_itm.py,
blip_vqa.py and blip_nlvr.py compute from small checkpoints of the official layout.
Tolerance as in test_parity_albef.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_albef
from tests import test_parity_blip as blip_test
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import blip
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models.fusion import twin
from vlp_jax.nn import ask
from vlp_jax.objectives import classify
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import vqa
from vlp_jax.ops import contrastive
from vlp_jax.ops import decode
from vlp_jax.ops import tree

Vocab = blip_test.Vocab
close = blip_test.close
READER = ("bidirectional",)


@functools.cache
def loaded(task):
  """Trees of the official checkpoint of a task."""
  path = blip_test.REFERENCE / f"blip_{task}" / "weights.safetensors"
  got = blip.load(path, **blip_test.HEADS)
  return jax.tree.map(jnp.asarray, (got.params, got.ema, got.memory))


def inputs_of(task):
  return blip_test.arrays(f"blip_{task}", "inputs")


def expected_of(task):
  return blip_test.arrays(f"blip_{task}", "expected")


def one(model, name, objective):
  return pretrainer_lib.Pretrainer(model, {name: objective}, {name: 1.0})


def run(module, params, batch, call, *more, **variables):
  """((loss, rest), gradients) of a compiled `call(bound pretrainer, batch, *more)`."""

  @jax.jit
  def both(params, batch):
    loss = lambda p: module.apply(
      {"params": p} | variables, batch, *more, method=call, mutable=["memory"]
    )

    def split(p):
      (total, rest), new = loss(p)
      return total, (rest, new)

    return jax.value_and_grad(split, has_aux=True)(params)

  return both(params, batch)


def check_gradients(task, grads):
  path = blip_test.REFERENCE / f"blip_{task}" / "grads_all.safetensors"
  blip_test.gradients_close(grads, reader.load(path))


def test_retrieval():
  size = blip_test.sizes("blip_retrieval")
  inputs, expected = inputs_of("retrieval"), expected_of("retrieval")
  params, ema, memory = loaded("retrieval")
  ema = tree.ema(ema, params, decay=size["momentum"])
  batch = blip_test.batch_of(inputs)
  batch["image_id"] = jnp.asarray(inputs["idx"], jnp.int32)
  names = ("neg_image_idx_for_text", "neg_text_idx_for_image")
  mined = [jnp.asarray(inputs[name], jnp.int32) for name in names]
  model = blip_test.vlm_of(size, reads=READER)
  module = pretrainer_lib.Pretrainer(
    model,
    dict(
      itc=itc.Objective(queue=size["queue_size"], distill=size["alpha"]),
      itm=itm.Objective(width=model.text.width, mined_by="live"),
    ),
    dict(itc=1.0, itm=1.0),
  )

  def forward(self, batch, ema, mined):
    encode = lambda call: pretrainer_lib.encode(self.model, call, batch, jnp.int32(0))
    enc = encode(ask.Live())
    teacher = ask.Teacher(ema, encode(ask.Teacher(ema)))
    ita, _ = self.objectives["itc"](self.model, enc, batch, teacher=teacher, train=True)
    found = jnp.ones(len(batch["text"]), bool)
    matching = self.objectives["itm"]
    loss, _ = matching.loss(self.model, enc, *mined, found, train=False)
    pairs = test_parity_albef.by_kind(matching.pairs(enc, *mined))
    named = {
      "loss_ita": ita.value(),
      "loss_itm": loss.value(),
      "image_feat": enc.zimg,
      "text_feat": enc.ztxt,
      "image_feat_m": teacher.enc.zimg,
      "text_feat_m": teacher.enc.ztxt,
      "vl_output": matching.logits(self.model, *pairs),
    }
    return ita.value() + loss.value(), named

  (_, (named, new)), grads = run(
    module, params, batch, forward, ema, mined, memory=memory
  )
  for name in named.keys() & expected.keys():
    close(named[name], expected[name], name)
  before, ids = memory["objectives_itc"], inputs["idx"]
  hard = contrastive.positives(ids, np.concatenate([ids, before["id_queue"]]))
  close(hard, expected["sim_targets"])
  test_parity_albef.check_contrast(
    named,
    params["model"]["temp"],
    before,
    expected,
    hard=np.asarray(hard),
    alpha=size["alpha"],
    added=None,
  )
  check_gradients("retrieval", grads)
  queue = new["memory"]["objectives_itc"]
  close(queue["image_queue"].T, expected["post/image_queue"])
  close(queue["text_queue"].T, expected["post/text_queue"])
  np.testing.assert_array_equal(queue["id_queue"][None], expected["post/idx_queue"])
  assert queue["ptr"] == expected["post/ptr_queue"][0]


def test_itm():
  """The official file keeps [CLS] in front, where the others have [ENC]."""
  size, expected = blip_test.sizes("blip_itm"), expected_of("itm")
  vocab = dataclasses.replace(Vocab(), enc=None)
  model = blip_test.vlm_of(size, reads=READER, vocab=vocab)
  module = one(model, "itm", itm.Objective(width=model.text.width))
  params = loaded("itm")[0]
  # Its model has no temperature.
  params = params | {"model": params["model"] | {"temp": jnp.float32(0.07)}}
  batch = blip_test.batch_of(inputs_of("itm"))

  def forward(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    logits = self.objectives["itm"].logits(self.model, enc.image, enc.words)
    return logits, enc.zimg @ enc.ztxt.T

  got = jax.jit(lambda p: module.apply({"params": p}, batch, method=forward))(params)
  close(got[0], expected["itm_logits"])
  close(got[1], expected["itc_sim"])


def answering():
  size = blip_test.sizes("blip_vqa")
  model = blip_test.vlm_of(size | dict(embed_dim=None), reads=READER)
  bert = size["med_config"]
  decoder = text.Encoder(
    vocab=Vocab(),
    width=bert["hidden_size"],
    depth=bert["num_hidden_layers"],
    num_heads=bert["num_attention_heads"],
    mlp_dim=bert["intermediate_size"],
    norm_eps=bert["layer_norm_eps"],
    length=bert["max_position_embeddings"],
    types=0,
  )
  model = model.clone(decoder=decoder)
  objective = vqa.Objective(
    vocab=Vocab(), width=model.text.width, smoothing=0.1, first_twice=False
  )
  return one(model, "vqa", objective)


def questions(inputs):
  """A batch whose answers are padded to as many for each question."""
  batch = blip_test.batch_of(inputs, "question_ids", "question_mask")
  counts, length = inputs["n"], inputs["answer_ids"].shape[1]
  shape = (len(counts), counts.max())
  rows = np.arange(counts.max()) < counts[:, None]
  ids = np.zeros((*shape, length), np.int32)
  mask = np.zeros((*shape, length), bool)
  weight = np.zeros(shape, np.float32)
  ids[rows], mask[rows] = inputs["answer_ids"], inputs["answer_mask"] > 0
  weight[rows] = inputs["weights"]
  return batch | dict(answer=ids, answer_mask=mask, answer_weight=weight)


def test_vqa():
  inputs, expected = inputs_of("vqa"), expected_of("vqa")
  params = loaded("vqa")[0]
  batch = questions(inputs)
  _, count, length = batch["answer"].shape

  def forward(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    head = self.objectives["vqa"]
    loss, _ = head(self.model, enc, batch)
    rows = [batch[name].reshape(-1, length) for name in ("answer", "answer_mask")]
    logp = head._read(ask.Live(), self.model, enc, *rows, count)
    each = head._next_words(logp, *rows)[0]
    return loss.value(), (self.model.fuse(enc.image, enc.words).x, each)

  (loss, ((states, each), _)), grads = run(answering(), params, batch, forward)
  close(loss, expected["loss"])
  close(each[batch["answer_weight"].ravel() > 0], expected["per_answer_loss"])
  close(states, expected["question_states"])
  check_gradients("vqa", grads)


@pytest.mark.parametrize("how", ["rank", "generate"])
def test_vqa_answers(how):
  inputs, expected = inputs_of("vqa"), expected_of("vqa")
  batch = blip_test.batch_of(inputs, "question_ids", "question_mask")
  ids = jnp.asarray(inputs["answer_list_ids"], jnp.int32)
  mask = jnp.asarray(inputs["answer_list_mask"] > 0)
  settings = decode.Settings(
    max_length=10, min_length=1, beams=3, eos=Vocab.sep, pad=Vocab.pad
  )

  def answer(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    question, objective = self.model.fuse(enc.image, enc.words), self.objectives["vqa"]
    if how == "generate":
      return objective.generate(self.model, question, settings)
    most = int(inputs["rank_k"])
    return objective.rank(self.model, question, ids, mask, most=most)

  params = loaded("vqa")[0]
  got = jax.jit(lambda p: answering().apply({"params": p}, batch, method=answer))(
    params
  )
  if how == "generate":
    # What is written begins with [DEC], which stands where ours has [CLS].
    want = expected["generate_ids"]
    np.testing.assert_array_equal(got[:, 1:], want[:, 1:])
    return
  order, probability = got
  assert (order[:, 0] == expected["rank_max_ids"]).all()
  scores, top = expected["rank_log_probs_sum"], expected["rank_topk_ids"]
  best = np.argsort(-scores, axis=1)
  np.testing.assert_array_equal(order, np.take_along_axis(top, best, axis=1))
  want = jax.nn.softmax(np.take_along_axis(scores, best, axis=1), axis=1)
  close(probability, want)


def test_nlvr2():
  inputs, expected = inputs_of("nlvr"), expected_of("nlvr")
  size = blip_test.sizes("blip_nlvr") | dict(embed_dim=None)
  bert = size["med_config"]
  model = blip_test.vlm_of(size).clone(
    fusion=twin.Fusion(
      depth=bert["num_hidden_layers"],
      num_heads=bert["num_attention_heads"],
      mlp_dim=bert["intermediate_size"],
      norm_eps=bert["layer_norm_eps"],
      image_width=size["vit"]["embed_dim"],
    )
  )
  module = one(
    model, "classify", classify.Objective(width=model.text.width, classes=2, images=2)
  )
  count = len(inputs["input_ids"])
  both = inputs["image"]
  batch = blip_test.batch_of(inputs | dict(image=both[:count]))
  batch["image2"] = jnp.asarray(both[count:].transpose(0, 2, 3, 1))
  batch["label"] = jnp.asarray(inputs["targets"], jnp.int32)

  def forward(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    objective = self.objectives["classify"]
    loss, _ = objective(self.model, enc, batch)
    second = batch["image2"]
    return loss.value(), objective.predict(self.model, enc.image, enc.words, second)

  (loss, (logits, _)), grads = run(module, loaded("nlvr")[0], batch, forward)
  close(loss, expected["loss"])
  close(logits, expected["prediction"])
  check_gradients("nlvr", grads)
