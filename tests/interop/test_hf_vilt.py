"""Directories of transformers' ViLT: what they compute, and back again.

tests/reference/hf/vilt_*: save_pretrained of transformers 5.23 and its outputs.
Tolerance as in test_parity_albef.py.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import hf_vilt
from vlp_jax.models import patches
from vlp_jax.models import text
from vlp_jax.models import vlm
from vlp_jax.models.fusion import merged
from vlp_jax.nn import ask
from vlp_jax.objectives import mlm
from vlp_jax.objectives import vqa_scores

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "hf"
CONFIG = json.loads((REFERENCE / "vilt_mlm" / "config.json").read_text())
FIELDS = hf_vilt.fields_of(CONFIG, "vilt_mlm")
WIDTH = FIELDS["fusion"]["width"]


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = CONFIG["vocab_size"]
  mask: int = 1
  special: tuple[int, ...] = ()


def model(**fields):
  """The model that config.json describes."""
  image, words = FIELDS["image"], FIELDS["text"]
  fusion = {k: v for k, v in FIELDS["fusion"].items() if k != "width"}
  sizes = dict(num_heads=fusion["num_heads"], mlp_dim=fusion["mlp_dim"])
  return vlm.VLM(
    image=patches.Encoder(**(image | dict(res=image["table_res"]))),
    text=text.Encoder(vocab=Vocab(), depth=0, **words, **sizes),
    fusion=merged.Fusion(text_width=WIDTH, image_width=WIDTH, **(fusion | fields)),
    embed_dim=None,
  )


HEADS = {
  "vilt_mlm": {"mlm": mlm.Objective(Vocab(), WIDTH)},
  "vilt_vqa": {"vqa_scores": vqa_scores.Objective(width=WIDTH, answers=11)},
}


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def arrays(name, file):
  return dict(np.load(REFERENCE / name / f"{file}.npz"))


def batch_of(inputs):
  lit = inputs["pixel_mask"] > 0
  sizes = [lit.any(axis=axis).sum(axis=1) for axis in (2, 1)]
  return dict(
    image=jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1)),
    image_size=jnp.asarray(np.stack(sizes, axis=1), jnp.int32),
    text=jnp.asarray(inputs["input_ids"], jnp.int32),
    text_mask=jnp.asarray(inputs["attention_mask"] > 0),
  )


def run(name, call):
  """`call(bound pretrainer, batch)` with the directory's parameters, compiled."""
  inputs = arrays(name, "inputs")
  module = pretrainer_lib.Pretrainer(model(), HEADS[name], {})
  params = hf_vilt.load(REFERENCE / name).params
  batch = batch_of(inputs)
  return jax.jit(lambda p: module.apply({"params": p}, batch, method=call))(params)


def test_masked_words():
  inputs, expected = arrays("vilt_mlm", "inputs"), arrays("vilt_mlm", "expected")
  labels = jnp.asarray(inputs["labels"], jnp.int32)

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    fused = self.model.fuse(enc.image, enc.text)
    head = self.objectives["mlm"]
    ids, mask = batch["text"], batch["text_mask"]
    logits = head.predict(self.model, ids, mask, enc.image)
    loss, _ = head.loss(
      self.model, enc, ids, mask, labels, labels != -100, None, train=False
    )
    both = jnp.concatenate([fused.x, fused.image.x], axis=1)
    real = jnp.concatenate([fused.mask, fused.image.mask], axis=1)
    return loss.value(), logits, both, real, fused.pooled

  loss, logits, states, real, pooled = run("vilt_mlm", call)
  close(loss, expected["loss"])
  close(logits, expected["logits"])
  close(pooled, expected["pooler_output"])
  close(states[real], expected["last_hidden_state"][np.asarray(real)])


def test_answers():
  """transformers' loss is the mean times the number of answers: their sum, as ours."""
  inputs, expected = arrays("vilt_vqa", "inputs"), arrays("vilt_vqa", "expected")
  scores = jnp.asarray(inputs["labels"])

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    head = self.objectives["vqa_scores"]
    loss, _ = head(self.model, enc, batch | dict(answer_scores=scores))
    return loss.value(), head.predict(self.model, enc.image, enc.words)

  loss, logits = run("vilt_vqa", call)
  close(loss, expected["loss"])
  close(logits, expected["logits"])


@pytest.mark.parametrize("name", HEADS)
def test_round_trip_is_bit_exact(name, tmp_path):
  assert formats.find(REFERENCE / name) == "hf_vilt"
  loaded = hf_vilt.load(REFERENCE / name)
  hf_vilt.save(tmp_path / name, loaded)
  want, got = hf.read(REFERENCE / name), hf.read(tmp_path / name)
  assert got.config == want.config
  assert got.tensors.keys() == want.tensors.keys()
  for key, x in want.tensors.items():
    assert got.tensors[key].tobytes() == x.tobytes(), key


@pytest.mark.parametrize("name", HEADS)
def test_a_model_describes_itself(name):
  """config.json of what was loaded says of it what the directory's says."""
  loaded = hf_vilt.load(REFERENCE / name)
  made = hf_vilt.of_model(model(), loaded.params)
  said = json.loads((REFERENCE / name / "config.json").read_text())
  for key, value in made.config.items():
    assert value == said.get(key, value), key
  assert hf_vilt.export(made.params).keys() == hf.read(REFERENCE / name).tensors.keys()


def test_a_decoder_of_its_own():
  """Official ViLT does not tie it to the table of words."""
  tensors = hf.read(REFERENCE / "vilt_mlm").tensors
  words = tensors["vilt.embeddings.text_embeddings.word_embeddings.weight"]
  params = hf_vilt.load(REFERENCE / "vilt_mlm").params
  params["objectives_mlm"]["decoder"] = {"kernel": 2.0 * words.T}
  made = hf_vilt.of_model(model(), params)
  assert made.config["tie_word_embeddings"] is False
  got = hf_vilt.export(made.params)["mlm_score.decoder.weight"]
  np.testing.assert_array_equal(got, 2.0 * words)


def test_init_and_what_does_not_fit():
  path = REFERENCE / "vilt_vqa"
  params = hf_vilt.load(path).params
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  got = hf_vilt.init(shapes, path=path, model=model())
  jax.tree.map(np.testing.assert_array_equal, got, params)
  with pytest.raises(ValueError, match=r"model\.fusion\.norm_eps=1e-06, there it is"):
    hf_vilt.init(shapes, path=path, model=model(norm_eps=1e-6))
  with pytest.raises(ValueError, match=r"mlm_score\.transform\.dense\.weight"):
    hf_vilt.init(shapes, path=REFERENCE / "vilt_mlm")
  with pytest.raises(ValueError, match="model_type='bert': want 'vilt'"):
    hf_vilt.load(REFERENCE / "bert")
  with pytest.raises(ValueError, match=r"not of ViLT's kind .*no model/fusion/blocks"):
    hf_vilt.init({"model": {}}, path=path)
