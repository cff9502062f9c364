"""Directories of transformers' FLAVA: what they compute, all losses, and back again.

tests/reference/hf/flava*: save_pretrained of transformers 5.23 and its outputs.
Tolerance as in test_parity_albef.py.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.data import columns
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import hf_flava
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import bridged
from vlp_jax.objectives import mim
from vlp_jax.objectives import mmm
from vlp_jax.objectives import text_mlm
from vlp_jax.ops import contrastive
from vlp_jax.ops import reduce

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "hf"
CONFIG = json.loads((REFERENCE / "flava" / "config.json").read_text())
FIELDS = hf_flava.fields_of(CONFIG, "flava")
WIDTH = FIELDS["fusion"]["width"]


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = CONFIG["text_config"]["vocab_size"]
  pad: int = 0
  mask: int = 103
  special: tuple[int, ...] = (101, 102)


def model():
  """The model that config.json describes."""
  return vlm.VLM(
    image=vit.Encoder(**FIELDS["image"]),
    text=text.Encoder(vocab=Vocab(), **FIELDS["text"]),
    fusion=bridged.Fusion(text_width=WIDTH, image_width=WIDTH, **FIELDS["fusion"]),
    embed_dim=CONFIG["projection_dim"],
    scale="log_scale",
  )


HEADS = dict(
  mim=mim.Objective(WIDTH, codes=50, patches=16),
  text_mlm=text_mlm.Objective(Vocab(), WIDTH, tied=False),
  mmm=mmm.Objective(Vocab(), WIDTH, codes=50, patches=16),
)


PARTS = ("model", "objectives_mim", "objectives_mmm", "objectives_text_mlm")


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def arrays(name, file):
  return dict(np.load(REFERENCE / name / f"{file}.npz"))


def pixels(inputs):
  return jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1))


def test_outputs():
  inputs, want = arrays("flava", "inputs"), arrays("flava", "expected")

  @jax.jit
  def run(params):
    def read(self):
      image = self.encode_image(pixels(inputs))
      ids = jnp.asarray(inputs["input_ids"], jnp.int32)
      words = self.encode_text(ids, jnp.asarray(inputs["attention_mask"] > 0))
      fused = self.fuse(image, words)
      all_tokens = jnp.concatenate([fused.pooled[:, None], fused.image.x, fused.x], 1)
      return image.x, words.x, all_tokens

    return model().apply({"params": params}, method=read)

  got = run(hf_flava.load(REFERENCE / "flava").params["model"])
  for name, value in zip(("image", "text", "multimodal"), got, strict=True):
    close(value, want[f"{name}_embeddings"], name)


def test_losses():
  """Masked parts and contrast count the matching pairs alone."""
  inputs = arrays("flava_pretraining", "inputs")
  want = arrays("flava_pretraining", "expected")
  ids, masked = (
    jnp.asarray(inputs[k], jnp.int32) for k in ("input_ids", "input_ids_masked")
  )
  real = jnp.asarray(inputs["attention_mask"] > 0)
  matched = jnp.asarray(inputs["itm_labels"] > 0)
  hidden = jnp.asarray(inputs["bool_masked_pos"].reshape(3, -1) > 0)
  predicted = jnp.asarray(inputs["mlm_labels"] != -100)
  codes = jnp.asarray(np.maximum(inputs["mim_labels"], 0), jnp.int32)

  def read(self):
    net, pairs = self.model, self.objectives["mmm"]
    fused = net.fuse(
      net.encode_image(pixels(inputs), None, hidden), net.encode_text(masked, real)
    )
    loss, parts = pairs.loss(
      fused,
      matched=matched,
      found=jnp.ones(3, bool),
      words=(ids, predicted),
      codes=(codes, hidden),
    )
    zimg = net.embed_image(net.encode_image(pixels(inputs)))
    ztxt = net.embed_text(net.encode_text(ids, real))
    logits = net.inverse_temperature() * zimg @ ztxt.T
    both = [contrastive.cross_entropy(x, jnp.eye(3)) for x in (logits, logits.T)]
    itc = reduce.Mean.of((both[0] + both[1]) / 2, matched).value()
    return {
      "loss_itm": parts["itm"].value(),
      "loss_mmm_text": parts["text"].value(),
      "loss_mmm_image": parts["image"].value(),
      "loss_global_contrastive": itc,
      "loss": loss.value() + itc,
      "itm_logits": pairs.matches(fused),
      "contrastive_logits_per_image": logits[np.flatnonzero(inputs["itm_labels"])],
    }

  module = pretrainer_lib.Pretrainer(model(), HEADS, dict.fromkeys(HEADS, 1.0))
  params = dict(hf_flava.load(REFERENCE / "flava_pretraining").params)
  del params["poolers"]
  got = jax.jit(lambda p: module.apply({"params": p}, method=read))(params)
  assert set(got) == set(want)
  for name, value in got.items():
    close(value, want[name], name)


@pytest.mark.parametrize("name", ["flava", "flava_pretraining"])
def test_round_trip(name, tmp_path):
  assert formats.find(REFERENCE / name) == "hf_flava"
  hf_flava.save(tmp_path / "back", hf_flava.load(REFERENCE / name))
  before, after = (hf.read(p) for p in (REFERENCE / name, tmp_path / "back"))
  assert before.config == after.config
  assert before.tensors.keys() == after.tensors.keys()
  for key, x in before.tensors.items():
    assert x.dtype == after.tensors[key].dtype
    assert x.tobytes() == after.tensors[key].tobytes()


def test_starts_a_model():
  path = REFERENCE / "flava_pretraining"
  params = dict(hf_flava.load(path).params)
  del params["poolers"]
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  got = hf_flava.init(shapes, path=path, model=model())
  jax.tree.map(np.testing.assert_array_equal, got, params)
  other = model().clone(fusion=model().fusion.clone(depth=3))
  with pytest.raises(ValueError, match=r"model\.fusion\.depth=3, there it is 2"):
    hf_flava.init(shapes, path=path, model=other)
  for tower in ("image", "text", "fusion"):
    part = getattr(model(), tower).clone(act="relu", norm_eps=1e-3)
    with pytest.raises(ValueError) as error:
      hf_flava.init(shapes, path=path, model=model().clone(**{tower: part}))
    for field in ("act='relu'", "norm_eps=0.001"):
      assert f"model.{tower}.{field}, there it is" in str(error.value)


def test_a_codebook_is_carried_along(tmp_path):
  """facebook/flava-full has its dVAE beside the model."""
  path = tmp_path / "whole"
  shutil.copytree(REFERENCE / "flava_pretraining", path)
  tensors = hf.read(path).tensors
  extra = {"image_codebook.blocks.input.weight": np.arange(12, dtype=np.float32)}
  reader.save(path / "model.safetensors", {**tensors, **extra})
  loaded = hf_flava.load(path)
  hf_flava.save(tmp_path / "back", loaded)
  again = hf.read(tmp_path / "back").tensors
  assert again.keys() == tensors.keys() | extra.keys()
  for name, x in extra.items():
    np.testing.assert_array_equal(again[name], x)
  made = hf_flava.of_model(model(), {k: loaded.params[k] for k in PARTS})
  assert made.config["architectures"] == ["FlavaForPreTraining"]
  assert made.config["image_config"]["vocab_size"] == 50
  said = json.loads((path / "config.json").read_text())
  for section in ("image_config", "text_config", "multimodal_config"):
    for key, value in made.config[section].items():
      assert value == said[section][key], (section, key)


def test_bad_input():
  with pytest.raises(ValueError, match="want 'flava'"):
    hf_flava.fields_of(dict(model_type="vilt"), "it")
  with pytest.raises(ValueError, match="not of FLAVA's kind"):
    hf_flava.export({"model": {"image": {"cls": np.zeros(3)}}})
  with pytest.raises(ValueError, match=r"objectives\.mim\.patches"):
    x, codes = jnp.zeros((2, 17, WIDTH)), jnp.zeros((2, 9), jnp.int32)
    hide = jnp.zeros((2, 16), bool)
    HEADS["mim"].init(jax.random.key(0), x, codes, hide, method="loss")


def test_objectives_draw_what_they_hide():
  """Half of the patches, pairs of another image; a loss of its own each."""
  inputs = arrays("flava_pretraining", "inputs")
  batch = dict(
    image=pixels(inputs),
    image_id=jnp.arange(3),
    text=jnp.asarray(inputs["input_ids"], jnp.int32),
    text_mask=jnp.asarray(inputs["attention_mask"] > 0),
    codes=jnp.asarray(np.maximum(inputs["mim_labels"], 0), jnp.int32),
  )
  heads = {name: HEADS[name] for name in HEADS}
  module = pretrainer_lib.Pretrainer(model(), heads, dict.fromkeys(heads, 1.0))
  params = dict(hf_flava.load(REFERENCE / "flava_pretraining").params)
  del params["poolers"]

  @jax.jit
  def run(seed):
    rngs = {k: jax.random.key(seed + i) for i, k in enumerate(("mask", "sample"))}
    return module.apply({"params": params}, batch, rngs=rngs)

  loss, parts = run(0)
  assert np.isfinite(loss.value())
  assert parts["mim"].weight == 3 * round(0.4 * 16)
  assert parts["mmm/itm"].weight == 3
  assert 0 < parts["text_mlm"].weight < inputs["attention_mask"].sum()
  assert np.isfinite(parts["text_mlm"].value())
  # One of three pairs is replaced, and does not count for the codes.
  assert parts["mmm/image"].weight == 2 * round(0.4 * 16)
  assert parts["mim"].value() != run(1)[1]["mim"].value()


def test_column_of_codes():
  made = columns.of({"mim": HEADS["mim"], "mmm": HEADS["mmm"]}, res=32)
  rows = [made.example({"codes": np.arange(16).reshape(4, 4)}, None, None)] * 2
  got = made.batch(rows, None)["codes"]
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, [np.arange(16)] * 2)
  with pytest.raises(ValueError, match="9 codes of an image"):
    made.batch([{"codes": np.zeros(9)}], None)
