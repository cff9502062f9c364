"""Official ALBEF checkpoints of downstream tasks (salesforce/ALBEF, models/model_*.py).

Retrieval keeps what ITC and ITM have; entailment (ve) and NLVR2 have a classifier, VQA
has a decoder. BERT has no prefix `bert.` there, and no head for masked words. The task
is found from the names. The tree of each is what the configs of configs/finetune make.
"""

from collections.abc import Iterator, Mapping, Sequence
import os
import re
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

Checkpoint = albef.Checkpoint

TEXT = "text_encoder."
SIGNATURE = (
  r"visual_encoder\..*",
  r"text_encoder\.encoder\.layer\..*",
  # BLIP's text layers all attend to the image.
  r"!text_encoder\.encoder\.layer\.0\.crossattention\..*",
)


def task_of(names: Sequence[str]) -> str:
  """Which task's model has tensors of these names: retrieval, ve, nlvr or vqa.

  Raises:
    ValueError: none has.
  """
  names = set(names)
  if "itm_head.weight" in names:
    return "retrieval"
  if any(name.startswith("text_decoder.") for name in names):
    return "vqa"
  if "cls_head.0.weight" in names:
    # The head of ve has three classes; the fusion stack of nlvr is twice as deep.
    layer = "text_encoder.encoder.layer."
    depth = towers.depth(names, f"{layer}{{i}}.", "no ALBEF checkpoint of a task")
    below = sum(f"{layer}{i}.{albef.CROSS}" not in names for i in range(depth))
    return "nlvr" if depth == 3 * below else "ve"
  raise ValueError(
    "no ALBEF checkpoint of a task: it has no itm_head, text_decoder or cls_head."
  )


def load(
  path: str | os.PathLike,
  *,
  task: str | None = None,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  key: str | None = None,
) -> Checkpoint:
  """Reads an official file of a task.

  Args:
    path: see `reader.load`, also for `key`.
    task: "retrieval", "ve", "nlvr" or "vqa"; None: found from the names.
    num_heads_image, num_heads_text: heads of ViT and BERT; None: of 64 each.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  task = task or task_of(tensors)
  depths = _depths_of(tensors, path)
  sizes = albef.heads_of(tensors, TEXT, num_heads_image, num_heads_text)
  what = f"the ALBEF checkpoint {path} of the task {task}"
  table = checkpoint_rules(task=task, **depths)
  tree = rules.from_theirs(tensors, table, sizes=sizes, what=what)
  ema = albef.with_live(tree, albef.NO_MOMENTUM)
  return Checkpoint(tree["params"], ema, tree.get("memory", {}))


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file of a task; what `load` read comes back bit by bit.

  Args: as of `albef.save`.
  """
  task, depths, sizes = _sizes(checkpoint.params)
  ema = albef.with_momentum(albef.averages(checkpoint), albef.NO_MOMENTUM)
  tree = dict(params=checkpoint.params, ema=ema)
  if checkpoint.memory:
    tree["memory"] = checkpoint.memory
  table = checkpoint_rules(task=task, **depths)
  what = f"what to write to {path}"
  reader.save(path, rules.to_theirs(tree, table, sizes=sizes, what=what), key=key)


def export(
  params: Mapping[str, Any], *, momentum: bool = False
) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients, averages) under official names."""
  task, depths, sizes = _sizes(params)
  table = parameter_rules(task=task, **depths, momentum=momentum)
  tree = albef.with_momentum(params, albef.NO_MOMENTUM) if momentum else params
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
  """Parameters of a model from a file of its task, or of ALBEF's pretraining.

  From pretraining (ALBEF.pth) as the official scripts do it: the decoder of VQA begins
  as the layers that attend to the image, and the classifier is fresh.

  Args: as of `albef.init`.
  """
  made_with_lib.check(model, albef.MADE_WITH, path, made_with)
  task, depths, sizes = _sizes(abstract_params)
  momentum = (r"\w+_m\..*", r"(image|text|idx)_queue", "queue_ptr")
  tensors = reader.load(path, key=key)
  if any(name.startswith("text_encoder.bert.") for name in tensors):
    tensors = dict(from_pretraining(tensors, task, depths["fusion_layer"]))
    fresh = (*fresh, "objectives_classify/.*")
  return rules.from_theirs(
    tensors,
    parameter_rules(task=task, **depths),
    sizes=sizes,
    shapes=abstract_params,
    skip=(*momentum, *skip),
    fresh=fresh,
    what=f"the ALBEF checkpoint {path} of the task {task}, for this model,",
  )


def from_pretraining(
  tensors: Mapping[str, np.ndarray], task: str, fusion_layer: int
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) of a pretraining file as a task's model has them.

  What VQA.py, VE.py and Retrieval.py do before they load a state dict.
  """
  bert, head = "text_encoder.bert.", "text_encoder.cls."
  contrast = r"itm_head\..*|(vision|text)_proj\..*|temp"
  for name, x in tensors.items():
    rest = name.removeprefix(bert)
    if rest != name:
      yield f"{TEXT}{rest}", x
      layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", rest)
      if layer and int(layer[1]) >= fusion_layer:
        rest = f"encoder.layer.{int(layer[1]) - fusion_layer}.{layer[2]}"
      elif layer:
        continue
      if task == "vqa":
        yield f"text_decoder.bert.{rest}", x
    elif name.startswith(head):
      if task == "vqa":
        yield f"text_decoder.cls.{name.removeprefix(head)}", x
    elif task == "retrieval" or not re.fullmatch(contrast, name):
      yield name, x


def checkpoint_rules(*, task: str, **depths: int) -> rules.Table:
  """The whole state dict <-> {"params", "ema"}, and {"memory"} for retrieval."""
  table = [
    *parameter_rules(task=task, **depths, ours="params/"),
    *parameter_rules(task=task, **depths, ours="ema/", momentum=True),
  ]
  if task == "retrieval":
    ids = "memory/objectives_itc/id_queue"
    table += albef.queue_rules()
    # Empty places are -100 upstream; any negative id is empty here.
    table.append(rules.Rule("idx_queue", ids, "1 Q -> Q", dtype=("int64", "int32")))
  return table


def parameter_rules(
  *,
  task: str,
  depth_image: int,
  depth_text: int,
  fusion_layer: int,
  depth_decoder: int = 0,
  ours: str = "",
  momentum: bool = False,
) -> rules.Table:
  """The parameters, or with `momentum` their averages, <-> our tree below `ours`."""
  m = "_m" if momentum else ""
  text, model = f"text_encoder{m}.", f"{ours}model"
  words = f"{text}embeddings.word_embeddings.weight"
  upper = dict(theirs=f"{text}encoder.layer.", ours=f"{model}/fusion/blocks")
  table = [
    *towers.vit_rules(f"visual_encoder{m}.", f"{model}/image", depth_image),
    rules.Rule(words, f"{model}/text/word/embedding", "V D -> V D"),
    *albef.text_rules(text, model, fusion_layer),
  ]
  if task == "nlvr":
    table += _pair_rules(**upper, layers=range(fusion_layer, depth_text, 2))
  else:
    layers = range(fusion_layer, depth_text)
    table += towers.bert_layer_rules(**upper, layers=layers, cross=True)
  if task == "retrieval":
    table += albef.contrast_rules(ours, momentum=momentum)
  elif task == "vqa":
    table += _decoder_rules(f"text_decoder{m}.", ours, depth_decoder)
  else:
    head = f"{ours}objectives_classify"
    table += [
      *towers.linear_rules(f"cls_head{m}.0.", f"{head}/dense", "D", "D'"),
      *towers.linear_rules(f"cls_head{m}.2.", f"{head}/head", "D", "C"),
    ]
  return table


def _pair_rules(*, theirs, ours, layers):
  """Pairs of layers of BERT that share keys and values; both names are written."""
  table = []
  for name, i in (("first", "{i}"), ("second", "{i+1}")):
    table += towers.bert_layer_rules(
      f"{theirs}{i}.", f"{ours}/{name}", layers, cross=True, shared=True
    )
  for name in ("key", "value"):
    both = [f"{theirs}{i}.crossattention.self.{name}." for i in ("{i}", "{i+1}")]
    weights, biases = (tuple(f"{b}{p}" for b in both) for p in ("weight", "bias"))
    kernel, bias = f"{ours}/{name}/kernel", f"{ours}/{name}/bias"
    table += [
      rules.Rule(weights, kernel, "(N H) W -> W N H", layers),
      rules.Rule(biases, bias, "(N H) -> N H", layers),
    ]
  return table


def _decoder_rules(theirs, ours, depth):
  """The decoder of answers, which reads the fused question (of width D)."""
  bert, model = f"{theirs}bert.", f"{ours}model/decoder"
  words = (
    f"{bert}embeddings.word_embeddings.weight",
    f"{theirs}cls.predictions.decoder.weight",
  )
  return [
    rules.Rule(words, f"{model}/word/embedding", "V D -> V D"),
    *towers.bert_embedding_rules(f"{bert}embeddings.", model),
    *towers.bert_layer_rules(
      f"{bert}encoder.layer.",
      f"{model}/blocks",
      range(depth),
      cross=True,
      memory="D'",
    ),
    *towers.bert_mlm_rules(f"{theirs}cls.predictions.", f"{ours}objectives_vqa"),
  ]


def _depths_of(tensors, path):
  depths = albef.depths_of(tensors, TEXT, f"{path} is no ALBEF checkpoint of a task")
  decoder = "text_decoder.bert.encoder.layer.{i}."
  if any(name.startswith("text_decoder.") for name in tensors):
    depths["depth_decoder"] = towers.depth(tensors, decoder, f"{path} is no ALBEF")
  return depths


def _sizes(params):
  """(task, depths, sizes): what the rules need to know of a tree of ours."""
  leaves = tree_lib.flatten(params)
  pair = "model/fusion/blocks/first/attn/query/kernel"
  nlvr = pair in leaves
  query = "blocks/attn/query/kernel"
  fusion = pair if nlvr else f"model/fusion/{query}"
  wanted = [f"model/image/{query}", f"model/text/{query}", fusion]
  found = layout.shapes(params, [*wanted, layout.PATCH], albef.REFUSAL)
  image, text, upper, patch = found.values()
  depth_text = text[0] + upper[0] * (2 if nlvr else 1)
  depths = dict(depth_image=image[0], depth_text=depth_text, fusion_layer=text[0])
  decoder = leaves.get(f"model/decoder/{query}")
  if decoder is not None:
    task, depths["depth_decoder"] = "vqa", decoder.shape[0]
  elif "objectives_classify/head/kernel" in leaves:
    task = "nlvr" if nlvr else "ve"
  elif "objectives_itm/head/kernel" in leaves:
    task = "retrieval"
  else:
    raise ValueError(
      "this model is of no task of ALBEF: want the objective classify or vqa, or itc"
      " and itm."
    )
  return task, depths, dict(M=image[2], N=text[2], **layout.sides(patch))
