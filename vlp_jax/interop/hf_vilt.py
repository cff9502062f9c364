"""ViLT of Hugging Face's transformers <-> our trees, with the head that it has.

A directory of ViltModel, ViltForMaskedLM, ViltForQuestionAnswering,
ViltForImagesAndTextClassification (NLVR2) or ViltForImageAndTextRetrieval. Words and
patches are the two encoders of ours, the layers the fusion, as in `vilt`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import hf
from vlp_jax.interop import hf_vit
from vlp_jax.interop import layout
from vlp_jax.interop import letters
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, with the width W of all, R types, P of the pooled pair.

SIGNATURE = (
  r"(vilt\.|)embeddings\.text_embeddings\.word_embeddings\.weight",
  r"(vilt\.|)embeddings\.token_type_embeddings\.weight",
  r"(vilt\.|)encoder\.layer\.0\.attention\.attention\.query\.weight",
)
# Our objective -> their class. A directory has one of them or none.
CLASSES = {
  "mlm": "ViltForMaskedLM",
  "vqa_scores": "ViltForQuestionAnswering",
  "pair_classify": "ViltForImagesAndTextClassification",
  "text_rank": "ViltForImageAndTextRetrieval",
}
# Tied or constant: read where they are, not written, as save_pretrained does.
POSITIONS = "embeddings.text_embeddings.position_ids"
DECODER = "mlm_score.decoder.weight"
UNWRITTEN = (POSITIONS, "mlm_score.bias")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """params: a tree of ours. config: of config.json. prefix: of their names."""

  params: dict[str, Any]
  config: dict[str, Any]
  prefix: str = "vilt."


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a directory, or a name of the hub.

  Raises:
    FileNotFoundError, ValueError: see `hf.read` and `rules.from_theirs`.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields = fields_of(directory.config, what)
  prefix, tensors = _prefix(directory.tensors), _untied(directory.tensors)
  table = _rules(prefix, fields["fusion"]["depth"], _head(tensors), DECODER in tensors)
  sizes = dict(M=fields["fusion"]["num_heads"])
  params = rules.from_theirs(tensors, table, sizes=sizes, what=what)
  return Checkpoint(params, directory.config, prefix)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory; the tensors that `load` read come back bit by bit."""
  tensors = export(checkpoint.params, checkpoint.prefix)
  hf.write(path, checkpoint.config, tensors)


def export(params: Mapping[str, Any], prefix: str = "vilt.") -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (or of gradients) as {their name: tensor}."""
  table, sizes = _table(params, prefix)
  tensors = rules.to_theirs(params, table, sizes=sizes)
  left_out = {f"{prefix}{POSITIONS}", *UNWRITTEN}
  return {name: x for name, x in tensors.items() if name not in left_out}


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """A trained model of ViLT's kind, with its head: of several the first of `CLASSES`.

  The head of matching, of which transformers has no class, is left out.

  Args:
    model: the VLM: config.json says its fields. params: its pretrainer's.

  Raises:
    ValueError: it is of another kind; lists the fields.
  """
  _table(params, "vilt.")
  tower, words, image = model.fusion, model.text, model.image
  fields = _of_towers(model)
  wanted = dict(norm="pre", norm_eps=words.norm_eps, act=words.act)
  own = {name: getattr(tower, name) for name in wanted}
  hf.check(wanted, own, what="transformers' ViLT", model="model.fusion")
  kinds = [name for name in CLASSES if f"objectives_{name}" in params]
  config = dict(
    architectures=[CLASSES[kinds[0]] if kinds else "ViltModel"],
    model_type="vilt",
    hidden_size=fields["fusion"]["width"],
    num_hidden_layers=tower.depth,
    num_attention_heads=tower.num_heads,
    intermediate_size=tower.mlp_dim,
    hidden_act=hf.their_activation(tower.act),
    hidden_dropout_prob=tower.dropout,
    attention_probs_dropout_prob=tower.dropout_attention,
    layer_norm_eps=tower.norm_eps,
    image_size=image.table_res or image.res,
    patch_size=image.patch,
    num_channels=3,
    qkv_bias=True,
    max_image_length=image.max_patches or -1,
    max_position_embeddings=words.length,
    type_vocab_size=words.types,
    vocab_size=words.vocab.size,
    modality_type_vocab_size=tower.types,
    num_images=2 if kinds[:1] == ["pair_classify"] else -1,
  )
  head = {f"objectives_{kind}": params[f"objectives_{kind}"] for kind in kinds[:1]}
  untied = "decoder" in head.get("objectives_mlm", {})
  config["tie_word_embeddings"] = not untied
  if kinds[:1] == ["vqa_scores"]:
    answers = params["objectives_vqa_scores"]["head"]["out"]["bias"].shape[0]
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(answers)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(answers)}
  return Checkpoint({"model": params["model"], **head}, config)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  model: Any = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="hf_vilt", path=FOLDER or name)`.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path: as of `load`.
    model: the VLM: what config.json says beside sizes must hold for it.
    skip: regular expressions of whole names there that the model does not use, e.g.
      `mlm_score\\..*` for a downstream task.
    fresh: of whole paths of the model that the directory does not have.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields = fields_of(directory.config, what)
  if model is not None:
    own = _of_towers(model)
    for name, found in fields.items():
      hf.check(found, own[name], what=what, model=f"model.{name}")
  prefix = _prefix(directory.tensors)
  table, sizes = _table(abstract_params, prefix)
  return rules.from_theirs(
    _untied(directory.tensors),
    table,
    sizes=sizes | dict(M=fields["fusion"]["num_heads"]),
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=f"{what}, for this model,",
  )


def fields_of(config: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
  """{"image", "text", "fusion"}: the fields that config.json describes.

  Raises:
    ValueError: it is of another kind of model, or is not understood.
  """
  if config.get("model_type") != "vilt":
    raise ValueError(f"{what}: model_type={config.get('model_type')!r}: want 'vilt'.")
  hf.require(config, dict(num_channels=3, qkv_bias=True), what)
  try:
    width, eps = config["hidden_size"], config["layer_norm_eps"]
    return dict(
      image=dict(
        width=width, patch=config["patch_size"], table_res=config["image_size"]
      ),
      text=dict(
        width=width,
        length=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        norm_eps=eps,
      ),
      fusion=dict(
        width=width,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        types=config["modality_type_vocab_size"],
        norm_eps=eps,
        act=hf.activation(config, what),
      ),
    )
  except KeyError as error:
    raise ValueError(f"{what}: its config.json has no {error}.") from error


def _of_towers(model):
  """`fields_of` of a model of ours."""
  image, text, fusion = model.image, model.text, model.fusion
  return dict(
    image=dict(
      width=image.width, patch=image.patch, table_res=image.table_res or image.res
    ),
    text={k: getattr(text, k) for k in ("width", "length", "types", "norm_eps")},
    fusion=dict(width=fusion.text_width)
    | {
      k: getattr(fusion, k)
      for k in ("depth", "num_heads", "mlp_dim", "types", "norm_eps", "act")
    },
  )


def _rules(prefix, depth, head, untied):
  image, words, fusion = "model/image", "model/text", "model/fusion"
  embed = f"{prefix}embeddings."
  theirs = f"{embed}text_embeddings."
  bert = rules.relabel(towers.bert_embedding_rules(theirs, words), {"D": "W"})
  return [
    *(
      _placed(rule, image, fusion) for rule in hf_vit.tower_rules(prefix, image, depth)
    ),
    *bert,
    rules.Rule(
      f"{theirs}word_embeddings.weight", f"{words}/word/embedding", "V W -> V W"
    ),
    rules.Rule(
      f"{embed}token_type_embeddings.weight", f"{fusion}/type/embedding", "R W -> R W"
    ),
    *towers.linear_rules(f"{prefix}pooler.dense.", f"{fusion}/pool/dense", "W", "W'"),
    *(_head_rules(head, untied) if head else ()),
  ]


def _placed(rule, image, fusion):
  """A rule of a ViT, whose layers are the fusion's."""
  own = rule.ours
  for part in ("blocks/", "norm/"):
    if own.startswith(f"{image}/{part}"):
      own = own.replace(image, fusion, 1)
  fit = _refuse_grid if own == f"{image}/posemb" else rule.fit
  return dataclasses.replace(rule, ours=own, fit=fit)


def _refuse_grid(table, shape):
  # The model stretches the table to each image: resized, it would be another one.
  grid = round((table.shape[0] - 1) ** 0.5)
  raise ValueError(f"say model.image.table_res={grid} times model.image.patch")


def _head_rules(head, untied):
  ours = f"objectives_{head}"
  if head == "text_rank":
    return towers.linear_rules("rank_output.", f"{ours}/head", "P", "1")
  if head != "mlm":
    return towers.classifier_rules("classifier.", f"{ours}/head")
  table = rules.relabel(towers.bert_mlm_rules("mlm_score.", ours), {"D": "W"})
  if untied:
    table.append(rules.Rule(DECODER, f"{ours}/decoder/kernel", "V W -> W V"))
  return table


def _head(tensors):
  """The objective whose head the tensors have, or None."""
  if "mlm_score.transform.dense.weight" in tensors:
    return "mlm"
  if "rank_output.weight" in tensors:
    return "text_rank"
  if "classifier.0.weight" not in tensors:
    return None
  # Of two images, two pooled pairs are read.
  into = tensors["classifier.0.weight"].shape[1]
  width = tensors["classifier.3.weight"].shape[1] // 2
  return "vqa_scores" if into == width else "pair_classify"


def _untied(tensors):
  """The tensors without a decoder that is the table of words once more."""
  if DECODER not in tensors:
    return tensors
  prefix = _prefix(tensors)
  words = tensors.get(f"{prefix}embeddings.text_embeddings.word_embeddings.weight")
  if words is None or not np.array_equal(words, tensors[DECODER]):
    return tensors
  return {name: x for name, x in tensors.items() if name != DECODER}


def _prefix(tensors):
  return "" if "embeddings.token_type_embeddings.weight" in tensors else "vilt."


def _table(params, prefix) -> tuple[rules.Table, letters.Sizes]:
  """(table, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  wanted = ["model/fusion/blocks/attn/query/kernel", layout.PATCH]
  wanted.append("model/fusion/type/embedding")
  refusal = "this model is not of ViLT's kind (patches, words and one merged stack)"
  query, patch, _ = layout.shapes(params, wanted, refusal).values()
  kinds = [name for name in CLASSES if f"objectives_{name}" in params]
  untied = "objectives_mlm/decoder/kernel" in leaves
  table = _rules(prefix, query[0], kinds[0] if kinds else None, untied)
  return table, dict(M=query[2], **layout.sides(patch))
