"""Official BLIP checkpoints (salesforce/BLIP): pretraining, and all downstream tasks.

Our tree has the text layers, which all roles share, as `fusion` (interleaved); the text
encoder and the decoder of a file hold the same tensors twice but for self-attention
(`tie_encoder_decoder_weights`), of which the decoder's is ours `attn_causal`. In VQA
the two are of different weights, and the decoder is `decoder`; in NLVR2 the stack is
`twin`. Momentum copies (`*_m`) are the averaged tree, queues the memory of
`objectives_itc`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import albef
from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, C classes, E embedding, Q queue.

# ALBEF's text has types of tokens, BLIP's has none.
SIGNATURE = (
  r"visual_encoder\..*",
  r"text_(encoder|decoder)\..*crossattention\..*",
  r"!.*token_type_embeddings.*",
)

ENCODER, DECODER = "text_encoder.", "text_decoder.bert."
QUERY = "model/fusion/blocks/{}/query/kernel"
TWIN = "model/fusion/{}/blocks/attn/query/kernel"
MERGE_FROM = 6  # nlvr_encoder.py
# Parts of a layer that the decoder has for itself: their name in our tree.
OWN = {"/attn/": "/attn_causal/", "/norm_attn/": "/norm_attn_causal/"}
# Upstream has no momentum copy of these: the averaged tree gets the live ones.
NO_MOMENTUM = (
  r"model/temp",
  r"objectives_.*",
  r"model/fusion/blocks/\w*attn_causal/.*",
)
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
# models/vit.py and configs/med_config.json.
MADE_WITH = albef.MADE_WITH


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What an official file holds, as trees of ours.

  params: live parameters. ema: their averages, of the same tree, and memory: queues;
  None where the file has none.
  """

  params: dict[str, Any]
  ema: dict[str, Any] | None = None
  memory: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
  """What the rules need to know of a model.

  Attributes:
    depth_image, depth_text: layers.
    encoder, decoder: which of the two a file names; both are one stack of ours.
    separate: but for VQA, where the decoder is its own.
    twin: the first layer of NLVR2's stack that merges two images; None: another task.
    contrast: projections, temperature and (with `match`) ITM head. Retrieval and ITM
      have them, captioners do not.
    temperature: BLIP's ITM model has projections but no temperature.
    momentum: copies and queues; `idx_queue` where their image ids are kept (retrieval).
  """

  depth_image: int
  depth_text: int
  encoder: bool = True
  decoder: bool = True
  separate: bool = False
  twin: int | None = None
  contrast: bool = True
  temperature: bool = True
  momentum: bool = True
  idx_queue: bool = False


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  key: str | None = None,
) -> Checkpoint:
  """Reads an official file; what kind of model it is of is found from its names.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads_image, num_heads_text: heads of ViT and BERT, which no shape tells; None:
      of 64 each, as in all that the official code makes.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  shape = shape_of(tensors, path)
  norm = f"{ENCODER if shape.encoder else DECODER}embeddings.LayerNorm.weight"
  heads = towers.heads
  sizes = dict(
    M=heads(tensors, "visual_encoder.norm.weight", num_heads_image, "num_heads_image"),
    N=heads(tensors, norm, num_heads_text, "num_heads_text"),
  )
  what = f"the BLIP checkpoint {path}"
  table = checkpoint_rules(shape)
  tree = rules.from_theirs(tensors, table, sizes=sizes, what=what)
  if not shape.momentum:
    return Checkpoint(tree["params"])
  ema = albef.with_live(tree, NO_MOMENTUM)
  return Checkpoint(tree["params"], ema, tree["memory"])


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Lost are what the format has no name for: averages of `NO_MOMENTUM`.

  Args:
    path: .pth or .safetensors, see `reader.save`.
    checkpoint: trees of arrays, without boxes.
    key: the official files have "model"; only for .pth.
  """
  # Only pretraining and retrieval have averages, and the queues with them.
  momentum = bool(checkpoint.memory)
  shape, sizes = shape_and_sizes(checkpoint.params, momentum=momentum)
  tree = dict(params=checkpoint.params)
  if momentum:
    # Retrieval keeps the ids of the queue's images, pretraining does not.
    shape = dataclasses.replace(shape, idx_queue=not shape.decoder)
    ema = albef.with_momentum(checkpoint.ema, NO_MOMENTUM)
    tree |= dict(ema=ema, memory=checkpoint.memory)
  what = f"what to write to {path}"
  table = checkpoint_rules(shape)
  reader.save(path, rules.to_theirs(tree, table, sizes=sizes, what=what), key=key)


def export(
  params: Mapping[str, Any], *, momentum: bool = False
) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients, averages) under official names.

  Args:
    params: arrays, without boxes.
    momentum: names of the momentum copies; leaves that have none are left out.

  Returns:
    {name: tensor}, with constants such as position_ids, without queues.
  """
  shape, sizes = shape_and_sizes(params, momentum=momentum)
  table = parameter_rules(shape, momentum=momentum)
  tree = albef.with_momentum(params, NO_MOMENTUM) if momentum else params
  return rules.to_theirs(tree, table, sizes=sizes)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """Parameters of a model from an official file: `c.init = dict(type="blip", path=…)`.

  The table of image positions is resized to the model's grid, as the official code
  does it. Averages and queues are left out. Arguments and errors as of `albef.init`:
  a retrieval model from a pretraining file skips `text_decoder\\..*`. Both
  cross-attentions of an NLVR2 model begin as the one of a pretraining file.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  shape, sizes = shape_and_sizes(abstract_params)
  tensors = reader.load(path, key=key)
  return rules.from_theirs(
    tensors if shape.twin is None else _twins(tensors),
    parameter_rules(shape),
    sizes=sizes,
    shapes=abstract_params,
    skip=(r"\w+_m\..*", *QUEUES, *skip),
    fresh=fresh,
    what=f"the BLIP checkpoint {path}, for this model,",
  )


def shape_of(tensors: Mapping[str, Any], path: str | os.PathLike) -> Shape:
  """The shape of the model that a file is of; `path` for the message.

  Raises:
    ValueError: it is no BLIP checkpoint.
  """
  encoder = any(name.startswith(ENCODER) for name in tensors)
  decoder = any(name.startswith(DECODER) for name in tensors)
  layer = f"{ENCODER if encoder else DECODER}encoder.layer.{{i}}."
  what = f"{path} is no BLIP checkpoint"
  depth = towers.depth(tensors, layer, what)
  contrast = "vision_proj.weight" in tensors
  return Shape(
    depth_image=towers.depth(tensors, "visual_encoder.blocks.{i}.", what),
    depth_text=depth,
    encoder=encoder,
    decoder=decoder,
    separate=encoder and decoder and not contrast,
    twin=min(MERGE_FROM, depth) if "cls_head.0.weight" in tensors else None,
    contrast=contrast,
    temperature="temp" in tensors,
    momentum="image_queue" in tensors,
    idx_queue="idx_queue" in tensors,
  )


def checkpoint_rules(shape: Shape) -> rules.Table:
  """The whole state dict <-> {"params"}, and {"ema", "memory"} where it has them.

  `rules.from_theirs` wants the sizes M and N; `rules.to_theirs` p and q as well.
  """
  table = parameter_rules(shape, ours="params/")
  if not shape.momentum:
    return table
  memory = "memory/objectives_itc"
  # Retrieval calls it ptr_queue, and keeps the ids; empty places are -100.
  pointer = "ptr_queue" if shape.idx_queue else "queue_ptr"
  ids = f"{memory}/id_queue"
  return [
    *table,
    *parameter_rules(shape, ours="ema/", momentum=True),
    rules.Rule("image_queue", f"{memory}/image_queue", "E Q -> Q E"),
    rules.Rule("text_queue", f"{memory}/text_queue", "E Q -> Q E"),
    rules.Rule(pointer, f"{memory}/ptr", "1 ->", dtype=("int64", "int32")),
    rules.Rule("idx_queue", ids, "1 Q -> Q", dtype=("int64", "int32"))
    if shape.idx_queue
    else rules.Fill(ids, lambda sizes: np.full(sizes["Q"], -1, np.int32)),
  ]


def parameter_rules(
  shape: Shape, *, ours: str = "", momentum: bool = False
) -> rules.Table:
  """The parameters, or with `momentum` their averages, <-> our tree below `ours`."""
  m = "_m" if momentum else ""
  model = f"{ours}model"
  table = [
    *towers.vit_rules(f"visual_encoder{m}.", f"{model}/image", shape.depth_image),
    *_text_rules(shape, model, momentum=momentum),
  ]
  if shape.contrast:
    table += towers.linear_rules(f"vision_proj{m}.", f"{model}/image_proj", "W", "E")
    table += towers.linear_rules(f"text_proj{m}.", f"{model}/text_proj", "D", "E")
  if momentum:
    return table
  if shape.contrast:
    table += towers.linear_rules("itm_head.", f"{ours}objectives_itm/head", "D", "2")
  if shape.contrast and shape.temperature:
    table.append(rules.Rule("temp", f"{model}/temp", "->"))
  if shape.decoder:
    head = f"{ours}objectives_{'vqa' if shape.separate else 'lm'}"
    table += towers.bert_mlm_rules("text_decoder.cls.predictions.", head)
  if shape.twin is not None:
    head = f"{ours}objectives_classify"
    table += towers.linear_rules("cls_head.0.", f"{head}/dense", "D", "D'")
    table += towers.linear_rules("cls_head.2.", f"{head}/head", "D", "C")
  return table


def _text_rules(shape, model, *, momentum):
  """Embeddings and layers; a momentum copy has only the encoder."""
  text, fusion = f"{model}/text", f"{model}/fusion"
  layers = range(shape.depth_text)
  lots = []
  if shape.twin is not None:
    lots.append([*_embedding_rules(ENCODER, text), *_twin_rules(fusion, shape)])
  elif shape.encoder:
    lots.append(
      [
        *_embedding_rules(ENCODER, text),
        *towers.bert_layer_rules(
          f"{ENCODER}encoder.layer.", f"{fusion}/blocks", layers, cross=True
        ),
      ]
    )
  if shape.separate:
    decoder = f"{model}/decoder"
    lots.append(
      [
        *_embedding_rules(DECODER, decoder),
        *towers.bert_layer_rules(
          f"{DECODER}encoder.layer.",
          f"{decoder}/blocks",
          layers,
          cross=True,
          memory="D",
        ),
      ]
    )
  elif shape.decoder and not momentum:
    lot = [
      *_embedding_rules(DECODER, text),
      *towers.bert_layer_rules(
        f"{DECODER}encoder.layer.", f"{fusion}/blocks", layers, cross=True
      ),
    ]
    lots.append([_own(rule) for rule in lot])
  tied, constants = {}, []
  for rule in (rule for lot in lots for rule in lot):
    if isinstance(rule, rules.Constant):
      constants.append(rule)
    else:
      names = tied[rule.ours].theirs if rule.ours in tied else ()
      tied[rule.ours] = dataclasses.replace(rule, theirs=(*names, rule.theirs))
  embedding = f"{decoder if shape.separate else text}/word/embedding"
  if shape.decoder and not momentum:
    # The head's matrix is the table of words.
    names = (*tied[embedding].theirs, "text_decoder.cls.predictions.decoder.weight")
    tied[embedding] = dataclasses.replace(tied[embedding], theirs=names)
  table = [*constants, *tied.values()]
  return [_momentum_names(rule) for rule in table] if momentum else table


def _embedding_rules(theirs, ours):
  """BERT's embeddings, but MED has no types of tokens."""
  table = [
    *towers.bert_embedding_rules(f"{theirs}embeddings.", ours),
    rules.Rule(
      f"{theirs}embeddings.word_embeddings.weight",
      f"{ours}/word/embedding",
      "V D -> V D",
    ),
  ]
  return [rule for rule in table if "token_type" not in str(rule.theirs)]


def _twin_rules(fusion, shape):
  """The layers of NLVR2's stack; those from `shape.twin` on merge by a linear map."""
  layer = f"{ENCODER}encoder.layer.{{i}}."
  cross = f"{layer}crossattention."
  table = []
  for name, layers in (
    ("lower", range(shape.twin)),
    ("upper", range(shape.twin, shape.depth_text)),
  ):
    ours = f"{fusion}/{name}/blocks"
    table += towers.bert_layer_rules(f"{ENCODER}encoder.layer.", ours, layers)
    table += towers.norm_rules(
      f"{cross}output.LayerNorm.", f"{ours}/norm_cross", "D", layers
    )
    for k in range(2):
      path = f"{ours}/cross_{k}"
      for leaf, width in (("query", "D"), ("key", "W"), ("value", "W")):
        weight, bias = f"{cross}self{k}.{leaf}.weight", f"{cross}self{k}.{leaf}.bias"
        split = f"(N H) {width} -> {width} N H"
        table += [
          rules.Rule(weight, f"{path}/{leaf}/kernel", split, layers),
          rules.Rule(bias, f"{path}/{leaf}/bias", "(N H) -> N H", layers),
        ]
      out = f"{cross}output.dense{k}."
      table += [
        rules.Rule(f"{out}weight", f"{path}/out/kernel", "D (N H) -> N H D", layers),
        rules.Rule(f"{out}bias", f"{path}/out/bias", "D -> D", layers),
      ]
    if name == "upper":
      merge = f"{cross}output.merge_layer."
      table += towers.linear_rules(merge, f"{ours}/merge", "(2 D')", "D", layers)
  return table


def _twins(tensors):
  """Cross-attentions twice, as models/blip_nlvr.py `load_checkpoint` makes them."""
  out = {}
  for name, x in tensors.items():
    copies = [
      name.replace(part, f"{part[:-1]}{k}.")
      for part in (".crossattention.self.", ".crossattention.output.dense.")
      if part in name
      for k in range(2)
    ]
    out |= dict.fromkeys(copies or [name], x)
  return out


def _own(rule):
  """The decoder's own self-attention, where the rule is of one."""
  if isinstance(rule, rules.Constant):
    return rule
  ours = rule.ours
  for shared, own in OWN.items():
    ours = ours.replace(shared, own)
  return dataclasses.replace(rule, ours=ours)


def _momentum_names(rule):
  copy = lambda name: name.replace(ENCODER, "text_encoder_m.")
  if isinstance(rule, rules.Constant):
    return dataclasses.replace(rule, theirs=copy(rule.theirs))
  return dataclasses.replace(rule, theirs=tuple(map(copy, rule.theirs)))


def shape_and_sizes(
  params: Mapping[str, Any], *, momentum: bool = False
) -> tuple[Shape, dict[str, int]]:
  """What the rules need to know of a tree of ours; `momentum` is taken as it is said.

  Raises:
    ValueError: the tree is not of BLIP's kind.
  """
  leaves = tree_lib.flatten(params)
  reads = [name for name in ("attn", "attn_causal") if QUERY.format(name) in leaves]
  stacks = [QUERY.format(name) for name in reads]
  twin = [TWIN.format(name) for name in ("lower", "upper")]
  twin = twin if set(twin) <= leaves.keys() else []
  stacks += twin
  wanted = ["model/image/blocks/attn/query/kernel", "model/image/patch/kernel"]
  missing = [path for path in wanted if path not in leaves]
  if missing or not stacks:
    missing += [] if stacks else [QUERY.format("attn")]
    raise ValueError(
      "this model is not of BLIP's kind (a ViT, and an interleaved or twin stack):"
      f" it has no {', '.join(missing)}."
    )
  image, patch = (leaves[path].shape for path in wanted)
  text = leaves[stacks[0]].shape
  separate = "model/decoder/blocks/attn/query/kernel" in leaves
  shape = Shape(
    depth_image=image[0],
    depth_text=sum(leaves[path].shape[0] for path in twin) if twin else text[0],
    encoder="attn" in reads or bool(twin),
    decoder="attn_causal" in reads or separate,
    separate=separate,
    twin=text[0] if twin else None,
    contrast="model/image_proj/kernel" in leaves,
    temperature="model/temp" in leaves,
    momentum=momentum,
  )
  return shape, dict(M=image[2], N=text[2], **layout.sides(patch))
