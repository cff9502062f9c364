"""Official VLMo checkpoints: into our trees and back, and what is computed with them.

The state dictionaries are random, in the official layout; `Official` is what
vlmo/modules computes with them, in numpy. Tolerance as in test_parity_albef.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_parity_albef import close
from vlp_jax.interop import formats
from vlp_jax.interop import reader
from vlp_jax.interop import vlmo
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import experts
from vlp_jax.ops import distance
from vlp_jax.ops import tree as tree_lib

WIDTH, HEADS, MLP, DEPTH, PAIRS = 24, 3, 40, 3, 1
PATCH, SIDE, LENGTH, WORDS, LONGEST = 8, 2, 5, 50, 12
VOCAB = dataclasses.replace(tiny.VOCAB, size=WORDS)


def linear(prefix, out, into, bias=True):
  return {f"{prefix}.weight": (out, into)} | (
    {f"{prefix}.bias": (out,)} if bias else {}
  )


def norm(prefix):
  return {f"{prefix}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}


def state_dict(kind="base", *, side=SIDE, pairs=PAIRS, heads=("mlm", "itm", "itc")):
  """{name: random tensor} of vlmo_module.py."""
  shapes = {
    "transformer.cls_token": (1, 1, WIDTH),
    "transformer.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
    "transformer.patch_embed.proj.bias": (WIDTH,),
  }
  if kind == "base":
    rows = distance.rows(side, LONGEST)
    shapes["relative_position_bias_table"] = (rows, HEADS * DEPTH)
  else:
    shapes["transformer.pos_embed"] = (1, side**2 + 1, WIDTH)
  for i in range(DEPTH):
    block = f"transformer.blocks.{i}"
    names = ["text", "imag"] + ["vl"] * (i >= DEPTH - pairs)
    shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.proj", WIDTH, WIDTH)
    shapes |= {f"{block}.attn.{n}_bias": (WIDTH,) for n in "qv"}
    shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, bias=False)
    for name in names:
      shapes |= norm(f"{block}.norm2_{name}")
      shapes |= linear(f"{block}.mlp_{name}.fc1", MLP, WIDTH)
      shapes |= linear(f"{block}.mlp_{name}.fc2", WIDTH, MLP)
    if kind == "base":
      shapes |= {f"{block}.gamma_{n}": (WIDTH,) for n in (1, 2)}
  words = "text_embeddings"
  shapes |= norm("transformer.norm") | norm(f"{words}.LayerNorm")
  shapes |= {
    f"{words}.word_embeddings.weight": (WORDS, WIDTH),
    f"{words}.position_embeddings.weight": (LENGTH, WIDTH),
    f"{words}.token_type_embeddings.weight": (2, WIDTH),
    "token_type_embeddings.weight": (2, WIDTH),
  }
  shapes |= linear("pooler.dense", WIDTH, WIDTH)
  if "mlm" in heads:
    shapes |= linear("mlm_score.transform.dense", WIDTH, WIDTH)
    shapes |= norm("mlm_score.transform.LayerNorm")
    shapes |= {"mlm_score.decoder.weight": (WORDS, WIDTH), "mlm_score.bias": (WORDS,)}
  if "itm" in heads:
    shapes |= linear("itm_score.fc", 2, WIDTH)
  if "itc" in heads:
    for name in ("text", "image", "vl_text", "vl_image"):
      shapes |= linear(f"itc_{name}_proj.fc", WIDTH, WIDTH, bias=False)
    shapes |= {"logit_scale": (), "logit_vl_scale": ()}
  rng = np.random.default_rng(0)
  made = {k: np.float32(0.5 * rng.normal(size=s)) for k, s in shapes.items()}
  made[f"{words}.position_ids"] = np.arange(LENGTH)[None]
  return made


def written(path, tensors, key=None):
  reader.save(path, tensors, key=key)
  return path


def model(kind="base", side=SIDE):
  sizes = dict(num_heads=HEADS, mlp_dim=MLP)
  own = dict(separate=False, subln=False, types=2, pool="tanh", pair_depth=PAIRS)
  posemb = "learned"
  if kind == "base":
    own |= dict(distances=(side, LONGEST), layer_scale=0.1)
    posemb = "none"
  places = dict(patch=PATCH, res=PATCH * side, posemb=posemb)
  words = dict(vocab=VOCAB, width=WIDTH, depth=0, length=LENGTH, posemb=posemb)
  return vlm.VLM(
    image=vit.Encoder(WIDTH, 0, HEADS, MLP, **places),
    text=text.Encoder(**words, **sizes),
    fusion=experts.Fusion(WIDTH, WIDTH, depth=DEPTH, norm_eps=1e-6, **sizes, **own),
    embed_dim=WIDTH,
    scale="log_scale",
    project_bias=False,
  )


@dataclasses.dataclass
class Official:
  """vlmo_module.py, one row of a batch; the text comes first there."""

  t: dict

  def norm(self, name, x, eps=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

  def linear(self, name, x):
    return x @ self.t[f"{name}.weight"].T + self.t.get(f"{name}.bias", 0.0)

  def words(self, ids):
    t, base = self.t, "text_embeddings"
    x = t[f"{base}.word_embeddings.weight"][ids]
    x = x + t[f"{base}.token_type_embeddings.weight"][0]
    if "transformer.pos_embed" in t:
      x = x + t[f"{base}.position_embeddings.weight"][: len(ids)]
    x = self.norm(f"{base}.LayerNorm", x, 1e-12)
    return x + t["token_type_embeddings.weight"][0]

  def patches(self, image):
    t = self.t
    cut = image.reshape(SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 2, 4, 1, 3)
    kernel = t["transformer.patch_embed.proj.weight"]
    x = np.einsum("yxcpq,dcpq->yxd", cut, kernel).reshape(-1, WIDTH)
    x = x + t["transformer.patch_embed.proj.bias"]
    x = np.concatenate([t["transformer.cls_token"][0], x])
    if "transformer.pos_embed" in t:
      x = x + t["transformer.pos_embed"][0]
    return x + t["token_type_embeddings.weight"][1]

  def run(self, x, kinds, real, order):
    """kinds: "text" or "imag" of each token. order: of tokens in `distance.index`."""
    table = self.t.get("relative_position_bias_table")
    bias = np.zeros((DEPTH, HEADS, len(x), len(x)))
    if table is not None:
      count = [kinds.count(kind) for kind in ("imag", "text")]
      rows = distance.index(*count, side=SIDE, words=LONGEST)[np.ix_(order, order)]
      # nH x layers, chunked by layer.
      chunks = table[rows].transpose(2, 0, 1)
      bias = chunks.reshape(DEPTH, HEADS, len(x), len(x))
    for i in range(DEPTH):
      block = f"transformer.blocks.{i}"
      y = self.norm(f"{block}.norm1", x)
      q_bias, v_bias = (self.t[f"{block}.attn.{n}_bias"] for n in "qv")
      qkv = self.linear(f"{block}.attn.qkv", y)
      qkv = qkv + np.concatenate([q_bias, np.zeros_like(q_bias), v_bias])
      q, k, v = qkv.reshape(len(x), 3, HEADS, -1).transpose(1, 2, 0, 3)
      logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + bias[i]
      weights = np.where(real, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
      weights = weights / weights.sum(-1, keepdims=True)
      y = (weights @ v).transpose(1, 0, 2).reshape(len(x), -1)
      y = self.linear(f"{block}.attn.proj", y)
      x = x + self.t.get(f"{block}.gamma_1", 1.0) * y
      out = []
      for token, kind in zip(x, kinds, strict=True):
        joint = f"{block}.mlp_vl.fc1.weight" in self.t and len(set(kinds)) == 2
        name = "vl" if joint else kind
        y = self.norm(f"{block}.norm2_{name}", token)
        y = self.linear(f"{block}.mlp_{name}.fc1", y)
        y = np.asarray(jax.nn.gelu(y, approximate=False))
        y = self.linear(f"{block}.mlp_{name}.fc2", y)
        out.append(token + self.t.get(f"{block}.gamma_2", 1.0) * y)
      x = np.array(out)
    return self.norm("transformer.norm", x)


@pytest.mark.parametrize("kind", ["base", "base_plus"])
def test_the_same_outputs(kind, tmp_path):
  tensors = state_dict(kind)
  path = written(tmp_path / "vlmo.safetensors", tensors)
  params = vlmo.load(path, num_heads=HEADS).params["model"]
  rng = np.random.default_rng(1)
  image = rng.normal(size=(2, PATCH * SIDE, PATCH * SIDE, 3)).astype(np.float32)
  ids = rng.integers(0, WORDS, (2, LENGTH))
  real = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)

  @jax.jit
  def run(params):
    def read(self):
      seen, words = self.encode_image(image), self.words(ids, real)
      fused = self.fuse(seen, words)
      text = self.encode_text(jnp.asarray(ids), real)
      return seen.x, text.x, fused, self.embed_image(seen), self.embed_text(text)

    return model(kind).apply({"params": params}, method=read)

  seen, alone, fused, zimg, ztxt = run(params)
  official = Official(tensors)
  for b in range(2):
    words, patches = official.words(ids[b]), official.patches(image[b])
    count = len(patches)
    want = official.run(patches, ["imag"] * count, True, np.arange(count))
    close(seen[b], want)
    close(zimg[b], unit(official.linear("itc_image_proj.fc", want[0])))
    want = official.run(words, ["text"] * LENGTH, real[b], np.arange(LENGTH))
    close(alone[b][real[b]], want[real[b]])
    close(ztxt[b], unit(official.linear("itc_text_proj.fc", want[0])))
    both = np.concatenate([words, patches])
    kinds = ["text"] * LENGTH + ["imag"] * count
    order = np.concatenate([count + np.arange(LENGTH), np.arange(count)])
    seen_b = np.concatenate([real[b], np.ones(count, bool)])
    want = official.run(both, kinds, seen_b, order)
    close(fused.x[b][real[b]], want[:LENGTH][real[b]])
    close(fused.image.x[b], want[LENGTH:])
    close(fused.pooled[b], np.tanh(official.linear("pooler.dense", want[0])))


def unit(x):
  return x / np.linalg.norm(x)


INDICES = {
  "relative_position_index": np.arange(4),
  "text_imag_relative_position_index": np.ones((2, 2), np.float32),
}


@pytest.mark.parametrize("kind", ["base", "base_plus"])
@pytest.mark.parametrize(
  "suffix, key", [(".pt", "module"), (".ckpt", "state_dict"), (".safetensors", None)]
)
def test_round_trip_is_bit_exact(kind, suffix, key, tmp_path):
  tensors = state_dict(kind) | INDICES
  path = written(tmp_path / f"vlmo{suffix}", tensors, key)
  assert formats.find(path, key=key) == "vlmo"
  loaded = vlmo.load(path, num_heads=None if kind == "base" else HEADS, key=key)
  assert {"logit_vl_scale", *INDICES} <= set(loaded.unused)
  again = tmp_path / f"again{suffix}"
  vlmo.save(again, loaded, key=key)
  got = reader.load(again, key=key)
  assert got.keys() == tensors.keys()
  for name, x in tensors.items():
    assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    assert got[name].tobytes() == x.tobytes(), name


def test_trees_hold_their_tensors(tmp_path):
  """Layers are cut in two stacks, the table of distances by layer and head."""
  tensors = state_dict()
  params = vlmo.load(written(tmp_path / "vlmo.safetensors", tensors)).params
  stacks = params["model"]["fusion"]
  table = tensors["relative_position_bias_table"]
  lower, upper = (stacks[name]["blocks"] for name in ("lower", "upper"))
  assert lower["attn"]["distance"].shape == (2, len(table), HEADS)
  np.testing.assert_array_equal(lower["attn"]["distance"][1], table[:, 3:6])
  np.testing.assert_array_equal(upper["attn"]["distance"][0], table[:, 6:])
  want = tensors["transformer.blocks.2.mlp_vl.fc1.weight"].T
  np.testing.assert_array_equal(upper["mlp_pair"]["up"]["kernel"][0], want)
  want = tensors["transformer.blocks.1.mlp_imag.fc2.weight"].T
  np.testing.assert_array_equal(lower["mlp_image"]["down"]["kernel"][1], want)
  want = tensors["transformer.blocks.1.gamma_2"]
  np.testing.assert_array_equal(lower["scale_mlp"][1], want)
  assert not lower["attn"]["key"]["bias"].any()


def test_the_stage_of_texts_has_no_expert_of_pairs(tmp_path):
  tensors = state_dict(pairs=0, heads=("mlm",))
  loaded = vlmo.load(written(tmp_path / "texts.safetensors", tensors))
  assert "upper" not in loaded.params["model"]["fusion"]
  got = vlmo.export(loaded.params) | loaded.unused
  assert got.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_what_does_not_fit_is_told(tmp_path):
  tensors = state_dict()
  tensors["transformer.blocks.1.attn.k_bias"] = np.zeros(WIDTH, np.float32)
  del tensors["transformer.blocks.0.norm2_imag.bias"]
  tensors["transformer.blocks.2.mlp_text.fc2.weight"] = np.zeros((WIDTH, 7), np.float32)
  with pytest.raises(ValueError) as error:
    vlmo.load(written(tmp_path / "odd.safetensors", tensors))
  for line in (
    "unknown tensors (1):\n    transformer.blocks.1.attn.k_bias [24]",
    "missing tensors (1):\n    transformer.blocks.0.norm2_imag.bias",
    "wrong shapes (1):\n    transformer.blocks.2.mlp_text.fc2.weight [24, 7]",
  ):
    assert line in str(error.value)
  with pytest.raises(ValueError, match="not of VLMo's kind"):
    vlmo.export({"model": {}})


def test_a_model_starts_from_a_file(tmp_path):
  """For a larger grid; what our stage of images has beside stays fresh."""
  tensors = state_dict()
  path = written(tmp_path / "vlmo.safetensors", tensors)
  params = vlmo.load(path).params
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  got = vlmo.init(shapes, path=path, words=LONGEST, model=model())
  jax.tree.map(np.testing.assert_array_equal, got, params)
  rows = distance.rows(3, LONGEST)
  for stack, count in (("lower", 2), ("upper", 1)):
    place = shapes["model"]["fusion"][stack]["blocks"]["attn"]
    place["distance"] = jax.ShapeDtypeStruct((count, rows, HEADS), np.float32)
  hidden = jax.ShapeDtypeStruct((WIDTH,), np.float32)
  shapes["model"]["image"]["mask"] = hidden
  got = vlmo.init(shapes, path=path, words=LONGEST)
  assert got["model"]["image"]["mask"] is hidden
  lower = params["model"]["fusion"]["lower"]["blocks"]["attn"]["distance"]
  want = vlmo.resize_distances(lower, rows, words=LONGEST)
  place = got["model"]["fusion"]["lower"]["blocks"]["attn"]["distance"]
  np.testing.assert_array_equal(place, want)
  np.testing.assert_array_equal(want[:, 25:], lower[:, 9:])
  # What was trained here goes back without it.
  own = jax.tree.map(np.array, params)
  own["model"]["image"]["mask"] = np.ones(WIDTH, np.float32)
  made = vlmo.of_model(model(), own)
  assert tree_lib.flatten(made.params).keys() == tree_lib.flatten(params).keys()
  with pytest.raises(ValueError, match="pool='image', but the checkpoint wants 'tanh'"):
    net = model()
    vlmo.of_model(net.clone(fusion=net.fusion.clone(pool="image")), own)


def test_biases_by_distance_for_another_grid():
  """The spline goes through the old ones; distances outside the series are none."""
  rng = np.random.default_rng(0)
  old, new = 5, 8
  table = rng.normal(size=(2, distance.rows(old, 6), 3)).astype(np.float32)
  same = vlmo.resize_distances(table, distance.rows(old, 6), words=6)
  assert same is table
  got = vlmo.resize_distances(table, distance.rows(new, 6), words=6)
  assert got.shape == (2, distance.rows(new, 6), 3) and got.dtype == np.float32
  np.testing.assert_array_equal(got[:, 15**2 :], table[:, 9**2 :])
  # No distance is where it was, and the farthest are where they were.
  before, after = (x[:, : n**2].reshape(2, n, n, 3) for x, n in ((table, 9), (got, 15)))
  middle = lambda x: x[:, x.shape[1] // 2, x.shape[2] // 2]
  np.testing.assert_allclose(middle(after), middle(before), rtol=1e-5)
  np.testing.assert_allclose(after[:, 0, -1], before[:, 0, -1], rtol=1e-3, atol=1e-3)
  constant = np.ones_like(table)
  got = vlmo.resize_distances(constant, distance.rows(new, 6), words=6)
  np.testing.assert_allclose(got, 1.0, rtol=1e-6)
