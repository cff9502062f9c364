"""BEiT v2's tokenizer: what microsoft/unilm's beit2 computes, and its files.

`Official` says the equations of modeling_vqkd.py, modeling_finetune.py and
norm_ema_quantizer.py again, in torch, and has their names. Tolerance as in
test_parity_albef.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_parity_albef import close
from vlp_jax import convert
from vlp_jax.interop import formats
from vlp_jax.interop import reader
from vlp_jax.interop import vqkd
from vlp_jax.models.codebooks import dvae
from vlp_jax.models.codebooks import vqkd as model_lib

WIDTH, HEADS, DEPTH, MLP = 24, 3, 3, 96
PATCH, SIDE, CODES, CODE = 6, 4, 50, 5
SMALL = model_lib.Codebook(
  PATCH * SIDE, PATCH, WIDTH, DEPTH, HEADS, MLP, CODES, CODE
)  # res, patch, width, depth, heads, mlp, codes, width of a code


def linear(prefix, out, into, bias=True):
  return {f"{prefix}.weight": (out, into)} | (
    {f"{prefix}.bias": (out,)} if bias else {}
  )


def vit(prefix, channels, patch, depth):
  """{name: shape} of a VisionTransformer of beit2/modeling_finetune.py."""
  shapes = {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, SIDE**2 + 1, WIDTH),
    "patch_embed.proj.weight": (WIDTH, channels, patch, patch),
    "patch_embed.proj.bias": (WIDTH,),
    "fc_norm.weight": (WIDTH,),
    "fc_norm.bias": (WIDTH,),
  }
  for i in range(depth):
    block = f"blocks.{i}"
    shapes |= {
      f"{block}.norm{n}.{x}": (WIDTH,) for n in "12" for x in ("weight", "bias")
    }
    shapes |= {f"{block}.attn.{n}_bias": (WIDTH,) for n in "qv"}
    shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, bias=False)
    shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
    shapes |= linear(f"{block}.mlp.fc1", MLP, WIDTH)
    shapes |= linear(f"{block}.mlp.fc2", WIDTH, MLP)
  return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tensors():
  """A state dict in the official layout, random."""
  shapes = vit("encoder", 3, PATCH, DEPTH) | vit("decoder", CODE, 1, 1)
  shapes |= linear("encode_task_layer.0", WIDTH, WIDTH)
  shapes |= linear("encode_task_layer.2", CODE, WIDTH)
  shapes |= linear("decode_task_layer.0", WIDTH, WIDTH)
  shapes |= linear("decode_task_layer.2", 7, WIDTH)
  for name in ("weight", "embed_avg"):
    shapes[f"quantize.embedding.{name}"] = (CODES, CODE)
  shapes["quantize.embedding.cluster_size"] = shapes["quantize.cluster_size"] = (CODES,)
  shapes["quantize.embedding.initted"] = (1,)
  rng = np.random.default_rng(0)
  made = {k: np.float32(0.3 * rng.normal(size=s)) for k, s in shapes.items()}
  # So that patches differ enough to have several codes.
  for name, x in made.items():
    if "norm" in name and name.endswith("weight"):
      x += 1.0
  table = made["quantize.embedding.weight"]
  table /= np.linalg.norm(table, axis=1, keepdims=True)
  return made


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
  path = tmp_path_factory.mktemp("vqkd") / "vqkd.pth"
  reader.save(path, tensors, key="model")
  return path


class Official:
  """Codes and what they are looked up by, of images [B, 3, R, R] of 0 … 1."""

  def __init__(self, torch, tensors):
    self.torch = torch
    self.t = {name: torch.tensor(x) for name, x in tensors.items()}

  def linear(self, name, x):
    return self.torch.nn.functional.linear(
      x, self.t[f"{name}.weight"], self.t[f"{name}.bias"]
    )

  def norm(self, name, x):
    weight, bias = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
    return self.torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias, 1e-6)

  def positions(self, side):
    """interpolate_pos_encoding, where the grid is another."""
    table = self.t["encoder.pos_embed"]
    if side == SIDE:
      return table
    grid = table[:, 1:].reshape(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    factor = (side + 0.1) / SIDE
    grid = self.torch.nn.functional.interpolate(
      grid, scale_factor=(factor, factor), mode="bicubic"
    )
    assert grid.shape[-2:] == (side, side)
    grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)
    return self.torch.cat([table[:, :1], grid], dim=1)

  def attention(self, name, x):
    torch, t = self.torch, self.t
    q_bias, v_bias = t[f"{name}.q_bias"], t[f"{name}.v_bias"]
    bias = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
    qkv = torch.nn.functional.linear(x, t[f"{name}.qkv.weight"], bias)
    rows, length, _ = x.shape
    qkv = qkv.reshape(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return self.linear(f"{name}.proj", (weights @ v).transpose(1, 2).reshape(x.shape))

  def features(self, image):
    torch = self.torch
    x = image * 255.0 / 127.5 - 1.0
    kernel = self.t["encoder.patch_embed.proj.weight"]
    bias = self.t["encoder.patch_embed.proj.bias"]
    x = torch.nn.functional.conv2d(x, kernel, bias, stride=PATCH)
    side = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    first = self.t["encoder.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([first, x], dim=1) + self.positions(side)
    for i in range(DEPTH):
      block = f"encoder.blocks.{i}"
      x = x + self.attention(f"{block}.attn", self.norm(f"{block}.norm1", x))
      y = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x))
      x = x + self.linear(f"{block}.mlp.fc2", torch.nn.functional.gelu(y))
    x = self.norm("encoder.fc_norm", x[:, 1:])
    x = torch.tanh(self.linear("encode_task_layer.0", x))
    return self.linear("encode_task_layer.2", x)

  def codes(self, features):
    z = self.torch.nn.functional.normalize(features, dim=-1).reshape(-1, CODE)
    table = self.t["quantize.embedding.weight"]
    distance = z.pow(2).sum(1, keepdim=True) + table.pow(2).sum(1) - 2 * z @ table.T
    return distance.argmin(dim=1).reshape(features.shape[:2])


def images(side, rows=3):
  rng = np.random.default_rng(1)
  return rng.uniform(size=(rows, side, side, 3)).astype(np.float32)


def shapes_of(made):
  """Of a model that has it, and something else."""
  image = jnp.zeros((1, made.res, made.res, 3))
  boxed = jax.eval_shape(made.init, jax.random.key(0), image)["params"]
  other = jax.ShapeDtypeStruct((3,), np.float32)
  return {"model": {"codebook": nn.unbox(boxed), "other": other}}


def run(params, image, made=SMALL):
  """(features, codes)."""
  variables = {"params": params["model"]["codebook"]}

  @jax.jit
  def both(variables):
    features = made.apply(variables, made.small(image), method="features")
    return features, made.apply(variables, image)

  return both(variables)


def official(tensors, image):
  torch = pytest.importorskip("torch")
  made = Official(torch, tensors)
  features = made.features(torch.tensor(image.transpose(0, 3, 1, 2)))
  return features.numpy(), made.codes(features).numpy()


def test_equal_to_the_official_equations(tensors, path):
  image = images(PATCH * SIDE)
  features, codes = run(vqkd.load(path, num_heads=HEADS).params, image)
  want, want_codes = official(tensors, image)
  close(features, want)
  np.testing.assert_array_equal(codes, want_codes)
  assert codes.dtype == jnp.int32 and len(np.unique(codes)) > 10


def test_equal_for_a_larger_grid(tensors, path):
  """As for models with patches of 14: positions are resized as officially."""
  larger = SMALL.clone(res=PATCH * (SIDE + 3))
  got = vqkd.init(shapes_of(larger), path=path)
  assert isinstance(got["model"]["other"], jax.ShapeDtypeStruct)
  image = images(larger.res)
  features, codes = run(got, image, larger)
  want, want_codes = official(tensors, image)
  close(features, want)
  np.testing.assert_array_equal(codes, want_codes)
  assert codes.shape == (3, larger.patches) == (3, (SIDE + 3) ** 2)


def test_starts_a_part_of_a_model(path):
  """The same as `load`, which is told how many heads there are."""
  params = vqkd.load(path, num_heads=HEADS).params
  got = vqkd.init(shapes_of(SMALL), path=path, key="model")
  jax.tree.map(
    np.testing.assert_array_equal, got["model"]["codebook"], params["model"]["codebook"]
  )
  assert not params["model"]["codebook"]["encoder"]["blocks"]["attn"]["key"][
    "bias"
  ].any()
  with pytest.raises(ValueError, match=r"fc_norm\.weight is of width 24.*num_heads"):
    vqkd.load(path)
  wider = shapes_of(SMALL.clone(codes=CODES + 1))
  with pytest.raises(
    ValueError, match=r"codebook/table: file \[50, 5\], model \[51, 5\]"
  ):
    vqkd.init(wider, path=path)
  other = shapes_of(dvae.Codebook(res=32, hidden=8, codes=CODES))
  with pytest.raises(ValueError, match=r"no VQ-KD tokenizer .*type='vqkd'"):
    vqkd.init(other, path=path)


@pytest.mark.parametrize(
  "suffix, key", [(".pth", "model"), (".ckpt", "state_dict"), (".safetensors", None)]
)
def test_round_trip_is_bit_exact(tensors, suffix, key, tmp_path):
  """With what the official code passes over, too."""
  more = {"teacher_model.visual.proj": np.ones((2, 3), np.float32)}
  more["scaling_layer.shift"] = np.ones((1, 3, 1, 1), np.float32)
  reader.save(tmp_path / f"a{suffix}", tensors | more, key=key)
  assert formats.find(tmp_path / f"a{suffix}") == "vqkd"
  loaded = vqkd.load(tmp_path / f"a{suffix}", num_heads=HEADS)
  mine = {name for name in tensors if name.startswith("enc")}
  mine.add("quantize.embedding.weight")
  assert set(loaded.unused) == (tensors.keys() | more.keys()) - mine
  vqkd.save(tmp_path / f"b{suffix}", loaded, key=key)
  got = reader.load(tmp_path / f"b{suffix}", key=key)
  assert got.keys() == tensors.keys() | more.keys()
  for name, x in (tensors | more).items():
    assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    assert got[name].tobytes() == x.tobytes(), name


def test_converted_there_and_back(tensors, path, tmp_path):
  """Found from the names; what is of training alone is carried along."""
  ours, back = str(tmp_path / "ours"), str(tmp_path / "back.pth")
  heads = f"num_heads={HEADS}"
  convert.main(["--weights", str(path), "--out", ours, "--set", heads])
  to = ["--to", "vqkd", "--out", back, "--set", "key=model"]
  convert.main(["--weights", ours, *to])
  got = reader.load(back, key="model")
  assert got.keys() == tensors.keys()
  for name, x in tensors.items():
    assert got[name].tobytes() == x.tobytes(), name


def test_what_does_not_fit_is_told(tensors, tmp_path):
  odd = dict(tensors)
  odd["encoder.blocks.1.gamma_1"] = np.zeros(WIDTH, np.float32)
  del odd["encoder.blocks.0.norm2.bias"]
  odd["encode_task_layer.2.weight"] = np.zeros((CODE, 7), np.float32)
  reader.save(tmp_path / "odd.pth", odd, key="model")
  with pytest.raises(ValueError) as error:
    vqkd.load(tmp_path / "odd.pth", num_heads=HEADS)
  for line in (
    "unknown tensors (1):\n    encoder.blocks.1.gamma_1 [24]",
    "missing tensors (1):\n    encoder.blocks.0.norm2.bias",
    "wrong shapes (1):\n    encode_task_layer.2.weight [5, 7]",
  ):
    assert line in str(error.value)
  with pytest.raises(ValueError, match="is no VQ-KD tokenizer: it has no tensor enc"):
    reader.save(tmp_path / "none.pth", {"decoder.cls_token": np.zeros((1, 1, 2))})
    vqkd.load(tmp_path / "none.pth", num_heads=HEADS)


def test_who_lacks_the_file_is_told_where_it_is(tmp_path):
  name = "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"
  with pytest.raises(FileNotFoundError, match=rf"releases/download/BEiT-v2/{name}"):
    vqkd.init(shapes_of(SMALL), path=tmp_path / name)
  with pytest.raises(FileNotFoundError, match="no checkpoint file .*other.pth"):
    vqkd.init(shapes_of(SMALL), path=tmp_path / "other.pth")
