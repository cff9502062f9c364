"""Live parity with transformers, at other sizes than the reference directories.

Runs where torch and transformers are installed: random models of theirs by our towers,
and what we write read by `from_pretrained`. Tolerance as in test_parity_albef.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_albef
from tests import test_parity_clip
from tests.interop import test_hf_vilt
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import hf_bert
from vlp_jax.interop import hf_blip
from vlp_jax.interop import hf_dual
from vlp_jax.interop import hf_flava
from vlp_jax.interop import hf_vilt
from vlp_jax.interop import hf_vit
from vlp_jax.interop import reader
from vlp_jax.models import patches
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import bridged
from vlp_jax.models.fusion import interleaved
from vlp_jax.models.fusion import merged
from vlp_jax.nn import ask
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import lm
from vlp_jax.objectives import mlm
from vlp_jax.objectives import text_mlm
from vlp_jax.objectives import vqa
from vlp_jax.objectives import vqa_scores

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

close = test_parity_albef.close
# Odd sizes: heads of 8, an MLP that is no multiple of the width, a grid of 3 x 3.
STACK = dict(
  hidden_size=40,
  num_hidden_layers=3,
  num_attention_heads=5,
  intermediate_size=72,
  initializer_range=0.3,
)
SMALLER = STACK | dict(
  hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50
)
WORDS, LENGTH = 131, 21
TEXT = dict(vocab_size=WORDS, max_position_embeddings=LENGTH)
IMAGE = dict(image_size=36, patch_size=12)
CLIP_IDS = dict(bos_token_id=WORDS - 2, eos_token_id=WORDS - 1, pad_token_id=0)
BLIP_IDS = dict(bos_token_id=129, eos_token_id=102, sep_token_id=102, pad_token_id=0)


def _blip(width=36, heads=3):
  """Towers of two widths, but for answers, whose decoder reads the encoded question."""
  sizes = dict(hidden_size=width, num_attention_heads=heads)
  return dict(
    text_config=STACK | TEXT | BLIP_IDS | dict(encoder_hidden_size=width),
    vision_config=SMALLER | IMAGE | sizes,
    image_text_hidden_size=20,
  )


def _siglip(image, words):
  same = dict(hidden_size=40, num_attention_heads=5, projection_size=40)
  return dict(vision_config=image, text_config=SMALLER | TEXT | words | same)


VILT = STACK | TEXT | dict(image_size=48, patch_size=12)
FLAVA = dict(
  text_config=STACK | TEXT,
  image_config=SMALLER | IMAGE | dict(vocab_size=30),
  multimodal_config=SMALLER,
  projection_dim=20,
  hidden_size=24,
)
CODEBOOK = dict(num_groups=1, hidden_size=8, num_blocks_per_group=1, vocab_size=30)
# class -> its config's name, and what it is made with.
MODELS = {
  "BertModel": ("Bert", STACK | TEXT | dict(hidden_act="gelu_new", type_vocab_size=3)),
  "BertForMaskedLM": ("Bert", STACK | TEXT | dict(layer_norm_eps=1e-5)),
  "BertForPreTraining": ("Bert", STACK | TEXT),
  "RobertaModel": ("Roberta", STACK | TEXT | dict(hidden_act="relu")),
  "RobertaForMaskedLM": ("Roberta", STACK | TEXT | dict(type_vocab_size=1)),
  "ViTModel": (
    "ViT",
    STACK | IMAGE | dict(layer_norm_eps=1e-6, hidden_act="quick_gelu"),
  ),
  "ViTForImageClassification": ("ViT", STACK | IMAGE | dict(num_labels=7)),
  "DeiTModel": ("DeiT", STACK | IMAGE),
  "DeiTForImageClassificationWithTeacher": ("DeiT", STACK | IMAGE),
  "CLIPModel": (
    "CLIP",
    dict(
      text_config=SMALLER | TEXT | CLIP_IDS | dict(hidden_act="gelu"),
      vision_config=STACK | IMAGE,
      projection_dim=20,
    ),
  ),
  "SiglipModel": ("Siglip", _siglip(STACK | IMAGE | dict(layer_norm_eps=1e-5), {})),
  "Siglip2Model": (
    "Siglip2",
    _siglip(STACK | dict(patch_size=6, num_patches=25), dict(hidden_act="gelu")),
  ),
  "BlipForConditionalGeneration": ("Blip", _blip()),
  "BlipForImageTextRetrieval": ("Blip", _blip()),
  "BlipForQuestionAnswering": ("Blip", _blip(width=40, heads=4)),
  "ViltModel": ("Vilt", VILT),
  "ViltForMaskedLM": ("Vilt", VILT | dict(hidden_act="gelu_new")),
  "ViltForQuestionAnswering": (
    "Vilt",
    VILT | dict(num_labels=9, layer_norm_eps=1e-6),
  ),
  "ViltForImagesAndTextClassification": (
    "Vilt",
    VILT | dict(num_images=2, modality_type_vocab_size=3),
  ),
  "ViltForImageAndTextRetrieval": ("Vilt", VILT),
  "FlavaModel": ("Flava", FLAVA),
  # Its heads of masked pairs are as wide as the towers: all three are.
  "FlavaForPreTraining": (
    "Flava",
    FLAVA
    | dict(
      image_config=STACK | IMAGE | dict(vocab_size=30),
      multimodal_config=STACK,
      image_codebook_config=CODEBOOK,
      hidden_size=40,
    ),
  ),
}
FORMATS = dict(
  Bert="hf_bert",
  Roberta="hf_bert",
  ViT="hf_vit",
  DeiT="hf_vit",
  CLIP="hf_dual",
  Siglip="hf_dual",
  Siglip2="hf_dual",
  Blip="hf_blip",
  Vilt="hf_vilt",
  Flava="hf_flava",
)


def make(name, **more):
  """A random model; its biases and norms are no zeros and ones."""
  torch.manual_seed(0)
  kind, fields = MODELS[name]
  config = getattr(transformers, f"{kind}Config")(**(fields | more))
  if kind != "Flava":
    config._attn_implementation = "eager"
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for x in model.parameters():
      x.add_(0.1 * torch.randn_like(x))
  return model


def save(model, path, *, container="one"):
  """save_pretrained, in one file or several, of its format or torch's."""
  several = dict(max_shard_size="40KB") if container == "several" else {}
  model.save_pretrained(path, **several)
  if container == "torch":
    file = path / "model.safetensors"
    tensors = {k: torch.from_numpy(x.copy()) for k, x in reader.load(file).items()}
    file.unlink()
    names = sorted(tensors)
    places = {k: f"pytorch_model-{i % 2}.bin" for i, k in enumerate(names)}
    for part in set(places.values()):
      torch.save({k: tensors[k] for k in names if places[k] == part}, path / part)
    index = dict(metadata={}, weight_map=places)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
  """Found, read, written; the same bits for us, and for `from_pretrained`."""
  model, kind = make(name), FORMATS[MODELS[name][0]]
  containers = ["one", "several", "torch"]
  container = containers[list(MODELS).index(name) % 3]
  save(model, tmp_path / "theirs", container=container)
  assert formats.find(tmp_path / "theirs") == kind
  formats.save(tmp_path / "ours", formats.load(tmp_path / "theirs"), kind)
  want, got = hf.read(tmp_path / "theirs"), hf.read(tmp_path / "ours")
  assert got.config == want.config and got.tensors.keys() == want.tensors.keys()
  for key, x in want.tensors.items():
    assert (got.tensors[key].dtype, got.tensors[key].shape) == (x.dtype, x.shape)
    assert got.tensors[key].tobytes() == x.tobytes(), key
  again, report = type(model).from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not any(report.values()), report
  for key, x in model.state_dict().items():
    assert torch.equal(again.state_dict()[key], x), key


def test_half_precision_is_kept(tmp_path):
  make("BertModel").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
  loaded = formats.load(tmp_path / "theirs")
  formats.save(tmp_path / "ours", loaded, "hf_bert")
  want, got = hf.read(tmp_path / "theirs").tensors, hf.read(tmp_path / "ours").tensors
  for key, x in want.items():
    assert got[key].dtype == x.dtype and got[key].tobytes() == x.tobytes()
  assert {str(x.dtype) for x in got.values()} == {"bfloat16"}


def test_files_that_hold_tied_tensors_twice(tmp_path):
  """pytorch_model.bin of before transformers 5: decoders, and the row of positions."""
  model = make("BlipForConditionalGeneration")
  model.config.save_pretrained(tmp_path)
  tensors = dict(model.state_dict())
  positions = "text_decoder.bert.embeddings.position_ids"
  tensors[positions] = torch.arange(LENGTH)[None]
  assert "text_decoder.cls.predictions.decoder.weight" in tensors
  torch.save(tensors, tmp_path / "pytorch_model.bin")
  got = hf_blip.load(tmp_path).params
  model.save_pretrained(tmp_path / "again")
  jax.tree.map(
    np.testing.assert_array_equal, got, hf_blip.load(tmp_path / "again").params
  )
  tensors[positions] = torch.arange(LENGTH)[None] + 1
  torch.save(tensors, tmp_path / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"another value \(1\).*\n.*position_ids"):
    hf_blip.load(tmp_path)


# --- What they compute ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vocab:
  size: int = WORDS
  pad: int = 0
  cls: int = 101
  sep: int = 102
  mask: int = 103
  dec: int | None = None
  enc: int | None = None
  special: tuple[int, ...] = (101, 102, 103)
  continuation: tuple[int, ...] = ()


def inputs(pad=0, length=11, pixels=36, rows=3):
  """Ids with padding, and pictures, for both sides."""
  rng = np.random.default_rng(0)
  mask = np.arange(length) < np.array([length, 6, 3])[:rows, None]
  ids = np.where(mask, rng.integers(5, WORDS - 3, (rows, length)), pad)
  image = rng.normal(size=(rows, 3, pixels, pixels)).astype(np.float32)
  theirs = dict(
    input_ids=torch.tensor(ids),
    attention_mask=torch.tensor(mask).long(),
    pixel_values=torch.tensor(image),
  )
  batch = dict(
    image=jnp.asarray(image.transpose(0, 2, 3, 1)),
    text=jnp.asarray(ids, jnp.int32),
    text_mask=jnp.asarray(mask),
    image_id=jnp.arange(rows, dtype=jnp.int32),
  )
  return theirs, batch


def answer(model, **given):
  with torch.no_grad():
    return model(**given)


def by_ours(module, params, call, batch):
  """`call(bound module, batch)`, compiled."""
  params = jax.tree.map(jnp.asarray, params)
  return jax.jit(lambda p: module.apply({"params": p}, batch, method=call))(params)


def of(model, objectives):
  return pretrainer_lib.Pretrainer(model, objectives, {})


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_text(name, tmp_path):
  model = make(name)
  theirs, batch = inputs(model.config.pad_token_id)
  del theirs["pixel_values"]
  save(model, tmp_path)
  loaded = hf_bert.load(tmp_path)
  module = text.Encoder(vocab=Vocab(), **loaded.fields)
  params = loaded.params["model"]["text"]
  got = by_ours(module, params, lambda m, b: m(b["text"], b["text_mask"]).x, batch)
  want = answer(model, **theirs)
  close(got, want.last_hidden_state)
  pooler = loaded.params["pooler"]
  pooled = np.tanh(got[:, 0] @ pooler["kernel"] + pooler["bias"])
  close(pooled, want.pooler_output)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_masked_words(name, tmp_path):
  model = make(name)
  theirs, batch = inputs(model.config.pad_token_id)
  del theirs["pixel_values"]
  save(model, tmp_path)
  loaded = hf_bert.load(tmp_path)
  fields = loaded.fields
  net = vlm.VLM(
    image=None,
    text=text.Encoder(vocab=Vocab(), **fields),
    fusion=None,
    embed_dim=None,
  )
  eps = fields["norm_eps"]
  head = text_mlm.Objective(Vocab(), fields["width"], norm_eps=eps)
  module = of(net, dict(mlm=head))
  params = {k: loaded.params[k] for k in ("model", "objectives_mlm")}

  def call(self, batch):
    ids, mask = batch["text"], batch["text_mask"]
    at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return self.objectives["mlm"]._read(ask.Live(), self.model, None, ids, mask, at)

  got = by_ours(module, params, call, batch)
  close(got, answer(model, **theirs).logits)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel"])
def test_images(name, tmp_path):
  model = make(name)
  theirs, batch = inputs()
  save(model, tmp_path)
  loaded = hf_vit.load(tmp_path)
  module = vit.Encoder(**loaded.fields)
  params = loaded.params["model"]["image"]
  got = by_ours(module, params, lambda m, b: m(b["image"]).x, batch)
  want = answer(model, pixel_values=theirs["pixel_values"])
  close(got, want.last_hidden_state)
  pooler = loaded.params["pooler"]
  pooled = np.tanh(got[:, 0] @ pooler["kernel"] + pooler["bias"])
  close(pooled, want.pooler_output)
  # At twice the resolution, the table resized.
  theirs, batch = inputs(pixels=72)
  want = answer(
    model, pixel_values=theirs["pixel_values"], interpolate_pos_encoding=True
  )
  got = by_ours(module, params, lambda m, b: m(b["image"]).x, batch)
  close(got, want.last_hidden_state)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
def test_dual_encoders(name, tmp_path):
  model = make(name)
  save(model, tmp_path)
  theirs, batch = inputs()
  ids, mask = np.array(batch["text"]), np.array(batch["text_mask"])
  pixels, grids = theirs["pixel_values"].numpy(), None
  softmax = name == "CLIPModel"
  if softmax:
    ends = mask.sum(axis=1) - 1
    ids[np.arange(len(ids)), ends] = WORDS - 1
  else:
    # They were trained on rows of full length, whose end is read.
    ids = np.random.default_rng(1).integers(1, WORDS, (3, LENGTH))
    mask = np.ones_like(ids, bool)
  given = dict(input_ids=torch.tensor(ids), return_loss=True)
  if name == "Siglip2Model":
    grids = np.array([[5, 5], [3, 7], [6, 2]])
    pixels = np.random.default_rng(2).normal(size=(3, 25, 108)).astype(np.float32)
    seen = np.arange(25) < grids.prod(axis=1)[:, None]
    given |= dict(
      pixel_attention_mask=torch.tensor(seen).long(),
      spatial_shapes=torch.tensor(grids),
    )
  if softmax:
    given["attention_mask"] = torch.tensor(mask).long()
  want = answer(model, pixel_values=torch.tensor(pixels), **given)
  got = test_parity_clip.run(
    hf_dual.model_spec(tmp_path),
    WORDS,
    itc.Objective(loss="softmax" if softmax else "sigmoid"),
    hf_dual.load(tmp_path).params,
    pixels,
    ids,
    mask,
    grids,
    gradients=False,
  )
  close(got.zimg, want.image_embeds)
  close(got.ztxt, want.text_embeds)
  close(got.loss, want.loss)


def _blip_model(folder, **fields):
  """The model that config.json describes."""
  config = hf.config(folder)
  both = hf_blip.fields_of(config, "it")
  words = both["text"] | dict(vocab=Vocab(), types=0)
  stack = {k: v for k, v in both["text"].items() if k not in ("length", "width")}
  decoder = fields.pop("decoder", False)
  reads = fields.pop("reads")
  return vlm.VLM(
    image=vit.Encoder(**both["image"]),
    text=text.Encoder(**(words | dict(depth=0))),
    fusion=interleaved.Fusion(**stack, image_width=both["image"]["width"], reads=reads),
    decoder=text.Encoder(**words) if decoder else None,
    **(dict(embed_dim=None) | fields),
  )


def test_blip_captions(tmp_path):
  model = make("BlipForConditionalGeneration")
  save(model, tmp_path)
  theirs, batch = inputs()
  net = _blip_model(tmp_path, reads=("causal",))

  def call(self, batch):
    image = self.model.encode_image(batch["image"])
    ids, mask = batch["text"], batch["text_mask"]
    return self.objectives["lm"].logits(self.model, image, ids, mask)

  module = of(net, dict(lm=lm.Objective(Vocab(), 40)))
  got = by_ours(module, hf_blip.load(tmp_path).params, call, batch)
  close(got, answer(model, **theirs).logits)
  made = hf_blip.of_model(net, hf_blip.load(tmp_path).params)
  hf_blip.save(tmp_path / "ours", made)
  again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager")
  close(answer(again.eval(), **theirs).logits, answer(model, **theirs).logits)


def test_blip_matching(tmp_path):
  model = make("BlipForImageTextRetrieval")
  save(model, tmp_path)
  theirs, batch = inputs()
  net = _blip_model(tmp_path, reads=("bidirectional",), embed_dim=20)
  params = hf_blip.load(tmp_path).params
  params["model"]["temp"] = np.float32(0.07)

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    logits = self.objectives["itm"].logits(self.model, enc.image, enc.words)
    return logits, enc.zimg @ enc.ztxt.T

  got = by_ours(of(net, dict(itm=itm.Objective(width=40))), params, call, batch)
  close(got[0], answer(model, **theirs).itm_score)
  close(got[1], answer(model, use_itm_head=False, **theirs).itm_score)
  hf_blip.save(tmp_path / "ours", hf_blip.of_model(net, params))
  again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager")
  close(answer(again.eval(), **theirs).itm_score, answer(model, **theirs).itm_score)


def test_blip_answers(tmp_path):
  model = make("BlipForQuestionAnswering")
  save(model, tmp_path)
  theirs, batch = inputs()
  answers = np.array([[129, 7, 9, 102], [129, 8, 102, 0], [129, 30, 31, 102]])
  real = answers > 0
  labels = np.where(real, answers, -100)
  theirs |= dict(
    decoder_input_ids=torch.tensor(answers),
    decoder_attention_mask=torch.tensor(real).long(),
    labels=torch.tensor(labels),
  )
  net = _blip_model(tmp_path, reads=("bidirectional",), decoder=True)

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    head = self.objectives["vqa"]
    question = self.model.fuse(enc.image, enc.words).replace(mask=None)
    ids, mask = jnp.asarray(answers, jnp.int32), jnp.asarray(real)
    logp = head._decode(ask.Live(), self.model, ids, mask, question)
    losses, _, counted = head._next_words(logp[:, :-1], ids, mask)
    return losses.sum() / counted.sum()

  module = of(net, dict(vqa=vqa.Objective(vocab=Vocab(), width=40)))
  got = by_ours(module, hf_blip.load(tmp_path).params, call, batch)
  close(got, answer(model, **theirs).loss)


@pytest.mark.parametrize("name", ["ViltForMaskedLM", "ViltForQuestionAnswering"])
def test_vilt(name, tmp_path):
  """Images of several shapes on one canvas."""
  model = make(name)
  save(model, tmp_path)
  theirs, _ = inputs(pixels=48)
  lit = np.zeros((3, 48, 48), np.int64)
  for row, (height, width) in enumerate([(48, 48), (36, 48), (24, 36)]):
    lit[row, :height, :width] = 1
  theirs["pixel_mask"] = torch.tensor(lit)
  theirs["pixel_values"] = theirs["pixel_values"] * theirs["pixel_mask"][:, None]
  batch = test_hf_vilt.batch_of({key: x.numpy() for key, x in theirs.items()})
  fields = hf_vilt.fields_of(hf.config(tmp_path), "it")
  fusion = {k: v for k, v in fields["fusion"].items() if k != "width"}
  sizes = dict(num_heads=fusion["num_heads"], mlp_dim=fusion["mlp_dim"])
  image, width = fields["image"], fields["fusion"]["width"]
  net = vlm.VLM(
    image=patches.Encoder(**(image | dict(res=image["table_res"]))),
    text=text.Encoder(vocab=Vocab(), depth=0, **fields["text"], **sizes),
    fusion=merged.Fusion(text_width=width, image_width=width, **fusion),
    embed_dim=None,
  )
  if name == "ViltForMaskedLM":
    eps, act = fusion["norm_eps"], fusion["act"]
    heads = dict(mlm=mlm.Objective(Vocab(), width, norm_eps=eps, act=act))
  else:
    heads = dict(vqa_scores=vqa_scores.Objective(width=width, answers=9))

  def call(self, batch):
    enc = pretrainer_lib.encode(self.model, ask.Live(), batch, jnp.int32(0))
    (head,) = self.objectives.values()
    if name == "ViltForMaskedLM":
      return head.predict(self.model, batch["text"], batch["text_mask"], enc.image)
    return head.predict(self.model, enc.image, enc.words)

  got = by_ours(of(net, heads), hf_vilt.load(tmp_path).params, call, batch)
  close(got, answer(model, **theirs).logits)


def test_flava(tmp_path):
  model = make("FlavaModel")
  save(model, tmp_path)
  theirs, batch = inputs()
  fields = hf_flava.fields_of(hf.config(tmp_path), "it")
  net = vlm.VLM(
    image=vit.Encoder(**fields["image"]),
    text=text.Encoder(vocab=Vocab(), **fields["text"]),
    fusion=bridged.Fusion(
      text_width=fields["text"]["width"],
      image_width=fields["image"]["width"],
      **fields["fusion"],
    ),
    embed_dim=20,
    scale="log_scale",
  )

  def call(self, batch):
    image = self.encode_image(batch["image"])
    words = self.encode_text(batch["text"], batch["text_mask"])
    fused = self.fuse(image, words)
    return (
      image.x,
      words.x,
      jnp.concatenate([fused.pooled[:, None], fused.image.x, fused.x], axis=1),
    )

  params = hf_flava.load(tmp_path).params
  want = answer(model, **theirs)
  got = by_ours(net, params["model"], call, batch)
  for kind, value in zip(("image", "text", "multimodal"), got, strict=True):
    close(value, want[f"{kind}_embeddings"], kind)
  hf_flava.save(tmp_path / "ours", hf_flava.of_model(net, params))
  again = type(model).from_pretrained(tmp_path / "ours").eval()
  close(answer(again, **theirs).multimodal_embeddings, want.multimodal_embeddings)
