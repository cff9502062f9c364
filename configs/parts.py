"""Pieces that configs are put together from: sizes, pipelines, evaluations."""

import ml_collections

# name: width, depth, heads, mlp; Dosovitskiy et al. 2021, table 1, and Touvron et al.
# 2021, table 1 (Ti, S); "tiny" and "mini" are ours, for tests and for one CPU.
SIZES = {
  "tiny": (32, 2, 2, 64),
  "mini": (128, 3, 4, 512),
  "nano": (192, 5, 6, 768),
  "Ti": (192, 12, 3, 768),
  "S": (384, 12, 6, 1536),
  "B": (768, 12, 12, 3072),
  "L": (1024, 24, 16, 4096),
  "H": (1280, 32, 16, 5120),
}


def base(**fields):
  """A config with the given fields and nothing else: defaults live in the code."""
  return ml_collections.ConfigDict(fields)


def size(name, **fields):
  """Width, depth, heads and MLP of a named size; `fields` are added or win."""
  if name not in SIZES:
    raise ValueError(f"no size {name!r}; there are {', '.join(SIZES)}")
  width, depth, heads, mlp = SIZES[name]
  return dict(width=width, depth=depth, num_heads=heads, mlp_dim=mlp) | fields


def on_scenes(config, res):
  """The config with rendered scenes as its data, and a vocabulary made of theirs."""
  length = config.tokenizer.length
  recipe = dict(vocab_size=256, model_type="bpe")
  config.tokenizer = dict(type="sentencepiece", length=length, train=recipe)
  config.data.source = dict(type="scenes", split="train", size=300, res=res)
  return config
