"""BLIP of Hugging Face's transformers <-> our trees: captions, matching, answers.

A directory of BlipForConditionalGeneration, BlipForImageTextRetrieval or
BlipForQuestionAnswering has the text tensors under the official names, and others for
the ViT; what is tied is written once. See `blip` for our trees.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import re
from typing import Any

from vlp_jax.interop import blip
from vlp_jax.interop import hf
from vlp_jax.interop import made_with
from vlp_jax.interop import rules
from vlp_jax.ops import tree as tree_lib

SIGNATURE = (
  r"vision_model\.embeddings\.class_embedding",
  r"text_(encoder|decoder\.bert)\.encoder\.layer\.0\.crossattention\..*",
)
# Official names of the ViT, and transformers'.
NAMES = {
  r"visual_encoder\.cls_token": "vision_model.embeddings.class_embedding",
  r"visual_encoder\.pos_embed": "vision_model.embeddings.position_embedding",
  r"visual_encoder\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
  r"visual_encoder\.norm\.": "vision_model.post_layernorm.",
  r"visual_encoder\.blocks\.": "vision_model.encoder.layers.",
  r"\.norm([12])\.": r".layer_norm\1.",
  r"\.attn\.qkv\.": ".self_attn.qkv.",
  r"\.attn\.proj\.": ".self_attn.projection.",
}


# Tied or constant: read where they are, not written, as save_pretrained does.
UNWRITTEN = ("position_ids", "decoder.weight", "decoder.bias")
# Our objective -> their class. A directory has one of them.
CLASSES = {
  "lm": "BlipForConditionalGeneration",
  "itm": "BlipForImageTextRetrieval",
  "vqa": "BlipForQuestionAnswering",
}
# What transformers leaves out of config.json where it is the default of the class
# (configuration_blip.py).
DEFAULTS = dict(
  vision_config=hf.BASE
  | dict(patch_size=16, image_size=384, layer_norm_eps=1e-5, hidden_act="gelu"),
  text_config=hf.BASE
  | dict(
    num_attention_heads=8,
    max_position_embeddings=512,
    layer_norm_eps=1e-12,
    hidden_act="gelu",
  ),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """params: as a tree of ours. config: of config.json."""

  params: dict[str, Any]
  config: dict[str, Any]


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a directory, or a name of the hub.

  Raises:
    FileNotFoundError, ValueError: see `hf.read` and `rules.from_theirs`.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields = fields_of(directory.config, what)
  params = rules.from_theirs(
    directory.tensors,
    _table(_shape(directory, fields)),
    sizes=_heads(fields),
    what=what,
  )
  return Checkpoint(params, directory.config)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory; the tensors that `load` read come back bit by bit.

  Lost is a temperature, which transformers' model for matching does not have.
  """
  shape, sizes = blip.shape_and_sizes(checkpoint.params)
  shape = dataclasses.replace(shape, temperature=False)
  leaves = tree_lib.flatten(checkpoint.params)
  params = rules.nest({k: x for k, x in leaves.items() if k != "model/temp"})
  what = f"what to write to {path}"
  tensors = rules.to_theirs(params, _table(shape), sizes=sizes, what=what)
  written = {name: x for name, x in tensors.items() if not name.endswith(UNWRITTEN)}
  hf.write(path, checkpoint.config, written)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """A trained model of BLIP's kind, as transformers' class of its task.

  Args:
    model: the VLM: config.json says its fields. params: its pretrainer's, arrays
      without boxes, of one of `CLASSES`; ITC goes with ITM.

  Raises:
    ValueError: it is of another task, or its layers are not those of any BLIP.
  """
  kinds = [name for name in CLASSES if f"objectives_{name}" in params]
  if len(kinds) != 1:
    raise ValueError(
      "transformers has a BLIP for one task each: want one objective of"
      f" {', '.join(CLASSES)}; the model has {', '.join(sorted(params))}."
    )
  blip.shape_and_sizes(params)
  image, text = model.image, model.text
  embed = model.embed_dim or text.width
  tower = lambda module, stack: dict(
    hidden_size=module.width,
    num_hidden_layers=stack.depth,
    num_attention_heads=stack.num_heads,
    intermediate_size=stack.mlp_dim,
    hidden_act=hf.their_activation(stack.act),
    layer_norm_eps=stack.norm_eps,
  )
  words = tower(text, model.fusion) | dict(
    model_type="blip_text_model",
    encoder_hidden_size=image.width,
    vocab_size=text.vocab.size,
    max_position_embeddings=text.length,
    projection_dim=embed,
    bos_token_id=text.vocab.cls if text.vocab.dec is None else text.vocab.dec,
    eos_token_id=text.vocab.sep,
    sep_token_id=text.vocab.sep,
    pad_token_id=text.vocab.pad,
    is_decoder=True,
  )
  config = dict(
    architectures=[CLASSES[kinds[0]]],
    model_type="blip",
    projection_dim=embed,
    image_text_hidden_size=embed,
    text_config=words,
    vision_config=tower(image, image)
    | dict(
      model_type="blip_vision_model", image_size=image.res, patch_size=image.patch
    ),
  )
  made_with.check(model, _layers(fields_of(config, "it")), "transformers' BLIP")
  return Checkpoint(dict(params), config)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
) -> dict[str, Any]:
  """Parameters of a model of the same task from a directory or a name of the hub.

  The table of image positions is resized to the model's grid. Arguments and errors as
  of `albef.init`; a model with a temperature says fresh=["model/temp"]. Its layers must
  be those of config.json.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  shape, sizes = blip.shape_and_sizes(abstract_params)
  fields = fields_of(directory.config, what)
  made_with.check(model, _layers(fields), directory.path)
  heads = _heads(fields)
  hf.check(heads, {k: sizes[k] for k in heads}, what=what, model="number of heads")
  return rules.from_theirs(
    directory.tensors,
    _table(dataclasses.replace(shape, temperature=False)),
    sizes=sizes,
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=f"{what}, for this model,",
  )


def fields_of(config: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
  """{"image", "text"}: the fields of the towers that config.json describes.

  Raises:
    ValueError: it is of another kind of model, or is not understood.
  """
  if config.get("model_type") != "blip":
    raise ValueError(f"{what}: model_type={config.get('model_type')!r}: want 'blip'.")
  try:
    vision, words = (
      default | (config.get(name) or {}) for name, default in DEFAULTS.items()
    )
    return dict(
      image=dict(
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"],
        patch=vision["patch_size"],
        res=vision["image_size"],
        norm_eps=vision["layer_norm_eps"],
        act=hf.activation(vision, what),
      ),
      text=dict(
        width=words["hidden_size"],
        depth=words["num_hidden_layers"],
        num_heads=words["num_attention_heads"],
        mlp_dim=words["intermediate_size"],
        length=words["max_position_embeddings"],
        norm_eps=words["layer_norm_eps"],
        act=hf.activation(words, what),
      ),
    )
  except KeyError as error:
    raise ValueError(f"{what}: its config.json has no {error}.") from error


def _layers(fields):
  """What no tensor tells of the towers: the stacks of text are all alike."""
  told = lambda tower: {k: fields[tower][k] for k in ("act", "norm_eps", "num_heads")}
  words = dict.fromkeys(("text", "fusion", "decoder"), told("text"))
  return made_with.of(image=told("image"), **words)


def _shape(directory, fields):
  has = directory.tensors.__contains__
  encoder = has(f"{blip.ENCODER}embeddings.LayerNorm.weight")
  decoder = has(f"{blip.DECODER}embeddings.LayerNorm.weight")
  return blip.Shape(
    depth_image=fields["image"]["depth"],
    depth_text=fields["text"]["depth"],
    encoder=encoder,
    decoder=decoder,
    separate=encoder and decoder,
    contrast=has("vision_proj.weight"),
    temperature=False,
    momentum=False,
  )


def _heads(fields):
  return dict(M=fields["image"]["num_heads"], N=fields["text"]["num_heads"])


def _table(shape):
  """The rules of official files, under the names of transformers."""
  table = []
  for rule in blip.parameter_rules(shape):
    single = isinstance(rule.theirs, str)
    names = tuple(map(_renamed, [rule.theirs] if single else rule.theirs))
    table.append(dataclasses.replace(rule, theirs=names[0] if single else names))
  return table


def _renamed(name):
  for official, theirs in NAMES.items():
    name = re.sub(official, theirs, name)
  return name
