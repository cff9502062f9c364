"""Directories of transformers' BLIP: what they compute, and back again.

tests/reference/hf/blip_*: save_pretrained of transformers 5.23 and its outputs.
Tolerance as in test_parity_albef.py.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_blip as blip_test
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import hf_blip
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import interleaved
from vlp_jax.nn import ask
from vlp_jax.objectives import itm
from vlp_jax.objectives import lm
from vlp_jax.objectives import vqa
from vlp_jax.ops import decode
from vlp_jax.ops import tree as tree_lib

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "hf"
DIRECTORIES = ("blip_caption", "blip_itr", "blip_vqa")
EOS = 102
close = blip_test.close


def model_of(directory, *, reads, embed_dim=None, decoder=False, enc=201):
  """The model that config.json describes."""
  config = json.loads((REFERENCE / directory / "config.json").read_text())
  fields = hf_blip.fields_of(config, directory)
  vocab = blip_test.Vocab(size=config["text_config"]["vocab_size"], enc=enc)
  words = fields["text"] | dict(vocab=vocab, types=0)
  stack = {k: v for k, v in fields["text"].items() if k not in ("length", "width")}
  width = fields["image"]["width"]
  return vlm.VLM(
    image=vit.Encoder(**fields["image"]),
    text=text.Encoder(**(words | dict(depth=0))),
    fusion=interleaved.Fusion(**stack, image_width=width, reads=reads),
    decoder=text.Encoder(**words) if decoder else None,
    embed_dim=embed_dim,
  )


def arrays(directory, file):
  return dict(np.load(REFERENCE / directory / f"{file}.npz"))


def batch_of(inputs):
  return blip_test.batch_of(inputs | dict(image=inputs["pixel_values"]))


def apply(model, name, objective, directory, call):
  """(what `call(bound pretrainer, batch)` returns, …), compiled."""
  module = pretrainer_lib.Pretrainer(model, {name: objective}, {name: 1.0})
  params = jax.tree.map(jnp.asarray, hf_blip.load(REFERENCE / directory).params)
  batch = batch_of(arrays(directory, "inputs"))
  run = lambda p: module.apply({"params": p}, batch, method=call)
  return run, params


def settings(beams, length):
  return decode.Settings(
    max_length=length, beams=beams, eos=EOS, pad=0, rules="since_4.50"
  )


def same_text(got, want):
  """Equal up to the end: transformers 5 fills up with ends after a beam search."""
  for ours, theirs in zip(np.asarray(got).tolist(), want.tolist(), strict=True):
    cut = theirs.index(EOS) + 1 if EOS in theirs else len(theirs)
    assert ours[:cut] == theirs[:cut]


def test_captions():
  expected = arrays("blip_caption", "expected")
  prompts = arrays("blip_caption", "inputs")["input_ids"][:, :2]
  model = model_of("blip_caption", reads=("causal",))
  objective = lm.Objective(model.text.vocab, model.text.width, prompt=2)

  def call(self, batch):
    image = self.model.encode_image(batch["image"])
    enc = pretrainer_lib.Encoded(image, None, None, None, None, jnp.int32(0))
    head = self.objectives["lm"]
    loss, _ = head(self.model, enc, batch)
    logits = head.logits(self.model, image, batch["text"], batch["text_mask"])
    start = jnp.asarray(prompts, jnp.int32)
    greedy, beam = (
      head.generate(self.model, image, start, settings(beams, 12)) for beams in (1, 3)
    )
    return loss.value(), (logits, greedy, beam)

  run, params = apply(model, "lm", objective, "blip_caption", call)
  (loss, (logits, greedy, beam)), grads = jax.jit(
    jax.value_and_grad(run, has_aux=True)
  )(params)
  close(loss, expected["loss"])
  close(logits, expected["logits"])
  same_text(greedy, expected["generate_greedy"])
  same_text(beam, expected["generate_beam3"])
  ours = tree_lib.flatten(grads)
  words = "grad/text_decoder.bert.embeddings.word_embeddings.weight"
  close(ours["model/text/word/embedding"], expected[words])
  table = expected["grad/vision_model.embeddings.position_embedding"][0]
  close(ours["model/image/posemb"], table)
  key = "grad/text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"
  kernel = ours["model/fusion/blocks/cross/key/kernel"][1]
  close(kernel.reshape(len(kernel), -1).T, expected[key])


def test_matching():
  """It keeps [CLS] in front, where the official pretraining has [ENC]."""
  expected = arrays("blip_itr", "expected")
  model = model_of("blip_itr", reads=("bidirectional",), embed_dim=20, enc=None)

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    head = self.objectives["itm"]
    fused = self.model.fuse(enc.image, enc.words).x
    logits = head.logits(self.model, enc.image, enc.words)
    return enc.image.x, fused, logits, enc.zimg @ enc.ztxt.T

  objective = itm.Objective(width=model.text.width)
  run, params = apply(model, "itm", objective, "blip_itr", call)
  params = params | {"model": params["model"] | {"temp": jnp.float32(0.07)}}
  image, fused, logits, similarity = jax.jit(run)(params)
  close(image, expected["vision_last_hidden_state"])
  close(fused, expected["question_embeds"])
  close(logits, expected["itm_score"])
  close(similarity, expected["itc_score"])


def test_answers():
  """Its loss is the mean of all tokens, where the official code sums each answer's, and
  reads the padding of the question in training too."""
  inputs, expected = arrays("blip_vqa", "inputs"), arrays("blip_vqa", "expected")
  model = model_of("blip_vqa", reads=("bidirectional",), decoder=True)
  answers = jnp.asarray(inputs["decoder_input_ids"], jnp.int32)
  mask = jnp.asarray(inputs["decoder_attention_mask"] > 0)

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    head = self.objectives["vqa"]
    question = self.model.fuse(enc.image, enc.words).replace(mask=None)
    logp = head._decode(ask.Live(), self.model, answers, mask, question)
    losses, _, counted = head._next_words(logp[:, :-1], answers, mask)
    ids = head.generate(self.model, question, settings(3, 8))
    return losses.sum() / counted.sum(), ids, enc.image.x

  objective = vqa.Objective(vocab=model.text.vocab, width=model.text.width)
  run, params = apply(model, "vqa", objective, "blip_vqa", call)
  loss, ids, image = jax.jit(run)(params)
  close(image, expected["vision_last_hidden_state"])
  close(loss, expected["loss"])
  same_text(ids[:, 1:], expected["generate_beam3"][:, 1:])


@pytest.mark.parametrize("name", DIRECTORIES)
def test_round_trip_is_bit_exact(name, tmp_path):
  assert formats.find(REFERENCE / name) == "hf_blip"
  loaded = hf_blip.load(REFERENCE / name)
  hf_blip.save(tmp_path / name, loaded)
  want, got = hf.read(REFERENCE / name), hf.read(tmp_path / name)
  assert got.config == want.config
  assert got.tensors.keys() == want.tensors.keys()
  for key, x in want.tensors.items():
    assert got.tensors[key].tobytes() == x.tobytes(), key


def test_init_and_what_does_not_fit():
  params = hf_blip.load(REFERENCE / "blip_itr").params
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  got = hf_blip.init(shapes, path=REFERENCE / "blip_itr")
  jax.tree.map(np.testing.assert_array_equal, got, params)
  model = model_of("blip_itr", reads=("bidirectional",), embed_dim=20)
  hf_blip.init(shapes, path=REFERENCE / "blip_itr", model=model)
  for tower in ("image", "text", "fusion"):
    wrong = dict(act="quick_gelu", norm_eps=1e-3)
    other = model.clone(**{tower: getattr(model, tower).clone(**wrong)})
    with pytest.raises(ValueError) as error:
      hf_blip.init(shapes, path=REFERENCE / "blip_itr", model=other)
    for field in ("act='quick_gelu'", "norm_eps=0.001"):
      assert f"model.{tower}.{field}, but the checkpoint wants" in str(error.value)
  with pytest.raises(ValueError, match=r"text_decoder\.bert\.encoder\.layer\.0"):
    hf_blip.init(shapes, path=REFERENCE / "blip_vqa")
  with pytest.raises(ValueError, match="model_type='bert': want 'blip'"):
    hf_blip.load(REFERENCE / "bert")


def test_a_model_of_several_tasks_is_none_of_transformers():
  params = hf_blip.load(REFERENCE / "blip_itr").params
  model = model_of("blip_itr", reads=("bidirectional",), embed_dim=20)
  made = hf_blip.of_model(model, params)
  said = json.loads((REFERENCE / "blip_itr" / "config.json").read_text())
  assert made.config["architectures"] == said["architectures"]
  for section in ("text_config", "vision_config"):
    for key, value in made.config[section].items():
      # What the class does not read: the width of a space that it has elsewhere.
      if key not in ("projection_dim", "bos_token_id"):
        assert value == said[section][key], (section, key)
  with pytest.raises(ValueError, match=r"want one objective of lm, itm, vqa"):
    hf_blip.of_model(model, params | {"objectives_lm": {}})
