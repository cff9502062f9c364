"""Tables of rules: both ways, bit by bit, and one error for all that is wrong."""

import jax
import ml_dtypes
import numpy as np
import pytest

from vlp_jax.interop import letters
from vlp_jax.interop import rules

WIDTH, HEADS, HEAD_DIM, PATCH, WORDS = 6, 2, 3, 2, 5
SIZES = dict(N=HEADS, p=PATCH, q=PATCH)
QKV = tuple(f"tower/attn/{name}" for name in ("query", "key", "value"))
TABLE = [
  rules.Rule("patch", "tower/patch", "D 3 p q -> (p q 3) D"),
  rules.Rule("layer.{i}.qkv", QKV, "(3 N H) D -> 3 D N H", range(2)),
  rules.Rule("layer.{i}.out", "tower/attn/out", "D (N H) -> N H D", range(2)),
  rules.Rule("layer.{i}.out", "top/out", "D (N H) -> N H D", range(2, 5)),
  rules.Rule("norm", "norm", "D -> D"),
  rules.Rule("cls", "cls", "1 1 D -> D"),
  rules.Rule(("words", "decoder"), "words", "V D -> V D"),
  rules.Rule("temp", "temp", "->"),
  rules.Rule("ptr", "ptr", "1 ->", dtype=("int64", "int32")),
  rules.Constant("ids", lambda sizes: np.arange(sizes["V"])[None]),
  rules.Fill("queue", lambda sizes: np.full(sizes["V"], -1, np.int32)),
]


def theirs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  words = draw(WORDS, WIDTH)
  words[0, 0] = np.nan  # Bits, not values, are compared.
  return {
    "patch": draw(WIDTH, 3, PATCH, PATCH),
    **{f"layer.{i}.qkv": draw(3 * HEADS * HEAD_DIM, WIDTH) for i in range(2)},
    **{f"layer.{i}.out": draw(WIDTH, HEADS * HEAD_DIM) for i in range(5)},
    "norm": draw(WIDTH).astype(ml_dtypes.bfloat16),
    "cls": draw(1, 1, WIDTH),
    "words": words,
    "decoder": words.copy(),
    "temp": draw(),
    "ptr": np.array([4]),
    "ids": np.arange(WORDS)[None],
  }


def load(tensors, **kwargs):
  return rules.from_theirs(tensors, TABLE, sizes=SIZES, **kwargs)


def test_each_leaf_is_what_the_letters_say():
  tensors = theirs()
  tree = load(tensors)
  for y in range(PATCH):
    for x in range(PATCH):
      for c in range(3):
        row = tree["tower"]["patch"][(y * PATCH + x) * 3 + c]
        np.testing.assert_array_equal(row, tensors["patch"][:, c, y, x])
  for k, name in enumerate(("query", "key", "value")):
    leaf = tree["tower"]["attn"][name]
    assert leaf.shape == (2, WIDTH, HEADS, HEAD_DIM)
    for i in range(2):
      part = np.split(tensors[f"layer.{i}.qkv"], 3)[k]
      for n in range(HEADS):
        want = part[n * HEAD_DIM : (n + 1) * HEAD_DIM].T
        np.testing.assert_array_equal(leaf[i, :, n], want)
  x = np.random.default_rng(1).normal(size=(HEADS, HEAD_DIM))
  np.testing.assert_allclose(
    np.einsum("NH,NHD->D", x, tree["top"]["out"][1]),
    tensors["layer.3.out"] @ x.reshape(-1),
  )
  assert tree["cls"].shape == (WIDTH,) and tree["temp"].shape == ()
  assert tree["ptr"].dtype == np.int32 and tree["ptr"] == 4
  assert tree["queue"].tolist() == [-1] * WORDS


def test_round_trip_is_bit_exact():
  tensors = theirs()
  tree = load(tensors)
  del tree["queue"]
  for made in (tree, jax.tree.map(np.asarray, tree)):
    back = rules.to_theirs(made, TABLE, sizes=SIZES)
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
      assert (back[name].shape, back[name].dtype) == (x.shape, x.dtype), name
      assert back[name].tobytes() == x.tobytes(), name
  assert back["words"] is back["decoder"]


def test_one_error_lists_everything():
  tensors = theirs()
  del tensors["norm"], tensors["layer.1.out"]
  tensors["extra"] = np.zeros(3)
  tensors["layer.1.qkv"] = tensors["layer.1.qkv"][:, :4]
  tensors["cls"] = tensors["cls"][0]
  tensors["decoder"] = tensors["decoder"] + 1
  tensors["ids"] = tensors["ids"] + 1
  with pytest.raises(ValueError) as e:
    load(tensors, what="the file x.pth")
  message = str(e.value)
  assert message.startswith("the file x.pth does not fit:")
  for text in (
    "unknown tensors (1):\n    extra [3]",
    "missing tensors (2):",
    "layer.1.out [D (N H)], for tower/attn/out",
    "norm [D], for norm",
    "wrong shapes (2):",
    "layer.1.qkv [18, 4] is not [(3 N H) D]: an axis D of 4 instead of 6",
    "cls [1, 6] is not [1 1 D]: 2 axes instead of 3",
    "words and decoder",
    "constants of another value (1):\n    ids [1, 5]",
  ):
    assert text in message


def test_heads_that_do_not_divide():
  with pytest.raises(ValueError, match="layer.0.qkv .* instead of|not a multiple"):
    rules.from_theirs(theirs(), TABLE, sizes=dict(SIZES, N=5))


def test_layers_of_two_types_are_not_mixed():
  tensors = theirs()
  tensors["layer.1.qkv"] = tensors["layer.1.qkv"].astype(np.float16)
  with pytest.raises(ValueError, match=r"layers of several types.*\n.*layer.{i}.qkv"):
    load(tensors)


def test_one_of_tied_tensors_is_enough():
  tensors = theirs()
  del tensors["words"], tensors["ids"]
  np.testing.assert_array_equal(load(tensors)["words"], tensors["decoder"])
  del tensors["decoder"]
  with pytest.raises(ValueError, match=r"words or decoder \[V D\]"):
    load(tensors)


def test_export_lists_everything():
  tree = load(theirs())
  del tree["norm"]
  tree["mine"] = np.zeros(3)
  tree["cls"] = np.zeros((WIDTH, 1))
  tree["top"]["out"] = tree["top"]["out"][:2]
  with pytest.raises(ValueError) as e:
    rules.to_theirs(tree, TABLE, sizes=SIZES)
  for text in (
    "no place for (1):\n    mine [3]",
    "missing leaves (1):\n    norm",
    "cls [6, 1] is not [D]",
    "top/out [2, 2, 3, 6] is not [N H D]: not of 3 layers",
  ):
    assert text in str(e.value)


def abstract(tree, **other):
  tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
  return tree | other


def test_shapes_and_types_of_a_model():
  tree = load(theirs())
  shapes = abstract(tree, norm=jax.ShapeDtypeStruct((WIDTH,), np.float32))
  got = load(theirs(), shapes=shapes)
  assert got["norm"].dtype == np.float32
  np.testing.assert_array_equal(got["norm"], tree["norm"].astype(np.float32))

  shapes["words"] = jax.ShapeDtypeStruct((WORDS + 1, WIDTH), np.float32)
  shapes["ptr"] = jax.ShapeDtypeStruct((), np.float32)
  shapes["head"] = jax.ShapeDtypeStruct((3,), np.float32)
  del shapes["cls"]
  with pytest.raises(ValueError) as e:
    load(theirs(), shapes=shapes)
  for text in (
    "words: file [5, 6], model [6, 6]",
    "ptr: file int32, model float32",
    "the format does not have (1):\n    head",
    "the model has no place for (1):\n    cls -> cls",
  ):
    assert text in str(e.value)


def test_what_may_be_left_out():
  tree = load(theirs())
  head = jax.ShapeDtypeStruct((3,), np.float32)
  shapes = abstract(tree, head=head)
  del shapes["cls"]
  tensors = theirs()
  del tensors["norm"]
  got = load(tensors, shapes=shapes, skip=["c.s"], fresh=["head", "norm"])
  assert got["head"] is head and got["norm"] is shapes["norm"] and "cls" not in got


def test_fit_changes_a_shape():
  pad = lambda leaf, shape: np.pad(leaf, ((0, shape[0] - len(leaf)), (0, 0)))
  table = [rules.Rule("x", "x", "V D -> V D", fit=pad)]
  shapes = dict(x=jax.ShapeDtypeStruct((4, 2), np.float32))
  tensors = dict(x=np.ones((3, 2), np.float32))
  got = rules.from_theirs(tensors, table, shapes=shapes)["x"]
  assert got.sum(axis=1).tolist() == [2, 2, 2, 0]


def test_letters():
  x = np.arange(24).reshape(2, 3, 4)
  split = letters.rearrange(x, "A B (C E)", "E (B A) C", dict(C=2))
  assert split.shape == (2, 6, 2)
  for a, b, c, e in np.ndindex(2, 3, 2, 2):
    assert split[e, b * 2 + a, c] == x[a, b, c * 2 + e]
  back = letters.rearrange(split, "E (B A) C", "A B (C E)", dict(A=2))
  np.testing.assert_array_equal(back, x)
  # D' has the size of D.
  with pytest.raises(ValueError, match="an axis D' of 3 instead of 2"):
    letters.rearrange(x[..., 0], "D D'", "D' D")
  with pytest.raises(ValueError, match="sizes of C and E are not known"):
    letters.rearrange(x, "A B (C E)", "A B C E")
