"""Against the official PyTorch code of VLP: outputs, losses, gradients, captions.

tests/reference/vlp holds what LuoweiZhou/VLP computes from a small checkpoint of the
official layout, of 100 regions an image. Tolerance rtol 1e-4 with atol 1e-5 of the
array's largest value, as for ALBEF: both sides are float32.
"""

import dataclasses
import functools
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.data import pp
from vlp_jax.data import regions as regions_data
from vlp_jax.interop import formats
from vlp_jax.interop import reader
from vlp_jax.interop import vlp
from vlp_jax.models import regions
from vlp_jax.models import vlm
from vlp_jax.models import words
from vlp_jax.models.fusion import stream
from vlp_jax.objectives import mlm
from vlp_jax.ops import beam
from vlp_jax.ops import region_match

REFERENCE = pathlib.Path(__file__).parent / "reference" / "vlp"
SIZE = json.loads((REFERENCE / "config.json").read_text())
WIDTH, REGIONS = SIZE["hidden_size"], SIZE["len_vis_input"]
TAGS = ("s2s", "bi", "bi_vismask")
# Of an official row: [CLS], 100 regions, [SEP]. What is behind is text.
BEFORE = REGIONS + 2
VARIANTS = {"drop0.25": dict(drop_worst=0.25), "smooth0.1": dict(smoothing=0.1)}


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = SIZE["vocab_size"]
  pad: int = 0
  sep: int = SIZE["special"]["SEP"]
  mask: int = SIZE["special"]["MASK"]
  special: tuple[int, ...] = ()


@functools.cache
def arrays(file):
  return dict(np.load(REFERENCE / f"{file}.npz"))


@functools.cache
def pretrainer():
  """The model that `config.json` describes, from the modules that configs name."""
  sizes = dict(num_heads=SIZE["num_attention_heads"], mlp_dim=SIZE["intermediate_size"])
  model = vlm.VLM(
    image=regions.Encoder(
      width=WIDTH, features=SIZE["vis_feat_dim"], places=SIZE["vis_pe_dim"]
    ),
    text=words.Encoder(
      vocab=Vocab(),
      width=WIDTH,
      length=SIZE["max_position_embeddings"],
      between=REGIONS,
      **sizes,
    ),
    fusion=stream.Fusion(
      text_width=WIDTH,
      image_width=WIDTH,
      depth=SIZE["num_hidden_layers"],
      types=SIZE["type_vocab_size"],
      norm_eps=SIZE["layer_norm_eps"],
      **sizes,
    ),
    embed_dim=None,
  )
  fields = dict(vocab=Vocab(), width=WIDTH, norm_eps=SIZE["layer_norm_eps"])
  heads = {name: mlm.Objective(**fields, **more) for name, more in VARIANTS.items()}
  heads["mlm"] = mlm.Objective(**fields)
  return pretrainer_lib.Pretrainer(model, heads, dict.fromkeys(heads, 1.0))


@functools.cache
def params():
  path = REFERENCE / "weights.safetensors"
  loaded = dict(vlp.load(path, num_heads=SIZE["num_attention_heads"]).params)
  # The variants of the loss have the same head.
  loaded |= {f"objectives_{name}": loaded["objectives_mlm"] for name in VARIANTS}
  return jax.tree.map(jnp.asarray, loaded)


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def ours(x):
  """[CLS] and the text of official rows [B, 119]."""
  return np.concatenate([x[:, :1], x[:, BEFORE:]], axis=1)


def batch_of(tag):
  """What the objective reads, of the official names."""
  given = {
    key.removeprefix(f"{tag}/"): x
    for key, x in arrays("inputs").items()
    if key.startswith(f"{tag}/")
  }
  # A token is real if another one sees it.
  real = ours(given["input_mask"].any(axis=1))
  rows, columns = np.nonzero(given["masked_weights"])
  at = given["masked_pos"][rows, columns] - BEFORE + 1
  predicted = np.zeros(real.shape, bool)
  predicted[rows, at] = True
  labels = np.zeros(real.shape, np.int32)
  labels[rows, at] = given["lm_label_ids"][rows, columns]
  kept = np.ones((len(real), REGIONS), bool)
  # Of those tags that hide none, regions that are not used.
  hidden = given["vis_masked_pos"] - 1
  np.put_along_axis(kept, hidden, False, axis=1)
  hidden = hidden if hidden.size else np.tile(np.arange(REGIONS // 4), (len(real), 1))
  return dict(
    ids=jnp.asarray(ours(given["input_ids"]), jnp.int32),
    mask=jnp.asarray(real),
    labels=jnp.asarray(labels),
    predicted=jnp.asarray(predicted),
    causal=jnp.full(len(real), tag == "s2s"),
    kept=jnp.asarray(kept),
    hidden=jnp.asarray(hidden, jnp.int32),
  )


def rows_of(features, places):
  """As `data/regions.py` puts them together: all regions are there."""
  return jnp.concatenate([features, places, jnp.ones_like(places[..., :1])], axis=-1)


def forward(self, batch):
  """(the loss, what the stream and the head make of the batch)."""
  net, head = self.model, self.objectives["mlm"]
  inputs = arrays("inputs")
  places = jnp.asarray(inputs["vis_pe_f16"], jnp.float32)
  features = jnp.asarray(inputs["vis_feats"])
  image = net.image(rows_of(features, places), hidden=~batch["kept"])
  text = net.encode_text(batch["ids"], batch["mask"])
  enc = pretrainer_lib.Encoded(image, text, text, None, None, jnp.int32(0))
  causal = batch["causal"]
  fused = net.fuse(image, text, attention=causal)

  def words_loss(head):
    given = (batch[name] for name in ("ids", "mask", "labels", "predicted"))
    return head.loss(net, enc, *given, None, attention=causal, train=False)[0].value()

  loss = words_loss(head)
  others = {name: words_loss(self.objectives[name]) for name in VARIANTS}
  pick = lambda x: jnp.take_along_axis(x, batch["hidden"][..., None], axis=1)
  matched = region_match.loss(
    *map(pick, net.image.parts(features, places)), fused.pooled
  )
  matched = matched.mean()
  total = loss + jnp.where(batch["kept"].all(), 0.0, matched)
  logits = head.predict(net, batch["ids"], batch["mask"], image, attention=causal)
  others |= dict(loss=loss, matched=matched)
  return total, others | dict(words=fused.x, regions=fused.image.x, logits=logits)


@functools.cache
def official():
  """tag -> (loss, arrays), gradients: compiled once, run for every tag."""

  def loss(params, batch):
    return pretrainer().apply({"params": params}, batch, method=forward)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return {tag: run(params(), batch_of(tag)) for tag in TAGS}


@pytest.mark.parametrize("tag", TAGS)
def test_outputs_and_loss(tag):
  (_, got), _ = official()[tag]
  want, batch = arrays("expected"), batch_of(tag)
  close(got["loss"], want[f"{tag}/masked_lm_loss"])
  for name in VARIANTS:
    close(got[name], want[f"{tag}/masked_lm_loss_{name}"], name)
  if tag == "bi_vismask":
    close(got["matched"], want[f"{tag}/vis_pretext_loss"])
  sequence = want[f"{tag}/sequence_output"]
  real = np.asarray(batch["mask"])
  close(np.asarray(got["words"])[real], ours(sequence)[real])
  close(got["regions"], sequence[:, 1 : REGIONS + 1])
  given = arrays("inputs")
  rows, columns = np.nonzero(given[f"{tag}/masked_weights"])
  at = given[f"{tag}/masked_pos"][rows, columns] - BEFORE + 1
  scores = want[f"{tag}/prediction_scores_masked"][rows, columns]
  close(np.asarray(got["logits"])[rows, at], scores)


@pytest.mark.parametrize("tag", TAGS)
def test_gradients(tag):
  _, grads = official()[tag]
  grads = {k: grads[k] for k in grads if k.removeprefix("objectives_") not in VARIANTS}
  got = vlp.export(jax.tree.map(np.asarray, grads))
  want = {
    name.removeprefix(f"{tag}/grad/"): x
    for name, x in arrays("expected").items()
    if name.startswith(f"{tag}/grad/")
  }
  assert len(want) == 7
  for name, x in want.items():
    close(got[name], x, name)


def test_raw_boxes_become_places():
  inputs, want = arrays("inputs"), arrays("expected")["raw0/vis_pe"]
  boxes, classes = inputs["raw0/bbox"], inputs["raw0/cls_prob_f16"]
  # The first regions alone have their classes here; boxes are scaled by all of them.
  classes = np.concatenate([classes, np.tile(classes[:1], (REGIONS - len(want), 1))])
  close(regions_data.places(boxes, classes.astype(np.float32))[: len(want)], want)


def test_a_file_of_regions_becomes_what_the_official_loader_makes():
  """From the .npz of an image to rows of a batch, by the word of configs/vlp.py."""
  inputs, want = arrays("inputs"), arrays("expected")["raw0/vis_pe"]
  boxes, classes = inputs["raw0/bbox"], inputs["raw0/cls_prob_f16"]
  classes = np.concatenate([classes, np.tile(classes[:1], (REGIONS - len(want), 1))])
  looks = inputs["vis_feats"][0]
  file = io.BytesIO()
  np.savez(
    file,
    features=looks,
    boxes=boxes[:, :4],
    size=np.array([640, 480]),
    soft_labels=classes,
    conf=boxes[:, 5],
  )
  op = pp.parse(f"regions(100, 'vlp', features={looks.shape[1]}, fewest=100)")
  rows = op({"image": file.getvalue(), "caption": "x"}, None)["image"]
  found = regions.split(rows[None], looks.shape[1], SIZE["vis_pe_dim"], 0)
  np.testing.assert_array_equal(found.features[0], looks)
  close(found.places[0, : len(want)], want)
  assert found.mask.all()


WRITERS = {
  "greedy": dict(beams=1),
  "beam3": dict(beams=3),
  "beam3_lp": dict(beams=3, length_bonus=1.5, min_words=4),
}


@pytest.mark.parametrize("name", WRITERS)
def test_captions(name):
  options = dict(WRITERS[name], max_length=13, eos=Vocab.sep, pad=0)
  inputs, want = arrays("inputs"), arrays("expected")

  def write(self, features, places, start):
    net, head = self.model, self.objectives["mlm"]
    image = net.image(rows_of(features, places))
    image = jax.tree.map(lambda x: jnp.repeat(x, options["beams"], axis=0), image)
    following = lambda ids, at: head.next_logits(net, image, ids, at)
    return beam.generate(following, start, **options)

  start = jnp.asarray(inputs["decode/input_ids"][:, :1], jnp.int32)
  features = jnp.asarray(inputs["vis_feats"])
  places = jnp.asarray(inputs["vis_pe_f16"], jnp.float32)
  got = jax.jit(lambda *x: pretrainer().apply({"params": params()}, *x, method=write))(
    features, places, start
  )
  if name == "greedy":
    # The official code writes on behind the end.
    rows = want["decode/greedy_ids"]
    behind = np.cumsum(rows == Vocab.sep, axis=1) - (rows == Vocab.sep) > 0
    rows = np.where(behind, 0, rows)
  else:
    rows = want[f"decode/{name}/pred_seq"][:, :12]
  np.testing.assert_array_equal(got[:, 1:], rows)


def test_the_format_is_found_and_written_back_bit_by_bit(tmp_path):
  path = REFERENCE / "weights.safetensors"
  assert formats.find(path) == "vlp"
  heads = dict(num_heads=SIZE["num_attention_heads"])
  out = tmp_path / "model.bin"
  formats.save(out, formats.load(path, None, heads), "vlp")
  was, now = reader.load(path), reader.load(out)
  assert was.keys() == now.keys()
  for key, x in was.items():
    assert (x.dtype, x.tobytes()) == (now[key].dtype, now[key].tobytes()), key


def test_a_model_of_another_kind_is_refused():
  with pytest.raises(ValueError, match="not of VLP's kind"):
    vlp.export({"model": {"image": {"fc1": {"kernel": np.zeros((2, 2))}}}})
