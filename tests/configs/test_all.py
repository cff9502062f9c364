"""Every config: what it says, and the shapes of what it builds, at its full size."""

import os
import pathlib
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import feeds
from vlp_jax.data import vocab as vocab_lib
from vlp_jax.ops import prng
from vlp_jax.ops import reduce
from vlp_jax.ops import tree
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
PARTS = ("parts", "tasks", "scratch")  # pieces of configs, themselves none
FILES = [f.relative_to(ROOT / "configs") for f in sorted(ROOT.glob("configs/**/*.py"))]
NAMES = [str(f.with_suffix("")) for f in FILES if f.stem not in PARTS]
# A file compares its argument with the names that it knows, or looks it up in a table.
KNOWN = re.compile(r'arg == "(\w+)"|^  "(\w+)": \(', re.MULTILINE)
ARGS = {
  name: list(
    dict.fromkeys(
      one or other
      for one, other in KNOWN.findall((ROOT / "configs" / f"{name}.py").read_text())
    )
  )
  for name in NAMES
}
SPECS = [
  f"{name}{arg}" for name in NAMES for arg in ("", *(f":{a}" for a in ARGS[name]))
]

# Sizes between others, of which the smallest and the largest are always built.
BETWEEN = (
  "beit3:giant",
  "beit3:large",
  "clip:RN101",
  "clip:RN50x4",
  "clip:RN50x16",
  "flip:L16",
  "openclip:B16",
  "openclip:medium",
  "openclip:large",
  "siglip:B16_384",
  "siglip:So400m14",
  "siglip2:L16",
  "siglip2:So400m16",
  "uniter:L",
)


def always(spec, *more):
  """A parameter of a test, slow where it is of BETWEEN."""
  marks = [pytest.mark.slow] if spec in BETWEEN else []
  return pytest.param(spec, *more, marks=marks)


# Data and vocabularies are not in the repository: their sizes stand in for them. BERT's
# uncased vocabulary, and what a recipe for training one asks for at most.
BERT = 30_522
# Of a tokenizer with a file: CLIP's merges, and SentencePiece's c4_en.
SIZES = {"clip_bpe": 49_408, "sentencepiece": 32_000}
EXAMPLES = 1_000_000


def load(spec):
  name, _, arg = spec.partition(":")
  given = config_file.load(f"{ROOT}/configs/{name}.py" + (f":{arg}" if arg else ""))
  return config_lib.run(given)


def stand_in(config):
  """(vocabulary, length) of the tokenizer that the config names."""
  recipe = config.tokenizer.get("train") or {}
  size = recipe.get("vocab_size", SIZES.get(config.tokenizer["type"], BERT))
  roles = {}
  if config.tokenizer.get("roles"):
    roles, size = {"dec": size, "enc": size + 1}, size + 2
  vocab = vocab_lib.Vocab(size=size, pad=0, unk=1, cls=2, sep=3, mask=4, **roles)
  return vocab, config.tokenizer["length"]


def shapes(config):
  """(train state, metrics) after one step: no data, no memory, nothing compiled."""
  vocab, length = stand_in(config)
  time = clock_lib.of(config, EXAMPLES)
  pretrainer = build.pretrainer(config, vocab=vocab, length=length, time=time)
  batch = batch_lib.of(
    feeds.feeds(config, {}, pretrainer), pretrainer.model.image, length
  )
  optim = build.optim(config.optim, time)
  params = step_lib.abstract_params(pretrainer, batch)
  tx, schedule = optim_lib.make(optim, params, total_steps=time.total)
  ema = config.ema_decay is not None
  init = step_lib.make_init(pretrainer, tx, ema=ema)
  boxed = jax.eval_shape(init, prng.key(0), batch)
  # The tables of the sharding cover every parameter's axes.
  sharding = sharding_lib.Sharding(**config.sharding)
  mesh = sharding_lib.make_mesh(sharding, jax.devices())
  sharding_lib.check_batch(config.batch_size, mesh)
  sharding_lib.shardings(boxed, mesh, sharding)
  state = nn.unbox(boxed)
  step = step_lib.make_train_step(
    pretrainer, tx, seed=config.seed, ema_decay=config.ema_decay, schedule=schedule
  )
  new_state, metrics = jax.eval_shape(step, state, batch)
  return state, new_state, metrics


@pytest.fixture(scope="module")
def shapes_of():
  found = {}

  def get(spec):
    if spec not in found:
      found[spec] = shapes(load(spec))
    return found[spec]

  return get


def describe(config, state):
  """The golden text: all that the config says with its defaults, and all parameters."""
  params = tree.flatten(state.params)
  said = config_file.flatten(config_lib.said(config))
  lines = ["# config", *said, "", "# parameters"]
  lines += [f"{path} {list(leaf.shape)} {leaf.dtype}" for path, leaf in params.items()]
  memory = tree.flatten(state.memory)
  if memory:
    lines += ["", "# memory"]
    lines += [
      f"{path} {list(leaf.shape)} {leaf.dtype}" for path, leaf in memory.items()
    ]
  total = sum(leaf.size for leaf in params.values())
  return "\n".join([*lines, "", f"# total: {total:,} parameters", ""])


def test_there_are_configs():
  assert {"albef", "quickstart"} <= set(NAMES)
  assert [name for name in NAMES if "tiny" not in ARGS[name]] == []


@pytest.mark.parametrize("spec", SPECS)
def test_every_component_is_checked(spec):
  config = load(spec)
  config_lib.check(config)
  time = clock_lib.of(config, EXAMPLES)
  assert time.total > 0
  for duration in (config.log.every, config.checkpoint.every):
    assert time.steps(duration) > 0


@pytest.mark.parametrize("spec", [always(spec) for spec in SPECS])
def test_a_whole_step_at_full_size(spec, shapes_of):
  state, new_state, metrics = shapes_of(spec)
  assert jax.tree.structure(state) == jax.tree.structure(new_state)
  for (path, old), new in zip(
    tree.flatten(state).items(), jax.tree.leaves(new_state), strict=True
  ):
    assert (old.shape, old.dtype) == (new.shape, new.dtype), path
  for name, mean in metrics.items():
    assert isinstance(mean, reduce.Mean), name
    assert mean.total.shape == () and mean.total.dtype == np.float32, name
  # A step of all kinds of data at once has the metrics of all.
  assert {"loss", "grad_norm", "learning_rate", *load(spec).objectives} <= set(metrics)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", NAMES)
def test_golden_text(name, shapes_of):
  """After a change that is meant: UPDATE_GOLDEN=1 pytest tests/configs."""
  text = describe(load(name), shapes_of(name)[0])
  path = GOLDEN / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN", "0") not in ("", "0"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
  assert path.is_file(), f"no {path.name}: UPDATE_GOLDEN=1 writes it"
  assert text == path.read_text("utf-8"), (
    f"tests/golden/{name}.txt is not what configs/{name}.py makes: if that is meant,"
    " UPDATE_GOLDEN=1 rewrites it"
  )


def test_golden_texts_are_of_configs():
  found = {str(f.relative_to(GOLDEN).with_suffix("")) for f in GOLDEN.rglob("*.txt")}
  assert found == set(NAMES)


def test_albef_has_the_published_size(shapes_of):
  """ViT-B/16 at 256 pixels and BERT-base cut in two, layer by layer.

  The paper (section 3.1): "a 12-layer ViT-B/16 with 85.8M parameters", "BERT-base with
  123.7M parameters".
  """
  width, mlp, side = 768, 3072, 256
  norm = 2 * width
  linear = lambda i, o: i * o + o
  attention = 4 * linear(width, width)
  block = attention + linear(width, mlp) + linear(mlp, width) + 2 * norm
  cross = attention + norm
  tokens = 1 + (side // 16) ** 2
  vit = linear(16 * 16 * 3, width) + width + tokens * width + 12 * block + norm
  # 12 layers: the first 6 read the text, the other 6 look at the image as well.
  embeddings = lambda positions: (BERT + positions + 2) * width + norm
  mlm = linear(width, width) + norm + BERT  # the word table is the output's as well
  assert (round(vit / 1e6, 1), vit) == (85.8, 85_844_736)
  bert = embeddings(512) + 12 * block + 6 * cross + mlm
  assert (round(bert / 1e6, 1), bert) == (123.7, 123_697_722)
  itc, itm = 2 * linear(width, 256) + 1, linear(width, 2)

  params = shapes_of("albef")[0].params
  assert tree.size(params["model"]["image"]) == vit
  assert tree.size(params["model"]["text"]) == embeddings(512) + 6 * block
  assert tree.size(params["model"]["fusion"]) == 6 * (block + cross)
  assert tree.size(params["objectives_mlm"]) == mlm
  assert tree.size(params) == vit + bert + itc + itm
  assert 209e6 < tree.size(params) < 210e6


@pytest.mark.parametrize(
  "spec, count",
  [
    # Of google-research/vision_transformer vit_jax/models_test.py.
    ("lit", 195_280_897),
    ("lit:L16", 638_443_521),
    # Of the official weights, as open_clip's and transformers' users count them.
    ("clip", 151_277_313),
    ("clip:B16", 149_620_737),
    ("clip:L14", 427_616_513),
    ("clip:L14_336", 427_944_193),
    ("clip:RN50", 102_007_137),
    always("clip:RN101", 119_688_033),
    always("clip:RN50x4", 178_300_601),
    always("clip:RN50x16", 290_979_217),
    ("clip:RN50x64", 623_258_305),
    ("siglip:B16_224", 203_155_970),
  ],
)
def test_dual_encoders_have_the_published_sizes(spec, count, shapes_of):
  assert tree.size(shapes_of(spec)[0].params) == count


def test_beit3_has_the_published_size(shapes_of):
  """276 M with the heads of pretraining (beit3/README.md), its own 64,010 pieces."""
  params = shapes_of("beit3")[0].params
  size = tree.size(params) - tree.size(params["model"]["codebook"])
  # Words are looked up in one matrix, and scored by another with a bias.
  size += (64_010 - SIZES["sentencepiece"]) * (2 * 768 + 1)
  assert size // 1_000_000 == 276
