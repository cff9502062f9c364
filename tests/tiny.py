"""A tiny ALBEF and a batch for it, which many tests share."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm


@dataclasses.dataclass(frozen=True)
class Vocab:
  """The fields of data/vocab.py, so that model tests need no tokenizer."""

  size: int = 60
  pad: int = 0
  unk: int = 1
  cls: int = 2
  sep: int = 3
  mask: int = 4
  dec: int | None = None
  enc: int | None = None
  special: tuple[int, ...] = (0, 2, 3, 4)
  continuation: tuple[int, ...] = (50, 51, 52)


VOCAB = Vocab()


def model(*, width=16, depth=2, dtype="float32", dropout=0.0, **fields):
  """16-pixel images in patches of 8, text of up to 10 tokens."""
  # Kernels of 0.02 would make all tokens alike at this width.
  sizes = dict(depth=depth, num_heads=2, mlp_dim=32, dtype=dtype, init_std=None)
  sizes |= dict(dropout=dropout)
  shared = {k: v for k, v in fields.items() if k in ("backend", "remat", "unroll")}
  rest = {k: v for k, v in fields.items() if k not in shared}
  return vlm.VLM(
    image=vit.Encoder(width=width, patch=8, res=16, **sizes, **shared),
    text=text.Encoder(vocab=VOCAB, width=width, length=10, **sizes, **shared),
    fusion=cross_attention.Fusion(**sizes, **shared),
    embed_dim=12,
    **rest,
  )


def albef(*, queue=16, distill=0.4, backend="plain", tile=3, **fields):
  """The three objectives of ALBEF over `model(**fields)`."""
  built = model(**fields)
  width = built.text.width
  return pretrainer_lib.Pretrainer(
    built,
    dict(
      itc=itc.Objective(queue=queue, distill=distill, backend=backend, tile=tile),
      itm=itm.Objective(width=width),
      mlm=mlm.Objective(vocab=VOCAB, width=width, rate=0.3, distill=distill),
    ),
    dict(itc=1.0, itm=1.0, mlm=1.0),
  )


def batch(size=8, *, length=10, seed=0):
  """uint8 images, texts of different lengths, each image once."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, length + 1, size)
  mask = np.arange(length) < lengths[:, None]
  ids = rng.integers(5, VOCAB.size, (size, length))
  ids[:, 0] = VOCAB.cls
  return dict(
    image=rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
    text=np.where(mask, ids, VOCAB.pad).astype(np.int32),
    text_mask=mask,
    image_id=np.arange(size, dtype=np.int32) + 100,
  )


def init(module, inputs, *, seed=0):
  """Unboxed variables: {"params": …} and, for ALBEF, {"memory": …}."""
  keys = jax.random.split(jax.random.key(seed), 4)
  rngs = dict(zip(("params", "dropout", "mask", "sample"), keys, strict=True))
  return nn.unbox(jax.jit(module.init)(rngs, inputs))


def rngs(seed=0):
  """Keys for one training pass."""
  keys = jax.random.split(jax.random.key(seed), 3)
  return dict(zip(("dropout", "mask", "sample"), keys, strict=True))


@functools.cache
def _compiled(key):
  """`_loss` of the module behind `key`, compiled once: eager passes are slow."""
  return jax.jit(functools.partial(_loss, _MODULES[key]))


# Modules hold dicts, which do not hash: they are known by their text.
_MODULES = {}


def _loss(module, variables, inputs, teacher, step, seed):
  (total, metrics), new = module.apply(
    variables,
    inputs,
    step=step,
    teacher_params=teacher,
    train=True,
    rngs=rngs(seed),
    mutable=["memory"],
  )
  return total.value(), (metrics, new)


def loss(module, variables, inputs, *, teacher=None, step=0, seed=0):
  """(loss f32 [], (metrics, new variables)) of a training pass, for `jax.grad`."""
  key = repr(module)
  _MODULES[key] = module
  inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
  return _compiled(key)(variables, inputs, teacher, step, seed)
