"""LiT's released files: into our trees and back, and what is computed with them.

The files are random, of the names and shapes that vit_jax/models_lit.py, flaxformer's
bert.py and big_vision have; `Official` is what those compute, in numpy. Tolerance as in
test_parity_albef.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_parity_albef import close
from vlp_jax.interop import formats
from vlp_jax.interop import lit
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.ops import posembed

WIDTH, HEADS, MLP, DEPTH, PATCH, SIDE = 24, 3, 40, 2, 8, 3
WORDS, LENGTH, ROWS = 50, 6, 12
VOCAB = dataclasses.replace(tiny.VOCAB, size=WORDS)
LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
OLD = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")


def norm(prefix):
  return {f"{prefix}/{leaf}": (WIDTH,) for leaf in ("scale", "bias")}


def dense(prefix, into, out):
  return {f"{prefix}/kernel": (into, out), f"{prefix}/bias": (out,)}


def encoder(start, names):
  """models_vit.py Encoder."""
  first, attention, second, mlp = names
  shapes, heads = norm(f"{start}/encoder_norm"), (HEADS, WIDTH // HEADS)
  for i in range(DEPTH):
    block = f"{start}/encoderblock_{i}"
    shapes |= norm(f"{block}/{first}") | norm(f"{block}/{second}")
    shapes |= dense(f"{block}/{mlp}/Dense_0", WIDTH, MLP)
    shapes |= dense(f"{block}/{mlp}/Dense_1", MLP, WIDTH)
    for name in ("query", "key", "value"):
      shapes[f"{block}/{attention}/{name}/kernel"] = (WIDTH, *heads)
      shapes[f"{block}/{attention}/{name}/bias"] = heads
    shapes[f"{block}/{attention}/out/kernel"] = (*heads, WIDTH)
    shapes[f"{block}/{attention}/out/bias"] = (WIDTH,)
  return shapes


def bert():
  """flaxformer's BertEncoder, whose kernels are matrices."""
  start = "txt/BertEncoder_0"
  tables = dict(token=WORDS, position=ROWS, segment=2)
  shapes = {
    f"{start}/embedder/embedders_{name}_ids/embedding": (rows, WIDTH)
    for name, rows in tables.items()
  }
  shapes |= norm(f"{start}/layer_norm")
  for i in range(DEPTH):
    layer = f"{start}/encoder_block/layer_sequence/layers_{i}"
    for name in ("query", "key", "value"):
      shapes |= dense(f"{layer}/attention_block/attention_layer/{name}", WIDTH, WIDTH)
    shapes |= dense(f"{layer}/attention_block/dense_layer", WIDTH, WIDTH)
    shapes |= norm(f"{layer}/attention_block/layer_norm")
    shapes |= dense(f"{layer}/mlp_block/mlp/dense_layer", WIDTH, MLP)
    shapes |= dense(f"{layer}/mlp_block/dense_layer", MLP, WIDTH)
    shapes |= norm(f"{layer}/mlp_block/layer_norm")
  return shapes


def file(kind="B16B_2"):
  """{name: random array} of a released file of this kind."""
  shapes = {
    "img/cls": (1, 1, WIDTH),
    "img/embedding/kernel": (PATCH, PATCH, 3, WIDTH),
    "img/embedding/bias": (WIDTH,),
    "t": (1,),
  }
  shapes |= encoder("img/Transformer", OLD if kind == "old" else LINEN)
  if kind == "coco":
    shapes["img/pos_embedding"] = (1, SIDE**2, WIDTH)
  else:
    shapes["img/Transformer/posembed_input/pos_embedding"] = (1, SIDE**2 + 1, WIDTH)
  if kind == "B16B":
    shapes |= dense("img/head", WIDTH, WIDTH)
  if kind == "L16S":
    shapes |= encoder("txt/Encoder_0", LINEN)
    shapes |= {"txt/Embed_0/embedding": (WORDS, WIDTH)}
    shapes |= {"txt/pos_embedding": (1, LENGTH, WIDTH)}
  else:
    shapes |= bert()
  shapes |= dense("txt/head", WIDTH, WIDTH)
  rng = np.random.default_rng(0)
  made = {k: np.float32(0.5 * rng.normal(size=s)) for k, s in shapes.items()}
  prefix = "params/" if kind == "coco" else ""
  return {f"{prefix}{name}": x for name, x in made.items()}


KINDS = ("B16B_2", "B16B", "old", "L16S", "coco")


def written(path, tensors):
  np.savez(path, **tensors)
  return path


def model(kind="B16B_2"):
  flax = dict(num_heads=HEADS, mlp_dim=MLP, act="gelu_tanh")
  words = dict(flax, norm_eps=1e-12, length=ROWS)
  if kind == "L16S":
    words = dict(flax, norm="pre", norm_eps=1e-6, types=0, length=LENGTH)
    words.update(pool="last", see_padding=True)
  return vlm.VLM(
    image=vit.Encoder(WIDTH, DEPTH, patch=PATCH, res=PATCH * SIDE, **flax),
    text=text.Encoder(VOCAB, WIDTH, DEPTH, **words),
    embed_dim=WIDTH,
    project=("image", "text") if kind == "B16B" else ("text",),
    scale="log_scale",
  )


@dataclasses.dataclass
class Official:
  """models_lit.py; t: tensors without prefix."""

  t: dict

  def norm(self, name, x, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * self.t[f"{name}/scale"] + self.t[f"{name}/bias"]

  def dense(self, name, x):
    kernel, bias = self.t[f"{name}/kernel"], self.t[f"{name}/bias"].reshape(-1)
    return x @ kernel.reshape(x.shape[-1], -1) + bias

  def attend(self, prefix, x, real):
    q, k, v = (
      self.dense(f"{prefix}/{n}", x).reshape(len(x), HEADS, -1).swapaxes(0, 1)
      for n in ("query", "key", "value")
    )
    logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.where(real, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    weights = weights / weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(len(x), -1)

  def encoder(self, start, x, names):
    first, attention, second, mlp = names
    for i in range(DEPTH):
      block = f"{start}/encoderblock_{i}"
      y = self.norm(f"{block}/{first}", x, 1e-6)
      y = self.attend(f"{block}/{attention}", y, True)
      out = self.t[f"{block}/{attention}/out/kernel"].reshape(WIDTH, WIDTH)
      x = x + y @ out + self.t[f"{block}/{attention}/out/bias"]
      y = self.dense(f"{block}/{mlp}/Dense_0", self.norm(f"{block}/{second}", x, 1e-6))
      x = x + self.dense(f"{block}/{mlp}/Dense_1", np.asarray(jax.nn.gelu(y)))
    return self.norm(f"{start}/encoder_norm", x, 1e-6)

  def image(self, image, names):
    cut = image.reshape(SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 2, 1, 3, 4)
    kernel = self.t["img/embedding/kernel"]
    x = np.einsum("yxpqc,pqcd->yxd", cut, kernel).reshape(-1, WIDTH)
    x, cls = x + self.t["img/embedding/bias"], self.t["img/cls"][0]
    if "img/pos_embedding" in self.t:  # big_vision adds positions first
      x = np.concatenate([cls, x + self.t["img/pos_embedding"][0]])
    else:
      x = np.concatenate([cls, x])
      x = x + self.t["img/Transformer/posembed_input/pos_embedding"][0]
    x = self.encoder("img/Transformer", x, names)[0]
    return self.dense("img/head", x) if "img/head/kernel" in self.t else x

  def text(self, ids):
    if "txt/Embed_0/embedding" in self.t:
      x = self.t["txt/Embed_0/embedding"][ids] + self.t["txt/pos_embedding"][0]
      return self.dense("txt/head", self.encoder("txt/Encoder_0", x, LINEN)[-1])
    start, real = "txt/BertEncoder_0", ids != 0
    table = lambda n: self.t[f"{start}/embedder/embedders_{n}_ids/embedding"]
    x = table("token")[ids] + table("position")[: len(ids)] + table("segment")[0]
    x = self.norm(f"{start}/layer_norm", x, 1e-12)
    for i in range(DEPTH):
      layer = f"{start}/encoder_block/layer_sequence/layers_{i}"
      block = f"{layer}/attention_block"
      y = self.attend(f"{block}/attention_layer", x, real)
      y = self.dense(f"{block}/dense_layer", y)
      x = self.norm(f"{block}/layer_norm", x + y, 1e-12)
      block = f"{layer}/mlp_block"
      y = np.asarray(jax.nn.gelu(self.dense(f"{block}/mlp/dense_layer", x)))
      x = self.norm(
        f"{block}/layer_norm", x + self.dense(f"{block}/dense_layer", y), 1e-12
      )
    return self.dense("txt/head", x[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_embeddings(kind, tmp_path):
  tensors = file(kind)
  loaded = lit.load(written(tmp_path / "lit.npz", tensors), num_heads_text=HEADS)
  rng = np.random.default_rng(1)
  image = rng.normal(size=(2, PATCH * SIDE, PATCH * SIDE, 3)).astype(np.float32)
  ids = rng.integers(1, WORDS, (2, LENGTH))
  ids[1, 4:] = 0

  def read(self):
    zimg = self.embed_image(self.encode_image(image))
    ztxt = self.embed_text(self.encode_text(jnp.asarray(ids), jnp.asarray(ids != 0)))
    return zimg, ztxt

  params = {"params": loaded.params["model"]}
  zimg, ztxt = jax.jit(lambda p: model(kind).apply(p, method=read))(params)
  official = Official({k.removeprefix("params/"): x for k, x in tensors.items()})
  unit = lambda x: x / np.linalg.norm(x)
  for b in range(2):
    names = OLD if kind == "old" else LINEN
    close(zimg[b], unit(official.image(image[b], names)))
    close(ztxt[b], unit(official.text(ids[b])))
  assert loaded.params["model"]["log_scale"] == official.t["t"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_exact(kind, tmp_path):
  tensors = file(kind)
  path = written(tmp_path / "lit.npz", tensors)
  assert formats.find(path) == "lit"
  lit.save(tmp_path / "again.npz", lit.load(path, num_heads_text=HEADS))
  got = reader.load(tmp_path / "again.npz")
  assert got.keys() == tensors.keys()
  for name, x in tensors.items():
    assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    assert got[name].tobytes() == x.tobytes(), name


def test_what_does_not_fit_is_told(tmp_path):
  tensors = file()
  layer = "txt/BertEncoder_0/encoder_block/layer_sequence/layers_1/"
  tensors[f"{layer}adapter"] = np.zeros(3, np.float32)
  del tensors["img/Transformer/encoderblock_0/LayerNorm_1/bias"]
  tensors[f"{layer}mlp_block/dense_layer/kernel"] = np.zeros((MLP, 7), np.float32)
  with pytest.raises(ValueError) as error:
    lit.load(written(tmp_path / "odd.npz", tensors), num_heads_text=HEADS)
  for line in (
    f"unknown tensors (1):\n    {layer}adapter [3]",
    "missing tensors (1):\n    img/Transformer/encoderblock_0/LayerNorm_1/bias",
    f"wrong shapes (1):\n    {layer}mlp_block/dense_layer/kernel [40, 7]",
  ):
    assert line in str(error.value)
  with pytest.raises(ValueError, match="num_heads_text"):
    lit.load(written(tmp_path / "lit.npz", file()))
  with pytest.raises(ValueError, match="not of LiT's kind"):
    lit.export({"model": {}})


def test_a_model_starts_from_a_file(tmp_path):
  path = written(tmp_path / "lit.npz", file())
  params = lit.load(path, num_heads_text=HEADS).params
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  got = lit.init(shapes, path=path, model=model())
  jax.tree.map(np.testing.assert_array_equal, got, params)
  table = params["model"]["image"]["posemb"]
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((26, WIDTH), np.float32)
  got = lit.init(shapes, path=path)
  want = posembed.resize_posembed(table, 5)
  np.testing.assert_array_equal(got["model"]["image"]["posemb"], want)
  other = model()
  other = other.clone(text=other.text.clone(act="gelu"))
  with pytest.raises(ValueError, match="act='gelu', but the checkpoint wants 'gelu_t"):
    lit.init(shapes, path=path, model=other)
  made = lit.of_model(model(), params)
  assert lit.export(made.params).keys() == file().keys()
