"""big_vision's files: a Flax model with its tree, by our modules, and back again.

The models here are Flax's own layers under the names that models/vit.py and
models/proj/image_text of big_vision give them. Tolerance as in test_parity_albef.py.
"""

import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_clip
from tests.interop import test_dual
from vlp_jax.interop import big_vision
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import hf_dual
from vlp_jax.interop import initial
from vlp_jax.interop import reader
from vlp_jax.models import vit
from vlp_jax.objectives import itc
from vlp_jax.ops import posembed

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
WIDTH, HEADS, MLP, WORDS, LENGTH, RES, PATCH = 40, 5, 72, 61, 9, 36, 12
close = test_parity_clip.close


class MlpBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    x = nn.gelu(nn.Dense(MLP)(x))
    return nn.Dense(width)(x)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
    return x + MlpBlock()(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
  depth: int
  scan: bool

  @nn.compact
  def __call__(self, x):
    if self.scan:
      stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
      )
      x, _ = stack(name="encoderblock")(x, None)
    else:
      for i in range(self.depth):
        x, _ = Block(name=f"encoderblock_{i}")(x, None)
    return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
  @nn.compact
  def __call__(self, x):
    probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, x.shape[-1]))
    probe = jnp.tile(probe, (len(x), 1, 1))
    x = nn.MultiHeadDotProductAttention(HEADS)(probe, x)
    return (x + MlpBlock()(nn.LayerNorm()(x)))[:, 0]


class Image(nn.Module):
  pool: str = "map"
  classes: int | None = None
  scan: bool = False

  @nn.compact
  def __call__(self, image):
    kernel = (PATCH, PATCH)
    x = nn.Conv(WIDTH, kernel, strides=kernel, padding="VALID", name="embedding")(image)
    x = x.reshape(len(x), -1, WIDTH)
    init = nn.initializers.normal(1.0)
    x = x + self.param("pos_embedding", init, (1, x.shape[1], WIDTH))
    if self.pool == "tok":
      cls = self.param("cls", init, (1, 1, WIDTH))
      x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
    x = Encoder(3, self.scan, name="Transformer")(x)
    if self.pool == "map":
      x = MAPHead()(x)
    else:
      x = x[:, 0] if self.pool == "tok" else x.mean(axis=1)
    return x if self.classes is None else nn.Dense(self.classes, name="head")(x)


class Text(nn.Module):
  width: int
  scan: bool = False

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(WORDS, WIDTH)(ids)
    init = nn.initializers.normal(1.0)
    x = x + self.param("pos_embedding", init, (1, LENGTH, WIDTH))
    x = Encoder(2, self.scan)(x)
    return nn.Dense(self.width, name="head")(x[:, -1])


class TwoTowers(nn.Module):
  scan: bool = False
  project: bool = False

  @nn.compact
  def __call__(self, image, ids):
    width = 24 if self.project else WIDTH
    zimg = Image("map", width if self.project else None, self.scan, name="img")(image)
    ztxt = Text(width, self.scan, name="txt")(ids)
    unit = lambda x: x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-8)
    constant = nn.initializers.constant
    t = self.param("t", constant(1.2), (1,))
    b = self.param("b", constant(-3.0), (1,))
    return unit(zimg), unit(ztxt), jnp.exp(t), b


def pictures(rows=3):
  rng = np.random.default_rng(0)
  image = rng.normal(size=(rows, RES, RES, 3)).astype(np.float32)
  return image, rng.integers(0, WORDS, (rows, LENGTH))


def written(path, module, *given, prefix="params/", **others):
  """The outputs of a random model, whose parameters lie in a file then."""
  params = jax.jit(module.init)(jax.random.key(0), *given)["params"]
  draw = np.random.default_rng(1).normal
  noisy = lambda x: np.asarray(x) + np.float32(0.2) * draw(size=x.shape).astype(x.dtype)
  params = jax.tree.map(noisy, params)
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  np.savez(path, **{f"{prefix}{k}": np.asarray(x) for k, x in flat.items()}, **others)
  return jax.jit(module.apply)({"params": params}, *given)


def same(got, want):
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    assert got[name].tobytes() == x.tobytes(), name


TOWER = dict(width=WIDTH, num_heads=HEADS, mlp_dim=MLP, act="gelu_tanh", norm_eps=1e-6)
IMAGE = TOWER | dict(depth=3, patch=PATCH, res=RES)
SPEC = dict(
  image=IMAGE | dict(type="vit", class_token=False, pool="map"),
  text=TOWER
  | dict(type="text", depth=2, length=LENGTH, types=0, norm="pre", see_padding=True),
  embed_dim=WIDTH,
  project=("text",),
  scale="log_scale",
)
SPEC["text"]["pool"] = "last"


@pytest.mark.parametrize("scan, project", [(False, True), (True, False)])
def test_two_towers(tmp_path, scan, project):
  image, ids = pictures()
  path = tmp_path / "siglip.npz"
  zimg, ztxt, scale, bias = written(path, TwoTowers(scan, project), image, ids)
  assert formats.find(path) == "big_vision"
  loaded = big_vision.load(path)
  spec = SPEC | (dict(embed_dim=24, project=("image", "text")) if project else {})
  got = test_parity_clip.run(
    spec,
    WORDS,
    itc.Objective(loss="sigmoid"),
    loaded.params,
    image.transpose(0, 3, 1, 2),
    ids,
    np.ones_like(ids, bool),
    gradients=False,
  )
  close(got.zimg, zimg)
  close(got.ztxt, ztxt)
  logits = np.asarray(zimg @ ztxt.T * scale + bias, np.float64)
  signs = 2 * np.eye(len(ids)) - 1
  close(got.loss, np.log1p(np.exp(-signs * logits)).sum() / len(ids))
  big_vision.save(tmp_path / "again.npz", loaded)
  same(reader.load(tmp_path / "again.npz"), reader.load(path))


@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_vision_transformers(tmp_path, pool):
  """The class token has no row in the table; files without the prefix."""
  image, _ = pictures()
  path = tmp_path / "vit.npz"
  want = written(path, Image(pool, 7, scan=pool == "gap"), image, prefix="")
  assert formats.find(path) == "big_vision"
  loaded = big_vision.load(path)
  ours = dict(tok="first", gap="mean", map="map")[pool]
  tower = vit.Encoder(**IMAGE, pool=ours, class_token=pool == "tok")
  params = {"params": loaded.params["model"]["image"]}
  pooled = tower.apply(params, image, method=lambda m, x: m.pooled(m(x)))
  head = loaded.params["classifier"]
  close(pooled @ head["kernel"] + head["bias"], want)
  big_vision.save(tmp_path / "again.npz", loaded)
  same(reader.load(tmp_path / "again.npz"), reader.load(path))
  # Added to the token: the model is the same one, and no longer the same bits.
  if pool == "tok":
    loaded.params["model"]["image"]["posemb"][0] = 0.5
    cls = loaded.params["model"]["image"]["cls"]
    big_vision.save(tmp_path / "moved.npz", loaded)
    got = big_vision.load(tmp_path / "moved.npz").params["model"]["image"]
    np.testing.assert_array_equal(got["cls"], cls + 0.5)


@pytest.mark.parametrize("name", ["hf_siglip", "hf_siglip2"])
def test_the_same_weights_as_transformers(tmp_path, name):
  """By the mapping of transformers' convert_siglip_to_hf.py; NaFlex has a square table
  [G, G, W], and rows of patches."""
  folder = REFERENCE / name
  model, theirs = test_dual.folder_model(folder), hf.read(folder).tensors
  params = hf_dual.load(folder).params
  path = tmp_path / "siglip.npz"
  big_vision.save(path, big_vision.of_model(model, params))
  tensors = reader.load(path)
  image, text = "params/img/Transformer/encoderblock_1/", "params/txt/Encoder_0/"
  width = theirs["vision_model.post_layernorm.weight"].size
  layer, pool = (
    "vision_model.encoder.layers.1.",
    "params/img/MAPHead_0/MlpBlock_0/Dense_1/",
  )
  at = "MultiHeadDotProductAttention_0"
  pairs = {
    f"{image}{at}/query/kernel": f"{layer}self_attn.q_proj.weight",
    f"{image}{at}/out/kernel": f"{layer}self_attn.out_proj.weight",
    f"{image}MlpBlock_0/Dense_0/kernel": f"{layer}mlp.fc1.weight",
    "params/txt/head/kernel": "text_model.head.weight",
    f"{pool}kernel": "vision_model.head.mlp.fc2.weight",
  }
  for ours, other in pairs.items():
    x = tensors[ours]
    x = x.reshape(width, -1) if "query" in ours else x.reshape(-1, x.shape[-1])
    np.testing.assert_array_equal(x.T, theirs[other], ours)
  table = tensors["params/img/pos_embedding"]
  assert table.shape == ((4, 4, width) if name == "hf_siglip2" else (1, 16, width))
  positions = theirs["vision_model.embeddings.position_embedding.weight"]
  np.testing.assert_array_equal(table.reshape(-1, width), positions)
  words = theirs["text_model.embeddings.token_embedding.weight"]
  np.testing.assert_array_equal(tensors["params/txt/Embed_0/embedding"], words)
  norm = theirs["text_model.encoder.layers.0.layer_norm2.bias"]
  np.testing.assert_array_equal(tensors[f"{text}encoderblock_0/LayerNorm_1/bias"], norm)
  assert tensors["params/t"].shape == tensors["params/b"].shape == (1,)
  jax.tree.map(np.testing.assert_array_equal, big_vision.load(path).params, params)


def test_a_model_starts_from_a_file(tmp_path):
  folder, path = REFERENCE / "hf_siglip", tmp_path / "siglip.npz"
  model, params = test_dual.folder_model(folder), hf_dual.load(folder).params
  big_vision.save(path, big_vision.of_model(model, params))
  shapes = test_dual.abstract(params)
  spec = dict(type="big_vision", path=str(path))
  got = initial.load(spec, shapes, model=model)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  # Its image tower alone, for a larger grid.
  table = params["model"]["image"]["posemb"]
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((36, 32), np.float32)
  got = initial.load(spec | dict(into="model/image"), shapes, model=model)
  want = posembed.resize_posembed(table, 6, prefix=0, how="corners")
  np.testing.assert_array_equal(got["model"]["image"]["posemb"], want)
  assert isinstance(got["model"]["log_scale"], jax.ShapeDtypeStruct)
  other = test_dual.folder_model(folder, dict(norm_eps=1e-5), dict(act="gelu"))
  with pytest.raises(ValueError) as error:
    initial.load(spec, shapes, model=other)
  assert "model.image.norm_eps=1e-05, but the checkpoint wants 1e-06" in str(
    error.value
  )
  assert "model.text.act='gelu', but the checkpoint wants 'gelu_tanh'" in str(
    error.value
  )
  told = {"model.image.norm_eps": 1e-5, "model.text.act": "gelu"}
  initial.load(spec | dict(made_with=told), shapes, model=other)
  with pytest.raises(ValueError, match=r"made_with='model.text.cat': the model has no"):
    initial.load(spec | dict(made_with={"model.text.cat": 1}), shapes, model=other)


def test_files_of_a_run_and_of_others(tmp_path):
  """The optimiser's state is left out; what is unknown is listed."""
  image, ids = pictures(1)
  path = tmp_path / "run.npz"
  momentum = {"opt/0/mu/img/head/bias": np.zeros(3), "chrono/accum": np.zeros(2)}
  written(path, TwoTowers(), image, ids, **momentum)
  params = big_vision.load(path).params
  assert params["model"]["text_proj"]["kernel"].shape == (WIDTH, WIDTH)
  written(path, TwoTowers(), image, ids, other=np.zeros(1))
  with pytest.raises(ValueError, match="unknown tensors beside params/: other"):
    big_vision.load(path)
  tensors = {k: x for k, x in reader.load(path).items() if k != "other"}
  tensors["params/img/adapter"] = tensors.pop("params/txt/pos_embedding")
  np.savez(path, **tensors)
  with pytest.raises(ValueError) as error:
    big_vision.load(path)
  assert "unknown tensors (1):\n    img/adapter [1, 9, 40]" in str(error.value)
  assert "missing tensors (1):\n    txt/pos_embedding" in str(error.value)


def test_what_siglip2_has_beside_its_towers_is_left_out():
  """A decoder, a token for hidden patches, heads; what else is odd is listed."""
  folder = REFERENCE / "hf_siglip"
  model, params = test_dual.folder_model(folder), hf_dual.load(folder).params
  more = jax.tree.map(lambda x: x, params)
  more["model"]["decoder"] = dict(word=dict(embedding=np.zeros((3, 2))))
  more["model"]["image"]["mask"] = np.zeros(32)
  more["objectives_lm"] = dict(bias=np.zeros(3))
  for module in (big_vision, hf_dual):
    made = module.of_model(model, more)
    jax.tree.map(np.testing.assert_array_equal, made.params, params)
  more["model"]["image"]["odd"] = np.zeros(32)
  with pytest.raises(ValueError, match=r"has no place for \(1\):\n.*model/image/odd"):
    big_vision.export(big_vision.of_model(model, more).params)


def test_other_models_are_refused():
  folder = REFERENCE / "hf_clip"
  with pytest.raises(ValueError, match="model.text.attention='causal', but the check"):
    big_vision.of_model(test_dual.folder_model(folder), hf_dual.load(folder).params)
  with pytest.raises(ValueError, match="not of big_vision's kind"):
    big_vision.export({"model": {}})
