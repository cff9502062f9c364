"""Against the official PyTorch code of ALBEF's downstream tasks.

tests/reference/albef_*: what salesforce/ALBEF (commit b9727e4) computes from small
checkpoints of the official layout: models/model_retrieval.py, model_ve.py,
model_nlvr.py and model_vqa.py. Tolerance as in test_parity_albef.py.
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
from vlp_jax import batch as batch_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.data import columns as columns_lib
from vlp_jax.evaluators import retrieval
from vlp_jax.interop import albef_tasks
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.models.fusion import paired
from vlp_jax.nn import ask
from vlp_jax.objectives import classify
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import vqa
from vlp_jax.ops import contrastive
from vlp_jax.ops import metrics
from vlp_jax.ops import tree
from vlp_jax.training import step as step_lib

REFERENCE = pathlib.Path(__file__).parent / "reference"
TASKS = ("retrieval", "ve", "nlvr", "vqa")
close = test_parity_albef.close
VOCAB = test_parity_albef.Vocab(size=200)
# Gradients that are rounding: the bias of a key (see test_parity_albef), and in nlvr's
# last layer, where the tokens have become alike, the official query's: at most 8e-9
# beside 0.1, of which the same in float64 leaves two thirds. In vqa's last layer the
# official key's is off by 1.15 of the tolerance from what float64 gives.
ROUNDING = (
  ".key.bias",
  ".layer.17.attention.self.query.weight",
  "text_decoder.bert.encoder.layer.5.attention.self.key.weight",
)


@dataclasses.dataclass(frozen=True)
class Official:
  """What a directory of tests/reference holds."""

  task: str

  @functools.cached_property
  def folder(self):
    return REFERENCE / f"albef_{self.task}"

  @functools.cached_property
  def config(self):
    return json.loads((self.folder / "config.json").read_text())

  @functools.cached_property
  def inputs(self):
    return dict(np.load(self.folder / "inputs.npz"))

  @functools.cached_property
  def expected(self):
    return dict(np.load(self.folder / "expected.npz"))

  @functools.cached_property
  def loaded(self):
    """The checkpoint; the momentum update comes first, as in the official forward."""
    heads = dict(num_heads_image=4, num_heads_text=4)
    loaded = albef_tasks.load(self.folder / "weights.safetensors", **heads)
    params, ema, memory = jax.tree.map(
      jnp.asarray, (loaded.params, loaded.ema, loaded.memory)
    )
    decay = self.config["momentum"]
    return params, tree.ema(ema, params, decay=decay), memory

  def text(self, name="input_ids", mask="attention_mask"):
    ids, mask = self.inputs[name], self.inputs[mask]
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask > 0)


OFFICIAL = {task: Official(task) for task in TASKS}


def model(config, **fields):
  """The model that `config.json` describes, from the modules that configs name."""
  bert, image = config["bert"], config["vit"]
  sizes = dict(
    num_heads=bert["num_attention_heads"],
    mlp_dim=bert["intermediate_size"],
    norm_eps=bert["layer_norm_eps"],
  )
  width, lower = bert["hidden_size"], bert["fusion_layer"]
  words = functools.partial(
    text.Encoder,
    vocab=VOCAB,
    width=width,
    length=bert["max_position_embeddings"],
    **sizes,
  )
  upper = bert["num_hidden_layers"] - lower
  fusion = cross_attention.Fusion(depth=upper, **sizes)
  if upper == 2 * lower:
    fusion = paired.Fusion(depth=upper // 2, **sizes)
  decoder = config.get("decoder")
  if decoder:
    fields["decoder"] = words(depth=decoder["num_hidden_layers"])
  return vlm.VLM(
    image=vit.Encoder(
      width=image["embed_dim"],
      depth=image["depth"],
      num_heads=image["num_heads"],
      mlp_dim=image["embed_dim"] * image["mlp_ratio"],
      patch=image["patch_size"],
      res=config["image_res"],
      norm_eps=image["norm_eps"],
    ),
    text=words(depth=lower),
    fusion=fusion,
    **fields,
  )


def nhwc(images):
  return jnp.asarray(images.transpose(0, 2, 3, 1))


def both_encoded(module, batch, ema):
  """(live, teacher) of a batch."""
  step = jnp.int32(0)
  enc = pretrainer_lib.encode(module.model, ask.Live(), batch, step)
  teacher = ask.Teacher(ema)
  other = pretrainer_lib.encode(module.model, teacher, batch, step)
  return enc, ask.Teacher(ema, other)


def close_gradients(got, theirs):
  """All in the official layout; what is rounding on the scale of the largest."""
  got = albef_tasks.export(jax.tree.map(np.asarray, got))
  largest = max(np.abs(x).max() for x in theirs.values())
  for name, want in theirs.items():
    if name.endswith(ROUNDING):
      np.testing.assert_allclose(got[name], want, atol=1e-5 * largest, err_msg=name)
      continue
    close(got[name], want, name)


# --- Checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_round_trip_is_bit_exact(task, tmp_path):
  path = OFFICIAL[task].folder / "weights.safetensors"
  heads = dict(num_heads_image=4, num_heads_text=4)
  loaded = albef_tasks.load(path, **heads)
  assert albef_tasks.task_of(reader.load(path)) == task
  again = tmp_path / "again.safetensors"
  albef_tasks.save(again, loaded)
  want, got = reader.load(path), reader.load(again)
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
    assert got[name].tobytes() == x.tobytes(), name


# --- Retrieval ------------------------------------------------------------------------


def retrieval_forward(self, batch, ema, drawn):
  """(sum of the losses, named arrays); the negatives are those that were drawn."""
  model, objectives = self.model, self.objectives
  enc, teacher = both_encoded(self, batch, ema)
  loss_itc, _ = objectives["itc"](model, enc, batch, teacher=teacher, train=True)
  found = jnp.ones(len(batch["text"]), bool)
  loss_itm, _ = objectives["itm"].loss(model, enc, *drawn, found, train=False)
  pairs = objectives["itm"].pairs(enc, *drawn)
  images, texts = test_parity_albef.by_kind(pairs)
  arrays = {
    "loss_ita": loss_itc.value(),
    "loss_itm": loss_itm.value(),
    "image_feat": enc.zimg,
    "text_feat": enc.ztxt,
    "image_feat_m": teacher.enc.zimg,
    "text_feat_m": teacher.enc.ztxt,
    "vl_output": objectives["itm"].logits(model, images, texts),
  }
  return loss_itc.value() + loss_itm.value(), arrays


@pytest.fixture(scope="module")
def fine_tuned():
  """(pretrainer, named arrays, new memory, gradients) of the retrieval model."""
  official = OFFICIAL["retrieval"]
  config, inputs = official.config, official.inputs
  queue = dict(queue=config["queue_size"], distill=config["alpha"], targets="image")
  width = config["bert"]["hidden_size"]
  module = pretrainer_lib.Pretrainer(
    model(config, embed_dim=config["embed_dim"]),
    dict(itc=itc.Objective(**queue), itm=itm.Objective(width=width)),
    dict(itc=1.0, itm=1.0),
  )
  params, ema, memory = official.loaded
  ids, mask = official.text()
  image_id = jnp.asarray(inputs["idx"], jnp.int32)
  batch = dict(image=nhwc(inputs["image"]), text=ids, text_mask=mask, image_id=image_id)
  names = ("neg_image_idx_for_text", "neg_text_idx_for_image")
  drawn = tuple(jnp.asarray(inputs[name], jnp.int32) for name in names)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    (total, arrays), new = module.apply(
      {"params": params, "memory": memory},
      batch,
      ema,
      drawn,
      method=retrieval_forward,
      mutable=["memory"],
    )
    return total, (arrays, new["memory"])

  (_, (arrays, new)), grads = jax.jit(loss)(params)
  return module, arrays, new, grads


@pytest.mark.parametrize(
  "name", ["loss_ita", "loss_itm", "image_feat", "text_feat", "vl_output"]
)
def test_retrieval_outputs(fine_tuned, name):
  close(fine_tuned[1][name], OFFICIAL["retrieval"].expected[name], name)


def test_retrieval_queues(fine_tuned):
  memory, expected = fine_tuned[2]["objectives_itc"], OFFICIAL["retrieval"].expected
  close(memory["image_queue"].T, expected["post/image_queue"])
  close(memory["text_queue"].T, expected["post/text_queue"])
  np.testing.assert_array_equal(memory["id_queue"], expected["post/idx_queue"][0])
  assert memory["ptr"] == expected["post/queue_ptr"][0]


def test_retrieval_similarities_targets_and_sampling_weights(fine_tuned):
  """Images of one id are each other's positives, in the batch and in the queue."""
  official = OFFICIAL["retrieval"]
  params, _, memory = official.loaded
  queues, ids = memory["objectives_itc"], official.inputs["idx"]
  hard = contrastive.positives(ids, np.concatenate([ids, queues["id_queue"]]))
  close(hard, official.expected["sim_targets"])
  test_parity_albef.check_contrast(
    fine_tuned[1],
    params["model"]["temp"],
    queues,
    official.expected,
    hard=np.asarray(hard),
    alpha=official.config["alpha"],
  )


def test_retrieval_negatives_are_never_of_the_same_image(fine_tuned):
  """Where the official weights are zero, ours are -inf."""
  module = fine_tuned[0]
  ids = jnp.asarray(OFFICIAL["retrieval"].inputs["idx"], jnp.int32)
  weights = OFFICIAL["retrieval"].expected["weights_i2t"]
  objective = module.objectives["itm"]
  assert objective.exclude == "image"
  same = np.asarray(ids)[:, None] == np.asarray(ids)[None]
  np.testing.assert_array_equal(weights == 0, same)


def test_retrieval_gradients(fine_tuned):
  theirs = reader.load(OFFICIAL["retrieval"].folder / "grads_all.safetensors")
  close_gradients(fine_tuned[3], theirs)
  assert len(theirs) > 80


def test_retrieval_evaluation(fine_tuned):
  """Retrieval.py `evaluation` and `itm_eval`, by our evaluator, from the images on."""
  module, official = fine_tuned[0], OFFICIAL["retrieval"]
  config, inputs, expected = official.config, official.inputs, official.expected
  params = official.loaded[0]
  ids, mask = official.text("eval_input_ids", "eval_attention_mask")

  @jax.jit
  def encode(params):
    def run(m):
      image = m.model.encode_image(nhwc(inputs["eval_images"]))
      words = m.model.encode_text(ids, mask)
      return image, words, m.model.embed_image(image), m.model.embed_text(words)

    return module.apply({"params": params}, method=run)

  images, words, zimg, ztxt = encode(params)
  close(zimg, expected["eval_image_embeds"])
  close(ztxt, expected["eval_text_embeds"])

  @jax.jit
  def score(params, rows, columns):
    def run(m):
      take = functools.partial(jax.tree.map, lambda x: x[rows])
      text = jax.tree.map(lambda x: x[columns], words)
      return m.objectives["itm"].score(m.model, take(images), text)

    return module.apply({"params": params}, method=run)

  evaluator = retrieval.Evaluator(rerank=config["k_test"])
  evaluator._score = lambda params, images, texts, rows, columns, per_image: np.asarray(
    score(params, rows, columns)
  )
  i2t, t2i = evaluator._rerank(params, np.asarray(zimg @ ztxt.T), None, None)
  close(i2t, expected["eval_score_i2t"])
  close(t2i, expected["eval_score_t2i"])
  # Beyond the candidates that were re-ranked all are tied, and the official sort is not
  # stable: where its numbers hang on that, they lie between the best and worst order.
  owner = inputs["eval_txt2img"]
  owned = owner[None] == np.arange(len(i2t))[:, None]
  for name, score, right in (("txt", i2t, owned), ("img", t2i, owned.T)):
    ours = np.where(right, score, -np.inf).max(axis=1, keepdims=True)
    before = (score > ours).sum(axis=1)
    tied = ((score == ours) & ~right).sum(axis=1)
    for k in (1, 5, 10):
      want = expected[f"eval_metric/{name}_r{k}"]
      most, least = (100 * np.mean(rank < k) for rank in (before, before + tied))
      assert least <= want <= most, (name, k)
  recall = metrics.retrieval_recall(i2t, t2i, owner)
  for ours, theirs in (("i2t_r1", "txt_r1"), ("t2i_r1", "img_r1")):
    np.testing.assert_allclose(recall[ours], expected[f"eval_metric/{theirs}"])
  for k in (5, 10):
    assert recall[f"t2i_r{k}"] == expected[f"eval_metric/img_r{k}"] == 100


# --- Classes: entailment and two images -----------------------------------------------


def classify_forward(self, batch, ema, distilled):
  """(loss, prediction) of one batch."""
  enc, teacher = both_encoded(self, batch, ema)
  objective = self.objectives["classify"]
  teacher = teacher if distilled else None
  loss, _ = objective(self.model, enc, batch, teacher=teacher, train=False)
  return loss.value(), objective.predict(
    self.model, enc.image, enc.text, batch.get("image2")
  )


@pytest.fixture(scope="module", params=["ve", "nlvr"])
def classified(request):
  official = OFFICIAL[request.param]
  config, inputs = official.config, official.inputs
  images = 2 if request.param == "nlvr" else 1
  classes = official.expected["prediction"].shape[1]
  width = config["bert"]["hidden_size"]
  objective = classify.Objective(
    width=width, classes=classes, images=images, distill=float(inputs["alpha"])
  )
  module = pretrainer_lib.Pretrainer(
    model(config, embed_dim=None), dict(classify=objective), dict(classify=1.0)
  )
  params, ema, _ = official.loaded
  ids, mask = official.text()
  label = jnp.asarray(inputs["targets"], jnp.int32)
  batch = dict(text=ids, text_mask=mask, label=label)
  pictures = jnp.split(nhwc(inputs["image"]), images)
  batch |= dict(zip(("image", "image2"), pictures, strict=False))

  def loss(params, distilled):
    return module.apply(
      {"params": params}, batch, ema, distilled, method=classify_forward
    )

  both = jax.jit(
    lambda params: (
      jax.value_and_grad(lambda p: loss(p, True), has_aux=True)(params),
      loss(params, False)[0],
    )
  )
  ((distilled, prediction), grads), plain = both(params)
  return official, distilled, plain, prediction, grads


def test_class_losses_and_logits(classified):
  official, distilled, plain, prediction, _ = classified
  close(distilled, official.expected["loss_distill"])
  close(plain, official.expected["loss_no_distill"])
  close(prediction, official.expected["prediction"])


def test_class_gradients(classified):
  official, *_, grads = classified
  path = official.folder / "grads_all.safetensors"
  if path.exists():
    theirs = reader.load(path)
    assert len(theirs) > 80
  else:
    found = official.expected
    theirs = {k[5:]: found[k] for k in found if k.startswith("grad/")}
    # The official layout has a shared gradient under one of its two names.
    assert len(theirs) == 4
  close_gradients(grads, theirs)


# --- VQA ------------------------------------------------------------------------------


def vqa_forward(self, batch, ema, distilled):
  enc, teacher = both_encoded(self, batch, ema)
  teacher = teacher if distilled else None
  objective = self.objectives["vqa"]
  loss, _ = objective(self.model, enc, batch, teacher=teacher, train=False)
  return loss.value(), self.model.fuse(enc.image, enc.text)


def per_question(inputs):
  """The official flat list of answers as [B, A, …], filled up with weight 0."""
  counts, flat = inputs["k"], inputs["answer_ids"]
  places = [(b, a) for b, count in enumerate(counts) for a in range(count)]
  shape = (len(counts), counts.max())
  answer = np.zeros((*shape, flat.shape[1]), np.int32)
  mask, weight = np.zeros(answer.shape, bool), np.zeros(shape, np.float32)
  for row, place in enumerate(places):
    answer[place], mask[place] = flat[row], inputs["answer_mask"][row] > 0
    weight[place] = inputs["weights"][row]
  return dict(answer=answer, answer_mask=mask, answer_weight=weight)


@pytest.fixture(scope="module")
def answered():
  official = OFFICIAL["vqa"]
  config, inputs = official.config, official.inputs
  batch = per_question(inputs)
  _, count, length = batch["answer"].shape
  objective = vqa.Objective(
    vocab=VOCAB,
    width=config["bert"]["hidden_size"],
    answers=count,
    length=length,
    distill=float(inputs["alpha"]),
  )
  module = pretrainer_lib.Pretrainer(
    model(config, embed_dim=None), dict(vqa=objective), dict(vqa=1.0)
  )
  ids, mask = official.text("question_ids", "question_mask")
  batch |= dict(image=nhwc(inputs["image"]), text=ids, text_mask=mask)
  batch = {name: jnp.asarray(value) for name, value in batch.items()}
  params, ema, _ = official.loaded

  def loss(params, distilled):
    return module.apply({"params": params}, batch, ema, distilled, method=vqa_forward)

  def rank(m):
    enc = pretrainer_lib.encode(m.model, ask.Live(), batch, jnp.int32(0))
    question = m.model.fuse(enc.image, enc.text)
    listed = official.text("answer_list_ids", "answer_list_mask")
    most = int(inputs["rank_k"])
    return m.objectives["vqa"].rank(m.model, question, *listed, most=most)

  run = jax.jit(
    lambda params: (
      jax.value_and_grad(lambda p: loss(p, True), has_aux=True)(params),
      loss(params, False)[0],
      module.apply({"params": params}, method=rank),
    )
  )
  return run(params)


def test_vqa_losses(answered):
  expected = OFFICIAL["vqa"].expected
  ((distilled, question), _), plain, _ = answered
  close(question.x, expected["question_states"])
  close(distilled, expected["loss_distill"])
  close(plain, expected["loss_no_distill"])


def test_vqa_gradients(answered):
  theirs = reader.load(OFFICIAL["vqa"].folder / "grads_all.safetensors")
  close_gradients(answered[0][1], theirs)
  assert len(theirs) > 200


def test_vqa_ranking(answered):
  expected = OFFICIAL["vqa"].expected
  chosen, probability = answered[2]
  np.testing.assert_array_equal(chosen, expected["rank_topk_ids"])
  close(probability, expected["rank_topk_probs"])


def test_vqa_teacher_after_the_step():
  """The momentum update inside of the official forward pass."""
  name = "text_decoder_m.bert.encoder.layer.0.crossattention.self.key.weight"
  official = OFFICIAL["vqa"]
  ema = jax.tree.map(np.asarray, official.loaded[1])
  got = albef_tasks.export(ema, momentum=True)[name]
  close(got, official.expected[f"post/{name}"])


# --- Starting from pretraining --------------------------------------------------------


@pytest.mark.parametrize("task", ["retrieval", "ve", "vqa"])
def test_tasks_start_from_a_pretraining_file(task):
  """As Retrieval.py, VE.py and VQA.py rename and drop its tensors."""
  folder = REFERENCE / "albef"
  config = json.loads((folder / "config.json").read_text())
  width, space = config["bert"]["hidden_size"], None
  if task == "retrieval":
    objectives, space = {"itm": itm.Objective(width=width)}, config["embed_dim"]
  elif task == "ve":
    objectives = {"classify": classify.Objective(width=width, classes=3)}
  else:
    config["decoder"] = dict(num_hidden_layers=2)
    objectives = {"vqa": vqa.Objective(vocab=VOCAB, width=width)}
  module = pretrainer_lib.Pretrainer(
    model(config, embed_dim=space), objectives, dict.fromkeys(objectives, 1.0)
  )
  columns = columns_lib.of(objectives, res=config["image_res"])
  batch = batch_lib.spec(2, config["image_res"], 6, columns=columns)
  wanted = step_lib.abstract_params(module, batch)
  path = folder / "weights.safetensors"
  got, theirs = albef_tasks.init(wanted, path=path), reader.load(path)
  fresh = {
    name
    for name, leaf in tree.flatten(got).items()
    if isinstance(leaf, jax.ShapeDtypeStruct)
  }
  assert all(name.startswith("objectives_classify/") for name in fresh)
  assert bool(fresh) == (task == "ve")
  names = albef_tasks.export(jax.tree.map(lambda x: np.zeros(x.shape), wanted))
  assert not any(".bert." in name and "decoder" not in name for name in names)
  if task == "vqa":
    # Layer 1 of the decoder is layer 3 of the pretrained stack.
    cross = got["model"]["decoder"]["blocks"]["cross"]["key"]["kernel"][1]
    name = "text_encoder.bert.encoder.layer.3.crossattention.self.key.weight"
    np.testing.assert_array_equal(cross, theirs[name].T.reshape(cross.shape))
    head = theirs["text_encoder.cls.predictions.transform.dense.weight"]
    np.testing.assert_array_equal(got["objectives_vqa"]["dense"]["kernel"], head.T)
