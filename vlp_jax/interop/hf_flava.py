"""FLAVA of Hugging Face's transformers <-> our trees: FlavaModel, FlavaForPreTraining.

Poolers that their towers have and their objectives do not read are kept beside the
model: "poolers". The codebook of facebook/flava-full (a dVAE, frozen) is
no part of the model, whose masked patches have a column of codes: it is kept as it is.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

from vlp_jax.interop import hf
from vlp_jax.interop import hf_vit
from vlp_jax.interop import layout
from vlp_jax.interop import rules
from vlp_jax.interop import towers

# Sizes: those of `towers`; of the fusion A width, B mlp, J heads, j head_dim; E of the
# contrastive space, C codes.

SIGNATURE = (
  r"(flava\.|)image_to_mm_projection\.weight",
  r"(flava\.|)multimodal_model\.cls_token",
)
TOWERS = {"image": "image_model.", "text": "text_model.", "fusion": "multimodal_model."}
FUSION_LETTERS = {"W": "A", "G": "B", "M": "J", "h": "j"}
MIXED = "image_to_mm_projection.weight"
CODEBOOK = r"image_codebook\..*"
# Our objectives that FlavaForPreTraining has heads of.
PRETRAINED = ("objectives_mim", "objectives_mmm", "objectives_text_mlm")
# Tied to the decoder's bias; save_pretrained leaves them out.
TIED = ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head")


# What transformers leaves out of config.json where it is the default of the class
# (configuration_flava.py).
LAYERS = hf.BASE | dict(hidden_act="gelu", layer_norm_eps=1e-12)
DEFAULTS = dict(
  image_config=LAYERS | dict(image_size=224, patch_size=16),
  text_config=LAYERS | dict(max_position_embeddings=512, type_vocab_size=2),
  multimodal_config=LAYERS | dict(num_hidden_layers=6),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a directory holds.

  params: a tree of ours. config: of config.json. prefix: of their names. codebook:
  {name: tensor} that is carried along.
  """

  params: dict[str, Any]
  config: dict[str, Any]
  prefix: str = "flava."
  codebook: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a directory, or a name of the hub.

  Raises:
    FileNotFoundError, ValueError: see `hf.read` and `rules.from_theirs`.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields = fields_of(directory.config, what)
  prefix = _prefix(directory.tensors)
  depths = {name: fields[name]["depth"] for name in TOWERS}
  table = _rules(
    prefix, depths, heads="itm_head.pooler.dense.weight" in directory.tensors
  )
  params = rules.from_theirs(
    directory.tensors, table, sizes=_heads(fields), skip=(CODEBOOK,), what=what
  )
  is_code = lambda name: rules.matches(name, (CODEBOOK,))
  codebook = {name: x for name, x in directory.tensors.items() if is_code(name)}
  return Checkpoint(params, directory.config, prefix, codebook)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory; the tensors that `load` read come back bit by bit."""
  tensors = export(checkpoint.params, checkpoint.prefix)
  hf.write(path, checkpoint.config, tensors | checkpoint.codebook)


def export(params: Mapping[str, Any], prefix: str = "flava.") -> dict[str, Any]:
  """A tree of what `load` gives (or of gradients) as {their name: tensor}."""
  table, sizes = _table(params, prefix, poolers="poolers" in params)
  tensors = rules.to_theirs(params, table, sizes=sizes)
  return {k: x for k, x in tensors.items() if k not in {f"{h}.bias" for h in TIED}}


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """A trained model of FLAVA's kind: FlavaForPreTraining where it has all heads.

  What transformers has no names for (heads of other objectives) is left out, and so is
  a part of the pretraining heads.

  Args:
    model: the VLM: config.json says its fields. params: its pretrainer's.

  Raises:
    ValueError: it is of another kind; lists the fields.
  """
  kept = {name: params[name] for name in PRETRAINED if name in params}
  whole = len(kept) == len(PRETRAINED)
  kept = {"model": params["model"]} | (kept if whole else {})
  _table(kept, "flava.", poolers=False)
  image, words, fusion = model.image, model.text, model.fusion
  width = fusion.width or words.width
  stack = lambda tower, width: dict(
    hidden_size=width,
    num_hidden_layers=tower.depth,
    num_attention_heads=tower.num_heads,
    intermediate_size=tower.mlp_dim,
    hidden_act=hf.their_activation(tower.act),
    layer_norm_eps=tower.norm_eps,
    qkv_bias=True,
  )
  config = dict(
    architectures=["FlavaForPreTraining" if whole else "FlavaModel"],
    model_type="flava",
    hidden_size=width,
    projection_dim=model.embed_dim,
    init_codebook=False,
    image_config=stack(image, image.width)
    | dict(
      model_type="flava_image_model",
      patch_size=image.patch,
      image_size=image.res,
      num_channels=3,
      mask_token=image.mask_token,
    ),
    text_config=stack(words, words.width)
    | dict(
      model_type="flava_text_model",
      max_position_embeddings=words.length,
      type_vocab_size=words.types,
      vocab_size=words.vocab.size,
      pad_token_id=words.vocab.pad,
    ),
    multimodal_config=stack(fusion, width)
    | dict(model_type="flava_multimodal_model", use_cls_token=True),
  )
  if whole:
    codes = params["objectives_mim"]["decoder"]["kernel"].shape[1]
    config["image_config"]["vocab_size"] = codes
  _compare(model, fields_of(config, "the model"), "transformers' FLAVA")
  return Checkpoint(kept, config)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  model: Any = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="hf_flava", path=FOLDER or name)`.

  The poolers of the towers are left out. Arguments are those of `hf_vilt.init`.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields, prefix = fields_of(directory.config, what), _prefix(directory.tensors)
  if model is not None:
    _compare(model, fields, what)
  table, sizes = _table(abstract_params, prefix, poolers=False)
  left_out = [rf"{prefix}{theirs}pooler\..*" for theirs in TOWERS.values()]
  return rules.from_theirs(
    directory.tensors,
    table,
    sizes=sizes | _heads(fields),
    shapes=abstract_params,
    skip=(CODEBOOK, *left_out, *skip),
    fresh=fresh,
    what=f"{what}, for this model,",
  )


def fields_of(config: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
  """{"image", "text", "fusion"}: the fields that config.json describes.

  Raises:
    ValueError: it is of another kind of model, or is not understood.
  """
  if config.get("model_type") != "flava":
    raise ValueError(f"{what}: model_type={config.get('model_type')!r}: want 'flava'.")

  def stack(part):
    hf.require(part, dict(num_channels=3, qkv_bias=True, use_cls_token=True), what)
    return dict(
      width=part["hidden_size"],
      depth=part["num_hidden_layers"],
      num_heads=part["num_attention_heads"],
      mlp_dim=part["intermediate_size"],
      norm="pre",
      norm_eps=part["layer_norm_eps"],
      act=hf.activation(part, what),
    )

  try:
    image, words, both = (
      default | (config.get(name) or {}) for name, default in DEFAULTS.items()
    )
    hf.require(image, dict(mask_token=True), what)
    return dict(
      image=stack(image)
      | dict(
        patch=image["patch_size"],
        res=image["image_size"],
        mask_token=True,
        keep_raw=True,
      ),
      text=stack(words)
      | dict(
        length=words["max_position_embeddings"],
        types=words["type_vocab_size"],
        norm_pre=True,
        keep_raw=True,
      ),
      fusion=stack(both),
    )
  except KeyError as error:
    raise ValueError(f"{what}: its config.json has no {error}.") from error


def _compare(model, fields, what):
  for name, found in fields.items():
    tower = getattr(model, name)
    own = {field: getattr(tower, field) for field in found}
    own = {k: v for k, v in own.items() if v is not None or k != "width"}
    hf.check(found, own, what=what, model=f"model.{name}")


def _heads(fields):
  letters = dict(image="M", text="N", fusion="J")
  return {letter: fields[name]["num_heads"] for name, letter in letters.items()}


def _rules(prefix, depths, *, heads, poolers=True):
  image, words, fusion = "model/image", "model/text", "model/fusion"
  text = f"{prefix}{TOWERS['text']}"
  embed = f"{text}embeddings."
  only = lambda table, ours: [
    rule for rule in table if rule.ours.startswith((f"{ours}/blocks/", f"{ours}/norm/"))
  ]

  def stack(name, letters):
    ours = f"model/{name}"
    table = hf_vit.tower_rules(f"{prefix}{TOWERS[name]}", ours, depths[name])
    return rules.relabel(only(table, ours), letters)

  bert = [
    dataclasses.replace(r, ours=r.ours.replace(f"{words}/norm/", f"{words}/norm_pre/"))
    if isinstance(r, rules.Rule)
    else r
    for r in towers.bert_embedding_rules(embed, words)
  ]
  table = [
    *hf_vit.tower_rules(f"{prefix}{TOWERS['image']}", image, depths["image"]),
    rules.Rule(
      f"{prefix}{TOWERS['image']}embeddings.mask_token", f"{image}/mask", "1 1 W -> W"
    ),
    *(rule for rule in bert if isinstance(rule, rules.Rule)),
    rules.Rule(
      f"{embed}word_embeddings.weight", f"{words}/word/embedding", "V D -> V D"
    ),
    *stack("text", towers.TEXT_LETTERS),
    rules.Rule(f"{prefix}{TOWERS['fusion']}cls_token", f"{fusion}/cls", "1 1 A -> A"),
    *stack("fusion", FUSION_LETTERS),
    *towers.linear_rules(
      f"{prefix}image_to_mm_projection.", f"{fusion}/image", "W", "A"
    ),
    *towers.linear_rules(f"{prefix}text_to_mm_projection.", f"{fusion}/text", "D", "A"),
    *towers.linear_rules(f"{prefix}image_projection.", "model/image_proj", "W", "E"),
    *towers.linear_rules(f"{prefix}text_projection.", "model/text_proj", "D", "E"),
    rules.Rule(f"{prefix}logit_scale", "model/log_scale", "->"),
  ]
  if poolers:
    for name, letter in dict(image="W", text="D", fusion="A").items():
      theirs = f"{prefix}{TOWERS[name]}pooler.dense."
      table += towers.linear_rules(theirs, f"poolers/{name}", letter, f"{letter}'")
  return table + (_head_rules() if heads else [])


def _head_rules():
  pairs = "objectives_mmm"
  return [
    *_masked("mim_head.", "objectives_mim", "W", "C"),
    *_masked("mmm_image_head.", f"{pairs}/codebook", "A", "C"),
    *_words("mlm_head.", "objectives_text_mlm", "D"),
    *_words("mmm_text_head.", f"{pairs}/words", "A"),
    *towers.linear_rules("itm_head.pooler.dense.", f"{pairs}/pool/dense", "A", "A'"),
    *towers.linear_rules("itm_head.seq_relationship.", f"{pairs}/head", "A", "2"),
  ]


def _transform(theirs, ours, width):
  theirs = f"{theirs}transform."
  return [
    *towers.linear_rules(f"{theirs}dense.", f"{ours}/dense", width, f"{width}'"),
    *towers.norm_rules(f"{theirs}LayerNorm.", f"{ours}/norm", width),
  ]


def _masked(theirs, ours, width, out):
  weight = f"{theirs}decoder.weight"
  return [
    *_transform(theirs, ours, width),
    rules.Rule(weight, f"{ours}/decoder/kernel", f"{out} {width} -> {width} {out}"),
    rules.Rule(
      (f"{theirs}decoder.bias", f"{theirs}bias"),
      f"{ours}/decoder/bias",
      f"{out} -> {out}",
    ),
  ]


def _words(theirs, ours, width):
  """The bias is the objective's, not its decoder's."""
  return [
    dataclasses.replace(rule, ours=rule.ours.replace("/decoder/bias", "/bias"))
    for rule in _masked(theirs, ours, width, "V")
  ]


def _prefix(tensors):
  return "" if MIXED in tensors else "flava."


def _table(params, prefix, *, poolers):
  """(table, sizes) of a tree of ours."""
  wanted = [f"model/{name}/blocks/attn/query/kernel" for name in TOWERS]
  wanted += [layout.PATCH, "model/fusion/image/kernel", "model/fusion/cls"]
  refusal = "this model is not of FLAVA's kind (two towers under one stream)"
  *queries, patch, _, _ = layout.shapes(params, wanted, refusal).values()
  depths = {name: query[0] for name, query in zip(TOWERS, queries, strict=True)}
  sizes = {c: query[2] for c, query in zip("MNJ", queries, strict=True)}
  heads = "objectives_mmm" in params
  table = _rules(prefix, depths, heads=heads, poolers=poolers)
  return table, sizes | layout.sides(patch)
