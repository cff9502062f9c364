"""Hugging Face directories: outputs, round trips, checks, and starting models of them.

tests/reference/hf: what transformers 5.23.0 computes from small random models, in
float32 on a CPU. Tolerance as in test_parity_albef.py.
"""

import json
import os
import pathlib
import shutil

import flax.linen as nn
import huggingface_hub
from huggingface_hub import errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_albef
from tests import tiny
from tests.interop import test_reader
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax.interop import augreg
from vlp_jax.interop import clip
from vlp_jax.interop import hf
from vlp_jax.interop import hf_bert
from vlp_jax.interop import hf_vit
from vlp_jax.interop import initial
from vlp_jax.interop import reader
from vlp_jax.interop import timm_vit
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import co_attention
from vlp_jax.models.fusion import cross_attention
from vlp_jax.nn import block
from vlp_jax.ops import posembed
from vlp_jax.ops import tree as tree_lib

ROOT = pathlib.Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference" / "hf"
FORMATS = dict(bert=hf_bert, bert_mlm=hf_bert, roberta=hf_bert, vit=hf_vit)
VOCAB = tiny.Vocab(size=160)
close = test_parity_albef.close


def arrays(name, file):
  return dict(np.load(REFERENCE / name / f"{file}.npz"))


def read_text(fields, params, ids, mask, types):
  """[B, L, D] of a text tower."""
  module = text.Encoder(vocab=VOCAB, **fields)
  tokens = module.apply({"params": params}, ids, mask, types=types)
  return tokens.x


def inputs_of(name):
  inputs = arrays(name, "inputs")
  ids = jnp.asarray(inputs["input_ids"], jnp.int32)
  types = inputs.get("token_type_ids")
  types = None if types is None else jnp.asarray(types, jnp.int32)
  return ids, jnp.asarray(inputs["attention_mask"] > 0), types


# --- What transformers computes -------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_text_towers(name):
  loaded = hf_bert.load(REFERENCE / name)
  expected = arrays(name, "expected")
  params = loaded.params["model"]["text"]
  x = jax.jit(lambda p: read_text(loaded.fields, p, *inputs_of(name)))(params)
  close(x, expected["last_hidden_state"])
  if "pooler_output" in expected:
    pooler = loaded.params["pooler"]
    pooled = np.tanh(x[:, 0] @ pooler["kernel"] + pooler["bias"])
    close(pooled, expected["pooler_output"])


def test_masked_words():
  loaded = hf_bert.load(REFERENCE / "bert_mlm")
  expected, inputs = arrays("bert_mlm", "expected"), arrays("bert_mlm", "inputs")
  labels = jnp.asarray(inputs["labels"], jnp.int32)
  predicted = labels != -100

  def loss(params):
    words, head = params["model"]["text"], params["objectives_mlm"]
    x = read_text(loaded.fields, words, *inputs_of("bert_mlm"))
    x = block.ACTIVATIONS["gelu"](x @ head["dense"]["kernel"] + head["dense"]["bias"])
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
    x = x * head["norm"]["scale"] + head["norm"]["bias"]
    logits = x @ words["word"]["embedding"].T + head["bias"]
    logp = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logp, jnp.where(predicted, labels, 0)[..., None], -1)
    return -jnp.sum(picked[..., 0] * predicted) / jnp.sum(predicted), logits

  params = jax.tree.map(jnp.asarray, loaded.params)
  (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  close(logits, expected["logits"])
  close(value, expected["loss"])
  close(grads["objectives_mlm"]["bias"], expected["grad/cls.predictions.bias"])
  grads = grads["model"]["text"]
  name = "grad/bert.embeddings.word_embeddings.weight"
  # PyTorch drops the look-up gradient of the padding row; the decoder's is left.
  close(grads["word"]["embedding"][1:], expected[name][1:])
  query = grads["blocks"]["attn"]["query"]["kernel"][0]
  name = "grad/bert.encoder.layer.0.attention.self.query.weight"
  close(query.reshape(32, 32).T, expected[name])


def test_vit():
  loaded = hf_vit.load(REFERENCE / "vit")
  expected = arrays("vit", "expected")
  image = jnp.asarray(arrays("vit", "inputs")["pixel_values"].transpose(0, 2, 3, 1))
  module = vit.Encoder(**loaded.fields)
  params = loaded.params["model"]["image"]
  x = jax.jit(lambda p: module.apply({"params": p}, image).x)(params)
  close(x, expected["last_hidden_state"])
  pooler = loaded.params["pooler"]
  pooled = np.tanh(x[:, 0] @ pooler["kernel"] + pooler["bias"])
  close(pooled, expected["pooler_output"])


# --- Round trips ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_is_bit_exact(name, tmp_path):
  FORMATS[name].save(tmp_path / "again", FORMATS[name].load(REFERENCE / name))
  want = hf.read(REFERENCE / name)
  got = hf.read(tmp_path / "again")
  assert got.config == want.config
  assert got.tensors.keys() == want.tensors.keys()
  for key, x in want.tensors.items():
    assert (got.tensors[key].shape, got.tensors[key].dtype) == (x.shape, x.dtype), key
    assert got.tensors[key].tobytes() == x.tobytes(), key


def changed(name, folder, *, config=None, tensors=None, file="model.safetensors"):
  """A copy of a directory with other fields or tensors; None takes one out."""
  directory = hf.read(REFERENCE / name)
  new = {
    key: x for key, x in (directory.tensors | (tensors or {})).items() if x is not None
  }
  folder.mkdir()
  config = directory.config | (config or {})
  (folder / "config.json").write_text(json.dumps(config))
  reader.save(folder / file, new)
  return folder


def test_old_names_tied_copies_and_bin_files_are_read(tmp_path):
  """BERT's first files: gamma and beta, position ids, a decoder that is tied."""
  tensors = dict(hf.read(REFERENCE / "bert_mlm").tensors)
  extra = {key: None for key in tensors if "LayerNorm" in key}
  for key in list(extra):
    name = key.replace("LayerNorm.weight", "LayerNorm.gamma")
    extra[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors[key]
  extra["bert.embeddings.position_ids"] = np.arange(20)[None]
  words = "bert.embeddings.word_embeddings.weight"
  extra["cls.predictions.decoder.weight"] = tensors[words]
  extra["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
  old = changed("bert_mlm", tmp_path / "old", tensors=extra, file="pytorch_model.bin")
  want, got = hf_bert.load(REFERENCE / "bert_mlm"), hf_bert.load(old)
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_several_files(tmp_path):
  directory = hf.read(REFERENCE / "vit")
  names = sorted(directory.tensors)
  places = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(names)}
  for file in set(places.values()):
    part = {k: directory.tensors[k] for k in names if places[k] == file}
    reader.save(tmp_path / file, part)
  (tmp_path / "config.json").write_text(json.dumps(directory.config))
  (tmp_path / hf.INDICES[0]).write_text(json.dumps({"weight_map": places}))
  got, want = hf_vit.load(tmp_path), hf_vit.load(REFERENCE / "vit")
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  out = places | {names[0]: "../x.safetensors"}
  (tmp_path / hf.INDICES[0]).write_text(json.dumps({"weight_map": out}))
  with pytest.raises(ValueError, match="is no file of this directory"):
    hf_vit.load(tmp_path)


# --- What is wrong is told, all at once -----------------------------------------------


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
  tensors = {
    "encoder.layer.1.output.dense.weight": None,
    "embeddings.word_embeddings.weight": np.zeros((160, 31), np.float32),
    "adapter.weight": np.zeros(3, np.float32),
  }
  with pytest.raises(ValueError) as error:
    hf_bert.load(changed("bert", tmp_path / "wrong", tensors=tensors))
  for text_ in (
    "unknown tensors (1)",
    "adapter.weight [3]",
    "missing tensors (1)",
    "encoder.layer.1.output.dense.weight",
    "wrong shapes (1)",
    "embeddings.word_embeddings.weight [160, 31]",
  ):
    assert text_ in str(error.value)


@pytest.mark.parametrize(
  "name, config, message",
  [
    ("bert", dict(model_type="gpt2"), "model_type='gpt2': want bert or roberta"),
    ("bert", dict(hidden_act="mish"), "hidden_act='mish': there are"),
    ("bert", dict(is_decoder=True), "is_decoder=True (want False)"),
    ("bert", dict(intermediate_size=65), "mlp_dim=65, there it is 64"),
    ("bert", dict(num_hidden_layers=3), "encoder.layer.2.attention"),
    ("vit", dict(image_size=64), "res=64, there it is 32"),
    ("vit", dict(num_channels=1), "num_channels=1 (want 3)"),
  ],
)
def test_a_config_that_the_tensors_are_not_of(tmp_path, name, config, message):
  with pytest.raises(ValueError) as error:
    FORMATS[name].load(changed(name, tmp_path / "wrong", config=config))
  assert message in str(error.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
  folder, marker = tmp_path / "bad", tmp_path / "ran"
  folder.mkdir()
  shutil.copy(REFERENCE / "bert" / "config.json", folder)
  evil = test_reader.Evil(os.system, f"touch {marker}")
  shutil.copy(test_reader.archive(tmp_path, {"x": evil}), folder / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"refused: it asks for .*system"):
    hf_bert.load(folder)
  assert not marker.exists()


# --- Starting a model -----------------------------------------------------------------


def albef_of(res=32, **bert):
  """An ALBEF whose towers are those of the reference directories, one layer each."""
  image = hf_vit.load(REFERENCE / "vit").fields | dict(res=res)
  words = hf_bert.load(REFERENCE / "bert_mlm").fields | dict(depth=1) | bert
  names = ("depth", "num_heads", "mlp_dim", "norm", "norm_eps", "act")
  upper = {name: words[name] for name in names}
  return vlm.VLM(
    image=vit.Encoder(**image),
    text=text.Encoder(vocab=VOCAB, **words),
    fusion=cross_attention.Fusion(**upper),
    embed_dim=8,
  )


def shapes(model):
  """Abstract parameters of a pretrainer with that model and an MLM head."""
  image = jax.ShapeDtypeStruct((2, model.image.res, model.image.res, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
  mask = jax.ShapeDtypeStruct((2, 6), jnp.bool_)

  def run(m, image, ids, mask):
    images, words = m.encode_image(image), m.encode_text(ids, mask)
    return m.embed_image(images), m.embed_text(words), m.fuse(images, words).x

  made = jax.eval_shape(
    lambda *args: model.init(jax.random.key(0), *args, method=run), image, ids, mask
  )
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  head = dict(
    dense=dict(kernel=leaf(32, 32), bias=leaf(32)),
    norm=dict(scale=leaf(32), bias=leaf(32)),
    bias=leaf(160),
  )
  return dict(model=nn.unbox(made["params"]), objectives_mlm=head)


INTO = dict(text="model/text", fusion="model/fusion", mlm="objectives_mlm")


def parts(**text_part):
  return dict(
    image=dict(type="hf_vit", path=str(REFERENCE / "vit"), into="model/image"),
    text=dict(type="hf_bert", path=str(REFERENCE / "bert_mlm"), into=INTO) | text_part,
  )


def test_albef_starts_from_vit_and_bert():
  """BERT's lower layer to the text tower, the upper one to fusion; images larger."""
  model = albef_of(res=64)
  wanted = shapes(model)
  got = tree_lib.flatten(initial.load(parts(), wanted, model=model))
  fresh = {k for k, x in got.items() if isinstance(x, jax.ShapeDtypeStruct)}
  cross = {k for k in got if "/cross/" in k or "/norm_cross/" in k}
  assert fresh == cross | {k for k in got if "_proj/" in k} | {"model/temp"}
  tensors = hf.read(REFERENCE / "bert_mlm").tensors
  for tower, layer in (("text", 0), ("fusion", 1)):
    name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
    up = got[f"model/{tower}/blocks/mlp/up/kernel"]
    np.testing.assert_array_equal(up[0], tensors[name].T)
  table = hf_vit.load(REFERENCE / "vit").params["model"]["image"]["posemb"]
  resized = posembed.resize_posembed(table, 8)
  np.testing.assert_allclose(got["model/image/posemb"], resized, rtol=1e-6)
  np.testing.assert_array_equal(
    got["objectives_mlm/bias"], tensors["cls.predictions.bias"]
  )


def test_a_tower_of_another_kind_is_refused_field_by_field():
  model = albef_of(act="relu", norm_eps=1e-6)
  with pytest.raises(ValueError) as error:
    initial.load(parts(), shapes(model), model=model)
  for tower in ("model.text", "model.fusion"):
    if tower in str(error.value):
      assert f"{tower}.act='relu', there it is 'gelu'" in str(error.value)
      assert f"{tower}.norm_eps=1e-06, there it is 1e-12" in str(error.value)
  assert "model.text" in str(error.value)


def test_two_parts_may_not_fill_one_leaf():
  model = albef_of()
  twice = parts() | {"again": parts()["image"]}
  with pytest.raises(ValueError, match=r"init.again and init.image both fill model/im"):
    initial.load(twice, shapes(model), model=model)


@pytest.mark.parametrize(
  "spec, message",
  [
    (dict(type="nope", path="x"), "init.type='nope': there are albef"),
    (dict(type="hf_bert"), "init.path is missing"),
    (dict(type="hf_bert", path="x", paht=1), "init.paht: no such argument"),
    (dict(image="x"), "init.image='x': want dict"),
    (dict(image=dict(type="nope")), "init.image.type='nope'"),
    ({}, "init.type=None"),
  ],
)
def test_specs_that_say_nothing(spec, message):
  with pytest.raises(ValueError) as error:
    initial.load(spec, {})
  assert message in str(error.value)


def test_timm_files_come_and_go(tmp_path):
  """DeiT's .pth: the same tower in timm's layout, its classifier left out."""
  loaded = hf_vit.load(REFERENCE / "vit")
  image = {"model": {"image": loaded.params["model"]["image"]}}
  head = dict(kernel=np.ones((32, 5), np.float32), bias=np.zeros(5, np.float32))
  path = tmp_path / "deit.pth"
  timm_vit.save(path, timm_vit.Checkpoint(image | {"classifier": head}), key="model")
  again = timm_vit.load(path, num_heads=4)
  jax.tree.map(
    np.testing.assert_array_equal, again.params, image | {"classifier": head}
  )
  with pytest.raises(ValueError, match=r"width 32, not a multiple of 64.*num_heads=…"):
    timm_vit.load(path)
  wanted = shapes(albef_of(res=32))
  got = initial.load(dict(vit=dict(type="timm_vit", path=str(path))), wanted)
  jax.tree.map(
    np.testing.assert_array_equal, got["model"]["image"], image["model"]["image"]
  )


def test_deit_with_its_second_token(tmp_path):
  """dist_token and head_dist of timm; the table has a row more before the patches."""
  image = dict(hf_vit.load(REFERENCE / "vit").params["model"]["image"])
  rng = np.random.default_rng(0)
  image["dist"] = rng.normal(size=32).astype(np.float32)
  image["posemb"] = rng.normal(size=(2 + 16, 32)).astype(np.float32)
  heads = {
    name: dict(kernel=np.ones((32, 5), np.float32), bias=np.zeros(5, np.float32))
    for name in ("classifier", "distillation_classifier")
  }
  path = tmp_path / "deit.pth"
  params = {"model": {"image": image}} | heads
  timm_vit.save(path, timm_vit.Checkpoint(params), key="model")
  assert {"dist_token", "head_dist.bias"} <= reader.load(path).keys()
  again = timm_vit.load(path, num_heads=4)
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  model = albef_of(res=64)
  plain = shapes(model)
  with pytest.raises(ValueError, match="dist_token -> model/image/dist"):
    initial.load(dict(type="timm_vit", path=str(path)), plain)
  tower = model.image.clone(distill_token=True, norm_eps=1e-6)
  model = model.clone(image=tower)
  got = initial.load(dict(type="timm_vit", path=str(path)), shapes(model), model=model)
  resized = posembed.resize_posembed(image["posemb"], 8, prefix=2)
  np.testing.assert_allclose(got["model"]["image"]["posemb"], resized, rtol=1e-6)
  written = hf_vit.of_model(model, got)
  assert written.config["model_type"] == "deit" and written.fields["distill_token"]
  hf_vit.save(tmp_path / "hf", written)
  back = hf_vit.load(tmp_path / "hf")
  assert back.fields == written.fields
  jax.tree.map(
    np.testing.assert_array_equal,
    back.params["model"],
    dict(image=got["model"]["image"]),
  )
  with pytest.raises(ValueError, match="distill_token=True wants class_token=True"):
    vit.Encoder(
      **again_fields(model), class_token=False, distill_token=True, pool="mean"
    ).init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))


def test_what_the_albef_config_starts_from(tmp_path):
  """Its parts fit the tree that it makes: here with small files in their places."""
  spec = config_lib.run(config_file.load(str(ROOT / "configs" / "albef.py"))).init
  with pytest.raises(FileNotFoundError, match=r"it is https://dl.fbaipublicfiles.com"):
    initial.load(spec, shapes(albef_of()))
  image = {"model": {"image": hf_vit.load(REFERENCE / "vit").params["model"]["image"]}}
  path = tmp_path / "deit.pth"
  timm_vit.save(path, timm_vit.Checkpoint(image), key="model")
  spec["image"]["path"], spec["text"]["path"] = str(path), str(REFERENCE / "bert_mlm")
  got = tree_lib.flatten(initial.load(spec, shapes(albef_of())))
  fresh = [k for k, x in got.items() if isinstance(x, jax.ShapeDtypeStruct)]
  names = ("/cross/", "/norm_cross/", "_proj/", "/temp")
  assert fresh and all(any(name in k for name in names) for k in fresh)


def tower_shapes(model):
  """Abstract parameters of the towers and the fusion of a model."""
  res = model.image.res
  image = jax.ShapeDtypeStruct((2, res, res, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
  mask = jax.ShapeDtypeStruct((2, 6), jnp.bool_)

  def run(m, image, ids, mask):
    images, words = m.encode_image(image), m.encode_text(ids, mask)
    if m.fusion is not None:
      return m.fuse(images, words).x
    return m.embed_image(images), m.embed_text(words)

  make = lambda *args: model.init(jax.random.key(0), *args, method=run)
  return dict(model=nn.unbox(jax.eval_shape(make, image, ids, mask)["params"]))


def test_what_the_meter_config_starts_from():
  """CLIP's image tower but for its last layer, on a larger grid, and RoBERTa."""
  spec = config_lib.run(config_file.load(str(ROOT / "configs" / "meter.py"))).init
  archive = ROOT / "tests" / "reference" / "clip_vit" / "model_jit.pt"
  made = clip.load(archive)["model"]["image"]
  depth = len(made["blocks"]["norm_attn"]["scale"])
  image = vit.Encoder(
    width=128,
    depth=depth - 1,
    num_heads=2,
    mlp_dim=512,
    patch=8,
    res=48,
    norm_pre=True,
    patch_bias=False,
    act="quick_gelu",
    norm_eps=1e-5,
  )
  words = hf_bert.load(REFERENCE / "roberta").fields
  fusion = co_attention.Fusion(
    text_width=32, image_width=128, depth=1, num_heads=4, mlp_dim=64
  )
  model = vlm.VLM(image, text.Encoder(vocab=VOCAB, **words), fusion, embed_dim=None)
  last = rf"visual\.transformer\.resblocks\.{depth - 1}\..*"
  assert spec["image"]["skip"] == (last.replace(str(depth - 1), "11"),)
  spec["image"].update(path=str(archive), skip=(last,))
  spec["text"]["path"] = str(REFERENCE / "roberta")
  shapes = tower_shapes(model)
  got = tree_lib.flatten(initial.load(spec, shapes, model=model))
  fresh = {k for k, x in got.items() if isinstance(x, jax.ShapeDtypeStruct)}
  assert fresh == {k for k in got if k.startswith("model/fusion/")}
  resized = posembed.resize_posembed(made["posemb"], 6)
  np.testing.assert_allclose(got["model/image/posemb"], resized, rtol=1e-6)
  kernel = made["blocks"]["mlp"]["up"]["kernel"][: depth - 1]
  np.testing.assert_array_equal(got["model/image/blocks/mlp/up/kernel"], kernel)
  with pytest.raises(ValueError, match=r"unknown tensors \(12\):\n.*resblocks"):
    initial.load(spec | dict(image=spec["image"] | dict(skip=())), shapes, model=model)
  other = model.clone(image=image.clone(act="gelu"))
  with pytest.raises(ValueError, match="model.image.act='gelu', but the checkpoint"):
    initial.load(spec, shapes, model=other)


def test_what_the_lit_config_starts_from(tmp_path):
  """A Vision Transformer of AugReg, whose GELU may be either, and flaxformer's BERT."""
  spec = config_lib.run(config_file.load(str(ROOT / "configs" / "lit.py"))).init
  with pytest.raises(FileNotFoundError, match=r"it is https://storage.*aug_medium1"):
    initial.load(spec, {})
  loaded = hf_vit.load(REFERENCE / "vit")
  path = tmp_path / "B_16.npz"
  tower = {"model": {"image": loaded.params["model"]["image"]}}
  augreg.save(path, augreg.Checkpoint(tower))
  fields = loaded.fields | dict(norm_eps=1e-6, act="gelu_tanh")
  words = hf_bert.load(REFERENCE / "bert").fields
  model = vlm.VLM(
    vit.Encoder(**fields),
    text.Encoder(vocab=VOCAB, **words | dict(act="gelu_tanh")),
    embed_dim=32,
    project=("text",),
  )
  spec["image"]["path"], spec["text"]["path"] = str(path), str(REFERENCE / "bert")
  shapes = tower_shapes(model)
  got = tree_lib.flatten(initial.load(spec, shapes, model=model))
  fresh = {k for k, x in got.items() if isinstance(x, jax.ShapeDtypeStruct)}
  assert fresh == {"model/text_proj/kernel", "model/text_proj/bias", "model/temp"}
  other = model.clone(image=model.image.clone(act="relu", norm_eps=1e-12))
  with pytest.raises(ValueError) as error:
    initial.load(spec, shapes, model=other)
  assert "act='relu', but the checkpoint wants 'gelu' or 'gelu_tanh'" in str(
    error.value
  )
  assert "model.image.norm_eps=1e-12, but the checkpoint wants 1e-06" in str(
    error.value
  )
  # config.json says "gelu", and the config that it is not so.
  del spec["text"]["act"]
  with pytest.raises(ValueError, match="act='gelu_tanh', there it is 'gelu'"):
    initial.load(spec, shapes, model=model)


def test_augreg_files_come_and_go(tmp_path):
  """vit_jax's .npz: kernels that are laid out as ours, patches as [p, q, 3, W]."""
  image = hf_vit.load(REFERENCE / "vit").params["model"]["image"]
  head = dict(kernel=np.ones((32, 5), np.float32), bias=np.zeros(5, np.float32))
  params = {"model": {"image": image}, "classifier": head}
  path = tmp_path / "B_8.npz"
  augreg.save(path, augreg.Checkpoint(params))
  theirs = reader.load(path)
  patch = hf.read(REFERENCE / "vit").tensors
  patch = patch["embeddings.patch_embeddings.projection.weight"]
  np.testing.assert_array_equal(theirs["embedding/kernel"], patch.transpose(2, 3, 1, 0))
  block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
  assert theirs[f"{block}/query/kernel"].shape == (32, 4, 8)
  assert theirs[f"{block}/out/kernel"].shape == (4, 8, 32)
  jax.tree.map(np.testing.assert_array_equal, augreg.load(path).params, params)
  got = initial.load(dict(type="augreg", path=str(path)), shapes(albef_of(res=32)))
  jax.tree.map(np.testing.assert_array_equal, got["model"]["image"], image)


# --- Towers of a trained model --------------------------------------------------------


def test_towers_of_a_model_are_written(tmp_path):
  model = albef_of()
  vit_params = hf_vit.load(REFERENCE / "vit").params
  params = initial.load(parts(), shapes(model), model=model)
  hf_vit.save(tmp_path / "vit", hf_vit.of_model(model, params))
  again = hf_vit.load(tmp_path / "vit")
  assert again.fields == hf_vit.load(REFERENCE / "vit").fields
  jax.tree.map(
    np.testing.assert_array_equal, again.params["model"], vit_params["model"]
  )
  hf_bert.save(tmp_path / "bert", hf_bert.of_model(model, params))
  again = hf_bert.load(tmp_path / "bert")
  want = hf_bert.load(REFERENCE / "bert_mlm").fields
  assert again.fields == want | dict(depth=1)
  text_params = again.params["model"]["text"]
  jax.tree.map(np.testing.assert_array_equal, text_params, params["model"]["text"])
  with pytest.raises(ValueError, match=r"norm_eps=1e-12, there it is 1e-06"):
    timm_vit.of_model(model, params)
  plain = model.clone(image=model.image.clone(norm_eps=1e-6))
  for module in (timm_vit, augreg):
    image = module.of_model(plain, params).params["model"]["image"]
    jax.tree.map(np.testing.assert_array_equal, image, vit_params["model"]["image"])
  odd = albef_of().clone(image=vit.Encoder(**again_fields(model), norm_pre=True))
  with pytest.raises(ValueError, match=r"model.image.norm_pre=True, there it is False"):
    hf_vit.of_model(odd, params)


def again_fields(model):
  names = ("width", "depth", "num_heads", "mlp_dim", "patch", "res")
  return {name: getattr(model.image, name) for name in names}


# --- Names of the hub -----------------------------------------------------------------


def test_hub_names_come_through_the_cache(monkeypatch):
  asked = []

  def download(repo, file):
    asked.append((repo, file))
    if not (REFERENCE / "vit" / file).is_file():
      raise errors.EntryNotFoundError(file)
    return str(REFERENCE / "vit" / file)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  name = "google/vit-base-patch16-224"
  assert hf_vit.load(name).fields["width"] == 32
  assert asked == [(name, "config.json"), (name, "model.safetensors")]


def test_offline_the_error_says_what_to_put_where(monkeypatch):
  def download(repo, file):
    raise errors.LocalEntryNotFoundError("offline")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  with pytest.raises(FileNotFoundError) as error:
    hf_vit.load("google/vit-base-patch16-224")
  for text_ in (
    "config.json and model.safetensors of"
    " https://huggingface.co/google/vit-base-patch16-224",
    "say path=FOLDER",
  ):
    assert text_ in str(error.value)


def cached(folder, files):
  """A cache of huggingface_hub that holds org/name with these files."""
  commit = "0123456789abcdef0123456789abcdef01234567"
  repository = folder / "models--org--name"
  snapshot = repository / "snapshots" / commit
  snapshot.mkdir(parents=True)
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text(commit)
  for file in files:
    shutil.copy(file, snapshot)
  return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """HF_HUB_OFFLINE=1 and HF_HUB_CACHE, which are read when the client is imported."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  return tmp_path


def test_a_cached_name_needs_no_network(offline):
  cached(offline, [REFERENCE / "vit" / f for f in ("config.json", "model.safetensors")])
  got, want = hf_vit.load("org/name"), hf_vit.load(REFERENCE / "vit")
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  with pytest.raises(FileNotFoundError) as error:
    hf_vit.load("org/other")
  assert "config.json and model.safetensors of https://huggingface.co/org/other" in str(
    error.value
  )
  assert str(offline) in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_cached_name_of_several_files(offline, suffix):
  folder = cached(offline, [REFERENCE / "vit" / "config.json"])
  tensors = hf.read(REFERENCE / "vit").tensors
  places = {key: f"part-{i % 2}.{suffix}" for i, key in enumerate(sorted(tensors))}
  index = hf.INDICES[suffix == "bin"]
  (folder / index).write_text(json.dumps({"weight_map": places}))
  with pytest.raises(FileNotFoundError, match=r"huggingface\.co/org/name"):
    hf_vit.load("org/name")
  for file in set(places.values()):
    reader.save(folder / file, {k: tensors[k] for k in tensors if places[k] == file})
  got, want = hf_vit.load("org/name"), hf_vit.load(REFERENCE / "vit")
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  (folder / "part-0.safetensors").unlink(missing_ok=True)
  (folder / "part-0.bin").unlink(missing_ok=True)
  with pytest.raises(FileNotFoundError, match=r"names part-0\.\w+, which is not there"):
    hf_vit.load(folder)


def test_directories_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match="no directory /nowhere/at/all"):
    hf_vit.load("/nowhere/at/all")
  with pytest.raises(FileNotFoundError, match="has no config.json"):
    hf_vit.load(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match="has no weights"):
    hf_vit.load(tmp_path)
  with pytest.raises(ValueError, match="is a file: name the directory"):
    hf_vit.load(tmp_path / "config.json")
