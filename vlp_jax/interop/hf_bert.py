"""BERT and RoBERTa of Hugging Face's transformers <-> text towers of ours.

A tower may be two of ours: ALBEF's text encoder is BERT's lower half, its fusion stack
the upper one. Pooler and heads that a directory has are kept beside the tower, as
"pooler", "objectives_mlm" and "next_sentence".
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import hf
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`.

PREFIXES = ("bert.", "roberta.", "")
WORDS = "embeddings.word_embeddings.weight"
SIGNATURE = (
  r"(bert\.|roberta\.|)embeddings\.word_embeddings\.weight",
  r"(bert\.|roberta\.|)encoder\.layer\.0\.attention\.self\.query\.weight",
  r"!vis_pe_embed\..*",
  r"!bert\.img_embeddings\..*",  # uniter's
)
KINDS = ("bert", "roberta")
# Tied or constant: read where they are, not written, as save_pretrained does.
UNWRITTEN = ("position_ids", "decoder.weight", "decoder.bias")
HEADS = ("pooler", "objectives_mlm", "next_sentence")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a directory of one tower holds, which may be `hf_vit`'s.

  params: {"model": {"text": …}} and the heads that it has.
  fields: of the tower's module. config: of config.json. prefix: of its names.
  """

  params: dict[str, Any]
  fields: dict[str, Any]
  config: dict[str, Any]
  prefix: str = ""


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a directory, or a name of the hub.

  Raises:
    FileNotFoundError, ValueError: see `hf.read` and `rules.from_theirs`.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields, prefix = fields_of(directory.config, what), _prefix(directory)
  has = heads_in(directory.tensors, prefix)
  table = tower_rules(prefix, {"text": "model/text"}, [fields["depth"]])
  table += head_rules(prefix, {name: name for name in has})
  sizes = dict(N=fields["num_heads"])
  params = rules.from_theirs(directory.tensors, table, sizes=sizes, what=what)
  _check_shapes(params, fields, what)
  return Checkpoint(params, fields, directory.config, prefix)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory; the tensors that `load` read come back bit by bit."""
  prefix, params = checkpoint.prefix, checkpoint.params
  table = tower_rules(prefix, {"text": "model/text"}, [checkpoint.fields["depth"]])
  table += head_rules(prefix, {name: name for name in HEADS if name in params})
  tensors = rules.to_theirs(params, table, what=f"what to write to {path}")
  written = {name: x for name, x in tensors.items() if not name.endswith(UNWRITTEN)}
  hf.write(path, checkpoint.config, written)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """The text tower of a trained model, as a BertModel or RobertaModel without pooler.

  Args:
    model: the VLM. params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: the tower is of another kind; lists the fields.
  """
  text = model.text
  kind = "roberta" if text.first_position else "bert"
  hf.check(
    dict(norm="post", attention="bidirectional", types=max(1, text.types)),
    dict(norm=text.norm, attention=text.attention, types=text.types),
    what=f"{kind} of transformers",
    model="model.text",
  )
  config = dict(
    architectures=["RobertaModel" if kind == "roberta" else "BertModel"],
    model_type=kind,
    hidden_size=text.width,
    num_hidden_layers=text.depth,
    num_attention_heads=text.num_heads,
    intermediate_size=text.mlp_dim,
    max_position_embeddings=text.length,
    type_vocab_size=text.types,
    vocab_size=text.vocab.size,
    pad_token_id=text.first_position - 1 if text.first_position else text.vocab.pad,
    layer_norm_eps=text.norm_eps,
    hidden_act=hf.their_activation(text.act),
    hidden_dropout_prob=text.dropout,
    attention_probs_dropout_prob=text.dropout_attention,
  )
  tower = {"model": {"text": params["model"]["text"]}}
  return Checkpoint(tower, fields_of(config, "the model"), config)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  into: str | Mapping[str, str] = "model/text",
  model: Any = None,
  act: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """Towers of a model from a directory or a name of the hub.

  Cross-attention, which BERT does not have, stays fresh; heads that `into` does not
  name are left out.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path: see `hf.read`.
    into: path of the tower, or {"text": path, "fusion": path, "mlm": path}: the layers
      that "text" has no room for go to "fusion", the head for masked words to "mlm".
    model: the VLM, whose towers are held against config.json; None: not compared.
    act: the activation, where config.json does not say what a model was made with
      (Google's own BERT, of which flaxformer and LiT know that it is "gelu_tanh").
    skip, fresh: as of `rules.from_theirs`; a tower of fewer layers than the file skips
      the others, e.g. `bert\\.encoder\\.layer\\.(6|7|8|9|10|11)\\..*`.

  Returns:
    The tree of `abstract_params`, of arrays where the file has them.

  Raises:
    FileNotFoundError, ValueError: one that lists all that does not fit.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  into = {"text": into} if isinstance(into, str) else dict(into)
  unknown = set(into) - {"text", "fusion", "mlm"}
  if unknown or "text" not in into:
    raise ValueError(
      f"{what}: into={into!r}: want a path, or a dict of text, fusion and mlm."
    )
  fields, prefix = fields_of(directory.config, what), _prefix(directory)
  leaves = tree_lib.flatten(abstract_params)
  stacks = [into[name] for name in ("text", "fusion") if name in into]
  queries = [leaves.get(f"{tower}/blocks/attn/query/kernel") for tower in stacks]
  depths = [0 if query is None else query.shape[0] for query in queries]
  told = fields if act is None else fields | dict(act=act)
  if model is not None:
    for tower in stacks:
      compare(model, tower, told, what)
  table = tower_rules(prefix, into, depths)
  table += head_rules(prefix, {"objectives_mlm": into["mlm"]} if "mlm" in into else {})
  wanted = {"objectives_mlm"} if "mlm" in into else set()
  left_out = [HEAD_NAMES[name].format(p=prefix) for name in HEADS if name not in wanted]
  return rules.fill(
    abstract_params,
    list(into.values()),
    directory.tensors,
    table,
    sizes=dict(N=fields["num_heads"]),
    skip=(*left_out, *skip),
    fresh=(*(f"{tower}/blocks/(cross|norm_cross)/.*" for tower in stacks), *fresh),
    what=f"{what}, for this model,",
  )


# Names of theirs, by where they go.
HEAD_NAMES = {
  "pooler": r"{p}pooler\..*",
  "objectives_mlm": r"cls\.predictions\..*|lm_head\..*",
  "next_sentence": r"cls\.seq_relationship\..*",
}


def fields_of(config: Mapping[str, Any], what: str) -> dict[str, Any]:
  """The fields of a text tower that config.json describes.

  Raises:
    ValueError: it is of no BERT or RoBERTa, or of one with parts that we do not have.
  """
  kind = config.get("model_type")
  if kind not in KINDS:
    raise ValueError(f"{what}: model_type={kind!r}: want {' or '.join(KINDS)}.")
  hf.require(
    config,
    dict(
      position_embedding_type="absolute",
      is_decoder=False,
      add_cross_attention=False,
      tie_word_embeddings=True,
    ),
    what,
  )
  try:
    return dict(
      width=config["hidden_size"],
      depth=config["num_hidden_layers"],
      num_heads=config["num_attention_heads"],
      mlp_dim=config["intermediate_size"],
      length=config["max_position_embeddings"],
      types=config["type_vocab_size"],
      # RoBERTa counts positions from the one after padding's.
      first_position=config["pad_token_id"] + 1 if kind == "roberta" else 0,
      norm="post",
      norm_eps=config["layer_norm_eps"],
      act=hf.activation(config, what),
    )
  except KeyError as error:
    raise ValueError(f"{what}: its config.json has no {error}.") from error


def tower_rules(
  prefix: str, into: Mapping[str, str], depths: Sequence[int]
) -> rules.Table:
  """The tower, over one or two stacks of ours of these depths."""
  text, theirs = into["text"], f"{prefix}encoder.layer."
  table = [
    rules.Rule(
      (
        f"{prefix}{WORDS}",
        "cls.predictions.decoder.weight",
        "lm_head.decoder.weight",
      ),
      f"{text}/word/embedding",
      "V D -> V D",
    ),
    *towers.bert_embedding_rules(f"{prefix}embeddings.", text),
  ]
  first = 0
  for tower, depth in zip((text, into.get("fusion")), depths, strict=False):
    layers = range(first, first + depth)
    table += towers.bert_layer_rules(theirs, f"{tower}/blocks", layers)
    first += depth
  return table


def head_rules(prefix: str, into: Mapping[str, str]) -> rules.Table:
  """Heads beside the tower, {one of `HEADS`: path of ours}."""
  table = []
  if "pooler" in into:
    table += towers.linear_rules(f"{prefix}pooler.dense.", into["pooler"], "D", "D'")
  if "next_sentence" in into:
    theirs = "cls.seq_relationship."
    table += towers.linear_rules(theirs, into["next_sentence"], "D", "2")
  if "objectives_mlm" in into:
    ours = into["objectives_mlm"]
    if prefix == "roberta.":
      table += [
        *towers.linear_rules("lm_head.dense.", f"{ours}/dense", "D", "D'"),
        *towers.norm_rules("lm_head.layer_norm.", f"{ours}/norm", "D"),
        rules.Rule(("lm_head.bias", "lm_head.decoder.bias"), f"{ours}/bias", "V -> V"),
      ]
    else:
      table += towers.bert_mlm_rules("cls.predictions.", ours)
  return table


def heads_in(tensors: Mapping[str, np.ndarray], prefix: str) -> list[str]:
  """Which of `HEADS` the tensors have."""
  marks = {
    "pooler": (f"{prefix}pooler.dense.weight",),
    "objectives_mlm": ("cls.predictions.bias", "lm_head.bias"),
    "next_sentence": ("cls.seq_relationship.weight",),
  }
  return [name for name in HEADS if any(mark in tensors for mark in marks[name])]


def compare(model: Any, tower: str, fields: Mapping[str, Any], what: str) -> None:
  """Holds a tower of the model against what the file says; shapes tell the rest."""
  module = model
  for name in tower.split("/")[1:]:
    module = getattr(module, name)
  names = ("num_heads", "norm", "norm_eps", "act", "first_position")
  own = {name: getattr(module, name) for name in names if _has(module, name)}
  hf.check(fields, own, what=what, model=tower.replace("/", "."))


def _has(module, name):
  return name in type(module).__dataclass_fields__


def _prefix(directory):
  for prefix in PREFIXES:
    if f"{prefix}{WORDS}" in directory.tensors:
      return prefix
  raise ValueError(f"{directory.path} is of no BERT: it has no tensor {WORDS}.")


def _check_shapes(params, fields, what):
  """The tensors are those that config.json describes."""
  text = tree_lib.flatten(params["model"]["text"])
  shape = lambda path: text[path].shape
  found = dict(
    width=shape("word/embedding")[1],
    mlp_dim=shape("blocks/mlp/up/kernel")[2],
    length=shape("position/embedding")[0],
    types=shape("type/embedding")[0],
  )
  said = {name: fields[name] for name in found}
  hf.check(found, said, what=f"{what} (its tensors)", model="config.json")
