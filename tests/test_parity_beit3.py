"""BEiT-3: equal to torchscale's model, and back to its files.

tests/reference/beit3: what torchscale computes; see its README. Tolerance as in
test_parity_albef.py. The layer itself, VLMo's kind too, against slow numpy.
"""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_parity_albef import close
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import beit3
from vlp_jax.interop import formats
from vlp_jax.interop import reader
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import experts
from vlp_jax.nn import block
from vlp_jax.nn import multiway
from vlp_jax.objectives import mdm
from vlp_jax.ops import distance

REFERENCE = pathlib.Path(__file__).parent / "reference" / "beit3"
WEIGHTS = REFERENCE / "weights.safetensors"
SIZES = dict(num_heads=3, mlp_dim=40)
VOCAB = dataclasses.replace(tiny.VOCAB, size=50)


def model(**fusion):
  """The model that the README describes."""
  patches = dict(patch=8, res=32, mask_token=True)
  words = dict(vocab=VOCAB, length=20, types=0, first_position=2, norm="pre")
  return vlm.VLM(
    image=vit.Encoder(24, 0, 3, 40, **patches),
    text=text.Encoder(width=24, depth=0, **SIZES, **words),
    fusion=experts.Fusion(24, 24, depth=3, **SIZES, **fusion),
    embed_dim=None,
  )


def inputs():
  found = dict(np.load(REFERENCE / "inputs.npz"))
  found["image"] = found["image"].transpose(0, 2, 3, 1)
  return {k: jnp.asarray(x) for k, x in found.items()}


@pytest.fixture(scope="module")
def params():
  return beit3.load(WEIGHTS, num_heads=3).params


def test_outputs(params):
  given, want = inputs(), np.load(REFERENCE / "expected.npz")
  real = ~given["padding"]

  @jax.jit
  def run(params):
    def read(self):
      image = self.encode_image(given["image"])
      masked = self.encode_image(given["image"], None, given["hidden"])
      words = self.words(given["ids"], real)
      fused = self.fuse(masked, words)
      return image.x, masked.x, self.encode_text(given["ids"], real).x, fused

    return model().apply({"params": params}, method=read)

  image, masked, words, fused = run(params["model"])
  close(image, want["image"])
  close(masked, want["masked_image"])
  # What stands at padding is read by nobody.
  close(np.where(real[..., None], words, 0), np.where(real[..., None], want["text"], 0))
  pair = np.concatenate([fused.image.x, fused.x], axis=1)
  seen = np.concatenate([np.ones((2, 17), bool), real], axis=1)[..., None]
  close(np.where(seen, pair, 0), np.where(seen, want["pair"], 0))
  np.testing.assert_array_equal(fused.pooled, fused.image.x[:, 0])


def test_heads_are_linear(params):
  """The released files have one matrix each for words and for codes."""
  head = mdm.Objective(VOCAB, 24, codes=30, patches=16)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, 24)), jnp.float32)
  own = {"params": params["objectives_mdm"]}
  read = lambda self: (self.word_logits(x), self.codebook.logits(x))
  words, codes = head.apply(own, method=read)
  theirs = reader.load(WEIGHTS)
  want = x @ theirs["mlm_head.weight"].T + theirs["mlm_head.bias"]
  close(words, want)
  want = x[:, 1:] @ theirs["mim_head.weight"].T + theirs["mim_head.bias"]
  close(codes, want)


def test_round_trip(tmp_path, params):
  assert formats.find(WEIGHTS) == "beit3"
  beit3.save(tmp_path / "back.pth", beit3.Checkpoint(params), key="model")
  before, after = reader.load(WEIGHTS), reader.load(tmp_path / "back.pth", key="model")
  assert before.keys() == after.keys()
  for name, x in before.items():
    assert x.tobytes() == after[name].tobytes(), name


def test_retrieval_layout(tmp_path, params):
  """Heads of BEiT3ForRetrieval in place of those of pretraining."""
  tensors = {k: x for k, x in reader.load(WEIGHTS).items() if "_head" not in k}
  rng = np.random.default_rng(0)
  for name in ("vision_head", "language_head"):
    tensors[f"{name}.weight"] = rng.normal(size=(24, 24)).astype(np.float32)
  tensors["logit_scale"] = np.float32(2.6592)
  reader.save(tmp_path / "itc.safetensors", tensors)
  got = beit3.load(tmp_path / "itc.safetensors", num_heads=3).params
  assert "objectives_mdm" not in got
  close(got["model"]["image_proj"]["kernel"], tensors["vision_head.weight"].T)
  assert float(got["model"]["log_scale"]) == np.float32(2.6592)
  back = beit3.export(got)
  assert back.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(back[name], x, name)


def test_starts_a_model(params):
  own = {k: x for k, x in params.items() if k != "unused"}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
  got = beit3.init(shapes, path=WEIGHTS)
  jax.tree.map(np.testing.assert_array_equal, got, own)
  del shapes["objectives_mdm"]
  with pytest.raises(ValueError, match=r"unknown tensors[\s\S]*mlm_head"):
    beit3.init(shapes, path=WEIGHTS)
  beit3.init(shapes, path=WEIGHTS, skip=(r"m[il]m_head\..*",))
  with pytest.raises(ValueError, match="act='relu', but the checkpoint wants 'gelu'"):
    beit3.init(shapes, path=WEIGHTS, model=model(act="relu"))
  # With a codebook of another file, as configs/beit3.py starts from the released ones.
  table = jax.ShapeDtypeStruct((30, 4), np.float32)
  beside = {"model": own["model"] | {"codebook": {"table": table}}}
  beside["objectives_mdm"] = own["objectives_mdm"]
  with pytest.raises(ValueError, match="does not have.*\n.*model/codebook/table"):
    beit3.init(beside, path=WEIGHTS)
  got = beit3.init(beside, path=WEIGHTS, fresh=("model/codebook/.*",), model=model())
  assert got["model"].pop("codebook") == {"table": table}
  jax.tree.map(np.testing.assert_array_equal, got, own)
  # And what was trained with one goes back without it.
  own["model"]["codebook"] = {"table": np.ones((30, 4), np.float32)}
  made = beit3.of_model(model(), own).params
  assert "codebook" not in made["model"]
  assert beit3.export(made).keys() == reader.load(WEIGHTS).keys()
  del own["model"]["codebook"]
  # What is made here has nothing in the rows that stand for nothing.
  written = beit3.export(own)
  assert not written[beit3.POSITIONS][:2].any()
  with pytest.raises(ValueError, match="not of BEiT-3's kind"):
    beit3.export({"model": {"image": {"posemb": np.zeros((3, 4))}}})


# --- The layer against slow numpy -----------------------------------------------------


def gelu(x):
  return np.asarray(jax.nn.gelu(jnp.asarray(x), approximate=False))


def slow_norm(x, p):
  mean, var = x.mean(), x.var()
  return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def slow_layer(p, streams, mask, *, separate, subln, pair_expert, scale, distances):
  """One row of the batch, token by token; p as the module's parameters."""
  own = lambda base, name: p_at(p, f"{base}_{name}" if separate else base)
  tokens = [(name, x) for name, rows in streams.items() for x in rows]
  normed = [(n, slow_norm(x, own("norm_attn", n))) for n, x in tokens]

  def project(base, n, x):
    q = own(f"attn/{base}", n)
    return np.einsum("d,dnh->nh", x, q["kernel"]) + q["bias"]

  keys = [project("key", n, x) for n, x in normed]
  values = [project("value", n, x) for n, x in normed]
  out = []
  if distances:
    count = [len(streams.get(name, ())) for name in multiway.STREAMS]
    rows = distance.index(*count, side=distances[0], words=distances[1])
    bias = p["attn"]["distance"][rows]
  for at, ((name, x), (_, y)) in enumerate(zip(tokens, normed, strict=True)):
    query = project("query", name, y) / np.sqrt(keys[0].shape[-1])
    mixed = np.zeros_like(query)
    for head in range(len(query)):
      logits = np.array([query[head] @ k[head] for k in keys])
      logits = logits + (bias[at, :, head] if distances else 0.0)
      weights = np.where(mask, np.exp(logits - logits[mask].max()), 0.0)
      weights = weights / weights.sum()
      mixed[head] = sum(w * v[head] for w, v in zip(weights, values, strict=True))
    if subln:
      flat = slow_norm(mixed.reshape(-1), own("attn/norm_inner", name))
      mixed = flat.reshape(mixed.shape)
    last = own("attn/out", name)
    y = np.einsum("nh,nhd->d", mixed, last["kernel"]) + last["bias"]
    x = x + y * (p["scale_attn"] if scale else 1.0)
    expert = "pair" if pair_expert and len(streams) == 2 else name
    y = slow_norm(x, p[f"norm_mlp_{expert}"])
    mlp = p[f"mlp_{expert}"]
    y = gelu(y @ mlp["up"]["kernel"] + mlp["up"]["bias"])
    y = slow_norm(y, mlp["norm"]) if subln else y
    y = y @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    out.append(x + y * (p["scale_mlp"] if scale else 1.0))
  return np.array(out)


def p_at(p, path):
  for name in path.split("/"):
    p = p[name]
  return p


KINDS = {
  "beit3": dict(separate=True, subln=True, pair_expert=False),
  "vlmo_base_plus": dict(separate=False, subln=False, pair_expert=True),
  "vlmo": dict(separate=False, subln=False, pair_expert=True, layer_scale=0.1)
  | dict(distances=(2, 6)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_layer(kind):
  fields = KINDS[kind]
  layer = multiway.Layer(num_heads=2, mlp_dim=12, **fields)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x = {"image": draw(2, 5, 8), "text": draw(2, 4, 8)}
  mask = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
  call = lambda p, x, m: layer.apply(p, x, block.Own(), m, None, None, False)[0]
  # Made from the image alone, it has all experts.
  image = {"image": x["image"]}
  make = lambda key, x: layer.init(key, x, block.Own(), None, None, None, False)
  shapes = jax.eval_shape(make, jax.random.key(0), image)
  params = jax.tree.map(lambda s: draw(*s.shape) * 0.5, nn.unbox(shapes))
  options = {k: v for k, v in fields.items() if k != "layer_scale"}
  options["scale"] = fields.get("layer_scale") is not None
  options.setdefault("distances", None)
  for streams in (x, image, {"text": x["text"]}):
    part = {"image": mask[:, :5], "text": mask[:, 5:]}
    seen = np.concatenate([part[name] for name in streams], axis=1)
    got = call(params, streams, jnp.asarray(seen)[:, None, None])
    got = np.concatenate(list(got.values()), axis=1)
    for b in range(2):
      row = {name: stream[b] for name, stream in streams.items()}
      want = slow_layer(params["params"], row, seen[b], **options)
      close(got[b], want)


def test_backends_agree_on_biases_by_distance():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x = {"image": draw(2, 5, 8), "text": draw(2, 4, 8)}
  mask = jnp.asarray(rng.random((2, 1, 1, 9)) < 0.7)
  net = lambda backend: multiway.Attention(2, False, backend=backend, distances=(2, 6))
  params = nn.unbox(net("xla").init(jax.random.key(0), x))
  params["params"]["distance"] = draw(distance.rows(2, 6), 2)
  want = net("einsum").apply(params, x, mask)
  for backend in ("xla", "auto"):
    got = net(backend).apply(params, x, mask)
    jax.tree.map(close, got, want)
  with pytest.raises(ValueError, match='"cudnn" takes no biases by distance'):
    net("cudnn").apply(params, x, mask)
  with pytest.raises(ValueError, match="an image of 4 tokens"):
    net("xla").apply(params, {"image": draw(2, 4, 8)})


@pytest.mark.parametrize("distances", [None, (4, 12)])
def test_padding_changes_nothing_in_vlmo_whose_last_layers_join_the_pair(distances):
  own = dict(separate=False, subln=False, layer_scale=0.1, distances=distances)
  net = model(pair_depth=1, types=2, pool="tanh", **own)
  given = inputs()
  real = ~given["padding"]

  def read(self, ids):
    image, words = self.encode_image(given["image"]), self.words(ids, real)
    return self.encode_text(ids, real), self.fuse(image, words)

  made = jax.jit(lambda key, ids: net.init(key, ids, method=read))
  params = nn.unbox(made(jax.random.key(0), given["ids"]))
  lower, upper = (params["params"]["fusion"][n]["blocks"] for n in ("lower", "upper"))
  assert upper["mlp_pair"]["up"]["kernel"].shape == (1, 24, 40)
  assert lower["mlp_text"]["up"]["kernel"].shape == (2, 24, 40)
  assert "mlp_pair" not in lower and "mlp_text" in upper
  if distances:
    assert lower["attn"]["distance"].shape == (2, distance.rows(*distances), 3)
    noise = lambda x: jax.random.normal(jax.random.key(1), x.shape)
    lower["attn"]["distance"] = noise(lower["attn"]["distance"])
  run = jax.jit(lambda ids: net.apply(params, ids, method=read))
  want = run(given["ids"])
  got = run(jnp.where(real, given["ids"], 7))
  close(np.where(real[..., None], got[0].x, 0), np.where(real[..., None], want[0].x, 0))
  close(got[1].image.x, want[1].image.x)
  close(got[1].pooled, want[1].pooled)


def test_masked_data_modelling_of_each_kind(params):
  """Codes of images, words of texts, both of pairs, which hide more words."""
  heads = {"mdm": mdm.Objective(VOCAB, 24, codes=30, patches=16, blocks=4)}
  module = pretrainer_lib.Pretrainer(
    model(), heads, {"mdm": 1.0}, kinds={"mdm": "pairs+images+texts"}
  )
  given = inputs()
  rng = np.random.default_rng(0)
  image = dict(image=given["image"], codes=jnp.asarray(rng.integers(0, 30, (2, 16))))
  words = dict(text=jnp.maximum(given["ids"], 5), text_mask=~given["padding"])
  batch = {"images": image, "texts": words, "pairs": image | words}
  own = {k: x for k, x in params.items() if k != "unused"}

  @jax.jit
  def run(key):
    rngs = {"mask": key, "sample": key}
    return module.apply({"params": own}, batch, rngs=rngs)

  loss, parts = run(jax.random.key(0))
  kinds = {"images": ("image",), "texts": ("text",), "pairs": ("image", "text")}
  names = [f"mdm/{kind}/{part}" for kind, both in kinds.items() for part in both]
  assert {n for n in parts if not n.endswith("accuracy")} == {"mdm", *names}
  close(loss.value(), sum(float(parts[name].value()) for name in names))
  assert parts["mdm/images/image"].weight == 2 * round(0.4 * 16)
  draws = [run(jax.random.key(i))[1] for i in range(20)]
  count = lambda name: sum(float(d[name].weight) for d in draws)
  assert 2 * count("mdm/texts/text") < count("mdm/pairs/text")
