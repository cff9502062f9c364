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
  hf.write(path, checkpoint.config, tensors)


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
    vision, words = config["vision_config"], config["text_config"]
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
    if isinstance(rule, rules.Constant):
      continue
    name = rule.theirs if isinstance(rule.theirs, str) else rule.theirs[0]
    for official, theirs in NAMES.items():
      name = re.sub(official, theirs, name)
    table.append(dataclasses.replace(rule, theirs=name))
  return table
