"""Official ALBEF checkpoints (salesforce/ALBEF, models/model_pretrain.py).

Our tree has the text encoder's lower layers as `text` and the upper ones, which attend
to the image, as `fusion`; the momentum copies (`*_m`) are the averaged tree, the queues
the memory of `objectives_itc`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, E embedding, Q queue.

CROSS = "crossattention.self.query.weight"
# A checkpoint of this format has tensors of these names.
SIGNATURE = (
  r"visual_encoder\..*",
  r"text_encoder\.bert\..*",
  r"itm_head\..*",
  r"temp",
  r"!text_decoder\..*",
)

# Upstream has no momentum copy of these: the averaged tree gets the live ones.
NO_MOMENTUM = (
  "model/temp",
  "objectives_itm/head/kernel",
  "objectives_itm/head/bias",
)
REFUSAL = (
  "this model is not of ALBEF's kind (a ViT, a text encoder and cross-attention fusion)"
)
# models/vit.py and configs/config_bert.json.
MADE_WITH = made_with_lib.of(
  image=made_with_lib.TIMM,
  text=made_with_lib.BERT,
  fusion=made_with_lib.BERT,
  decoder=made_with_lib.BERT,
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What an official pretraining file holds, as trees of ours.

  params: live parameters. ema: their averages, of the same tree, or None where there is
  no teacher. memory: queues.
  """

  params: dict[str, Any]
  ema: dict[str, Any] | None
  memory: dict[str, Any]


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  fusion_layer: int | None = None,
  key: str | None = None,
) -> Checkpoint:
  """Reads an official pretraining file (ALBEF.pth: 12 heads each, fusion_layer=6).

  Args:
    path: see `reader.load`, also for `key`.
    num_heads_image, num_heads_text: heads of ViT and BERT, which no shape tells; None:
      of 64 each, as in all that the official code makes.
    fusion_layer: the first layer of BERT that attends to the image; None: found.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  text, kind = "text_encoder.bert.", "ALBEF pretraining checkpoint"
  depths = depths_of(tensors, text, f"{path} is no {kind}", fusion_layer)
  sizes = heads_of(tensors, text, num_heads_image, num_heads_text)
  table = pretraining_rules(**depths)
  what = f"the ALBEF checkpoint {path}"
  tree = rules.from_theirs(tensors, table, sizes=sizes, what=what)
  return Checkpoint(tree["params"], with_live(tree, NO_MOMENTUM), tree["memory"])


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official pretraining file; what `load` read comes back bit by bit.

  Lost are what the format has no name for: the averages of `NO_MOMENTUM`, the ids of
  the queue.

  Args:
    path: .pth or .safetensors, see `reader.save`.
    checkpoint: trees of arrays, without boxes.
    key: the official files have "model"; only for .pth.
  """
  depths, sizes = _sizes(checkpoint.params)
  tree = dict(
    params=checkpoint.params,
    ema=with_momentum(averages(checkpoint), NO_MOMENTUM),
    memory=checkpoint.memory,
  )
  what = f"what to write to {path}"
  table = pretraining_rules(**depths)
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
  depths, sizes = _sizes(params)
  table = parameter_rules(**depths, momentum=momentum)
  tree = with_momentum(params, NO_MOMENTUM) if momentum else params
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
  """Parameters of a model from an official file: `c.init = dict(type="albef", path=…)`.

  The table of image positions is resized to the model's grid, as the official code
  does it; floats become the model's float. Averages and queues are left out.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path, key: see `reader.load`.
    skip: regular expressions of whole names in the file that the model does not use,
      e.g. `text_encoder\\.cls\\..*` where there is no MLM objective.
    fresh: of whole paths of the model that the file does not have. There the result
      holds the leaf of `abstract_params`, for the caller to draw.
    model, made_with: see `made_with.check`; None: not compared.

  Returns:
    The tree of `abstract_params`, of numpy arrays.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  depths, sizes = _sizes(abstract_params)
  momentum = (r"\w+_m\..*", r"(image|text)_queue", "queue_ptr")
  return rules.from_theirs(
    reader.load(path, key=key),
    parameter_rules(**depths),
    sizes=sizes,
    shapes=abstract_params,
    skip=(*momentum, *skip),
    fresh=fresh,
    what=f"the ALBEF checkpoint {path}, for this model,",
  )


def pretraining_rules(
  *, depth_image: int, depth_text: int, fusion_layer: int
) -> rules.Table:
  """The whole state dict <-> {"params", "ema", "memory"}.

  `rules.from_theirs` wants the sizes M and N; `rules.to_theirs` p and q as well.
  """
  depths = dict(
    depth_image=depth_image, depth_text=depth_text, fusion_layer=fusion_layer
  )
  ids = "memory/objectives_itc/id_queue"
  return [
    *parameter_rules(**depths, ours="params/"),
    *parameter_rules(**depths, ours="ema/", momentum=True),
    *queue_rules(),
    rules.Fill(ids, lambda sizes: np.full(sizes["Q"], -1, np.int32)),
  ]


def parameter_rules(
  *,
  depth_image: int,
  depth_text: int,
  fusion_layer: int,
  ours: str = "",
  momentum: bool = False,
) -> rules.Table:
  """The parameters, or with `momentum` their averages, <-> our tree below `ours`."""
  m = "_m" if momentum else ""
  text = f"text_encoder{m}"
  model = f"{ours}model"
  table = [
    *towers.vit_rules(f"visual_encoder{m}.", f"{model}/image", depth_image),
    *text_rules(f"{text}.bert.", model, fusion_layer),
    *towers.bert_layer_rules(
      f"{text}.bert.encoder.layer.",
      f"{model}/fusion/blocks",
      range(fusion_layer, depth_text),
      cross=True,
    ),
    *towers.bert_mlm_rules(
      f"{text}.cls.predictions.",
      f"{ours}objectives_mlm",
    ),
    # The decoder of the MLM head is the table of words.
    rules.Rule(
      (
        f"{text}.bert.embeddings.word_embeddings.weight",
        f"{text}.cls.predictions.decoder.weight",
      ),
      f"{model}/text/word/embedding",
      "V D -> V D",
    ),
    *contrast_rules(ours, momentum=momentum),
  ]
  return table


def text_rules(theirs: str, model: str, fusion_layer: int) -> rules.Table:
  """BERT below the image, but for the words; `theirs` is its prefix."""
  return [
    *towers.bert_embedding_rules(f"{theirs}embeddings.", f"{model}/text"),
    *towers.bert_layer_rules(
      f"{theirs}encoder.layer.", f"{model}/text/blocks", range(fusion_layer)
    ),
  ]


def contrast_rules(ours: str = "", *, momentum: bool = False) -> rules.Table:
  """What ITC and ITM have, in pretraining and in retrieval."""
  m, model = "_m" if momentum else "", f"{ours}model"
  table = [
    *towers.linear_rules(f"vision_proj{m}.", f"{model}/image_proj", "W", "E"),
    *towers.linear_rules(f"text_proj{m}.", f"{model}/text_proj", "D", "E"),
  ]
  if not momentum:
    table += [
      rules.Rule("temp", f"{model}/temp", "->"),
      *towers.linear_rules("itm_head.", f"{ours}objectives_itm/head", "D", "2"),
    ]
  return table


def queue_rules() -> rules.Table:
  """The queues of ITC, but for the ids of their images."""
  memory = "memory/objectives_itc"
  return [
    rules.Rule("image_queue", f"{memory}/image_queue", "E Q -> Q E"),
    rules.Rule("text_queue", f"{memory}/text_queue", "E Q -> Q E"),
    rules.Rule("queue_ptr", f"{memory}/ptr", "1 ->", dtype=("int64", "int32")),
  ]


def depths_of(
  tensors: Mapping[str, Any], text: str, what: str, fusion_layer: int | None = None
) -> dict[str, int]:
  """What the rules want to know of the towers; `text` is the prefix of BERT.

  Raises:
    ValueError: it is no checkpoint of this kind; `what` says which it is not.
  """
  layers = f"{text}encoder.layer."
  depth_text = towers.depth(tensors, f"{layers}{{i}}.", what)
  cross = [i for i in range(depth_text) if f"{layers}{i}.{CROSS}" in tensors]
  fusion_layer = min(cross, default=0) if fusion_layer is None else fusion_layer
  if not 0 < fusion_layer < depth_text:
    raise ValueError(
      f"fusion_layer={fusion_layer}, but {what.split()[0]} has {depth_text} layers of"
      f" text: say 1 to {depth_text - 1}."
    )
  return dict(
    depth_image=towers.depth(tensors, "visual_encoder.blocks.{i}.", what),
    depth_text=depth_text,
    fusion_layer=fusion_layer,
  )


def heads_of(
  tensors: Mapping[str, Any], text: str, image: int | None, words: int | None
) -> dict[str, int]:
  """{"M", "N"}: heads of the ViT and of BERT; `text` is the prefix of BERT."""
  return dict(
    M=towers.heads(tensors, "visual_encoder.norm.weight", image, "num_heads_image"),
    N=towers.heads(
      tensors, f"{text}embeddings.LayerNorm.weight", words, "num_heads_text"
    ),
  )


def averages(checkpoint: "Checkpoint") -> dict[str, Any]:
  """Of a model without a teacher, the parameters themselves."""
  return checkpoint.params if checkpoint.ema is None else checkpoint.ema


def with_momentum(tree: Mapping[str, Any], none: Sequence[str]) -> dict[str, Any]:
  """The leaves that have a momentum copy upstream: not those of the patterns `none`."""
  leaves = tree_lib.flatten(tree)
  return rules.nest({k: x for k, x in leaves.items() if not rules.matches(k, none)})


def with_live(tree: Mapping[str, Any], none: Sequence[str]) -> dict[str, Any]:
  """`tree["ema"]`, and of `tree["params"]` what has no momentum copy upstream."""
  live = tree_lib.flatten(tree["params"])
  single = {k: x for k, x in live.items() if rules.matches(k, none)}
  return rules.nest(tree_lib.flatten(tree["ema"]) | single)


def _sizes(params):
  """(depths, sizes): what the rules need to know of a tree of ours."""
  query = "blocks/attn/query/kernel"
  wanted = [f"model/{tower}/{query}" for tower in ("image", "text", "fusion")]
  found = layout.shapes(params, [*wanted, layout.PATCH], REFUSAL)
  image, text, fusion, patch = found.values()
  depths = dict(
    depth_image=image[0], depth_text=text[0] + fusion[0], fusion_layer=text[0]
  )
  return depths, dict(M=image[2], N=text[2], **layout.sides(patch))
