"""A source, a tokenizer and a pretrainer small enough to say what must come out."""

import dataclasses
import io

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlp_jax.data import vocab as vocab_lib

RES = 8
PP = f"decode|resize({RES})"


@flax.struct.dataclass
class Tokens:
  x: jax.Array
  mask: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """Grey pictures; a caption names its picture's shade ("shade s40 …")."""

  shades: tuple[int, ...]
  captions: int = 1
  ids: tuple[int, ...] | None = None

  def __len__(self):
    return len(self.shades)

  def read(self, indices):
    out = []
    for i in indices:
      shade = self.shades[i]
      file = io.BytesIO()
      Image.new("RGB", (RES, RES), (shade,) * 3).save(file, "PNG")
      captions = [f"shade s{shade}" + " x" * c for c in range(self.captions)]
      image_id = int(i) if self.ids is None else self.ids[i]
      out.append(
        dict(
          image=file.getvalue(),
          captions=captions,
          image_id=image_id,
          key=f"{i}",
          words=[f"s{shade}"],
        )
      )
    return out


TEMPERATURE = 0.05


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Words "s7" are two pieces, "s" and "+7"; the others are one."""

  length: int = 6
  words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "shade", "x", "s")

  @property
  def vocab(self):
    first = len(self.words)
    return vocab_lib.Vocab(
      first + 256, 0, 1, 2, 3, 4, continuation=tuple(range(first, first + 256))
    )

  def encode(self, texts):
    rows = []
    for text in texts:
      row = []
      for word in text.split():
        if word in self.words:
          row.append(self.words.index(word))
        else:
          row += [self.words.index("s"), len(self.words) + int(word[1:])]
      rows.append(row)
    return vocab_lib.pack(rows, self.vocab, length=self.length, sep=False)

  def decode(self, ids):
    pieces = (p for p in self.pieces(ids) if not p.startswith("["))
    return "".join(p[1:] if p.startswith("+") else f" {p}" for p in pieces).strip()

  def pieces(self, ids):
    first = len(self.words)
    return [self.words[i] if i < first else f"+{i - first}" for i in ids]


class Model(nn.Module):
  """Sees an image as its shade, and a text as the shade it names."""

  embed_dim: int | None = 2

  def setup(self):
    self.wrong = self.param("wrong", nn.initializers.zeros, ())

  def encode_image(self, image):
    shade = image.astype(jnp.float32).mean((1, 2, 3))
    if image.dtype != jnp.uint8:
      shade = shade + 128.0  # normalised
    return Tokens(shade[:, None, None] + jnp.zeros((1, 3, 1)))

  def encode_text(self, ids, mask):
    shade = jnp.max(jnp.where(mask, ids - len(Tokenizer.words), 0), axis=1)
    x = jnp.where(mask, shade[:, None], 0)[..., None].astype(jnp.float32)
    return Tokens(x, mask)

  def words(self, ids, mask, encoded=None):
    return self.encode_text(ids, mask) if encoded is None else encoded

  def embed_image(self, tokens):
    return self.embed(tokens.x[:, 0, 0])

  def embed_text(self, tokens):
    return self.embed(tokens.x[:, 0, 0] + self.wrong)

  def inverse_temperature(self):
    return jnp.float32(1 / TEMPERATURE)

  def embed(self, shade):
    if self.embed_dim is None:
      return None
    angle = shade / 256.0 * 3.0
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


class Itm(nn.Module):
  """Matches shades that are less than `near` apart, and is shifted by nothing."""

  near: float = 0.5

  def logits(self, model, image, text):
    apart = jnp.abs(image.x[:, 0, 0] - text.x[:, 0, 0])
    return jnp.stack([jnp.zeros_like(apart), self.near - apart], axis=1)

  def score(self, model, image, text):
    return self.logits(model, image, text)[:, 1]


class Mlm(nn.Module):
  """Fills a mask with the image's shade after an "s", and with "s" otherwise."""

  def predict(self, model, ids, mask, image):
    first = len(Tokenizer.words)
    shade = jnp.round(image.x[:, :1, 0]).astype(jnp.int32) + first
    second = jnp.arange(ids.shape[1]) == 3
    guess = jnp.where(second, shade, Tokenizer.words.index("s"))
    return jax.nn.one_hot(guess, first + 256)


class Pretrainer(nn.Module):
  model: nn.Module
  objectives: dict


def pretrainer(**objectives):
  return Pretrainer(Model(), objectives or {"itm": Itm(), "mlm": Mlm()})


def variables(wrong=0.0):
  return {"params": {"model": {"wrong": np.float32(wrong)}}}
