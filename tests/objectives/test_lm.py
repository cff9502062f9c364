"""Captioning: its loss against numpy, who sees what, and what is trained by it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text
from vlp_jax.models.fusion import cross_attention
from vlp_jax.models.fusion import interleaved
from vlp_jax.objectives import lm
from vlp_jax.ops import decode

SIZES = dict(num_heads=2, mlp_dim=32, init_std=None)
# A head without parameters.
BARE = dict(transform=False, bias=False)


def module(kind, **fields):
  """A captioner over tiny's ViT: BLIP's stack, or CapPa's decoder."""
  if kind == "blip":
    fusion = interleaved.Fusion(depth=2, image_width=16, **SIZES)
  else:
    fusion = cross_attention.Fusion(depth=2, norm="pre", bias=False, **SIZES)
  words = dict(vocab=tiny.VOCAB, width=16, length=10, types=0)
  norm = "post" if kind == "blip" else "pre"
  model = tiny.model().clone(
    text=text.Encoder(depth=0, norm=norm, **words, **SIZES), fusion=fusion
  )
  objective = lm.Objective(tiny.VOCAB, 16, **fields)
  return pretrainer_lib.Pretrainer(model, dict(lm=objective), dict(lm=1.0))


def logits(self, batch, attention):
  ids, mask = batch["text"], batch["text_mask"]
  image = self.model.encode_image(batch["image"])
  return self.objectives["lm"].logits(self.model, image, ids, mask, attention=attention)


@pytest.fixture(scope="module", params=["blip", "cappa"])
def captioner(request):
  """(kind, module, variables, batch, compiled logits)."""
  made = module(request.param)
  batch = {k: jnp.asarray(v) for k, v in tiny.batch(4).items()}
  variables = tiny.init(made, batch)
  run = jax.jit(lambda v, b: made.apply(v, b, "causal", method=logits))
  return request.param, made, variables, batch, run


def test_what_comes_later_is_not_seen(captioner):
  _, _, variables, batch, run = captioner
  ids = batch["text"]
  other = ids.at[:, 3].set(jnp.where(ids[:, 3] == 20, 21, 20))
  before, after = (run(variables, batch | dict(text=i)) for i in (ids, other))
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  assert (np.abs(before[:, 3] - after[:, 3]).max(axis=-1) > 1e-4).all()


def test_the_image_is_seen(captioner):
  _, _, variables, batch, run = captioner
  turned = run(variables, batch | dict(image=batch["image"][::-1]))
  assert np.abs(run(variables, batch) - turned).max() > 1e-4


def test_loss_is_that_of_numpy():
  rng = np.random.default_rng(0)
  batch = tiny.batch(4)
  ids, mask = batch["text"], batch["text_mask"]
  scores = rng.normal(size=(4, 9, tiny.VOCAB.size))
  objective = lm.Objective(tiny.VOCAB, 16, smoothing=0.1, prompt=3, **BARE)
  objective = objective.bind({})
  counted = objective.counted(jnp.asarray(mask))
  losses, right = objective.losses(
    jnp.asarray(scores, jnp.float32), jnp.asarray(ids[:, 1:])
  )
  logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  want = np.zeros((4, 9))
  for b in range(4):
    for t in range(9):
      target = np.full(tiny.VOCAB.size, 0.1 / tiny.VOCAB.size)
      target[ids[b, t + 1]] += 0.9
      want[b, t] = -(target * logp[b, t]).sum()
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  expected = mask[:, 1:] & (np.arange(1, 10) >= 3)
  np.testing.assert_array_equal(counted, expected)
  np.testing.assert_array_equal(right, scores.argmax(-1) == ids[:, 1:])


@pytest.mark.parametrize(
  ("kind", "pieces", "fields"),
  [("blip", 2, dict(smoothing=0.1)), ("cappa", 50, dict(tied=False))],
)
def test_a_text_scored_in_pieces_has_the_same_numbers(kind, pieces, fields):
  batch = {k: jnp.asarray(v) for k, v in tiny.batch(4).items()}
  variables = tiny.init(module(kind, **fields), batch)

  def loss_and_gradients(count):
    made = module(kind, pieces=count, **fields)
    run = lambda v: tiny.loss(made, v, batch)
    return jax.value_and_grad(run, has_aux=True)(variables)

  (want, told), plain = loss_and_gradients(1)
  (got, said), cut = loss_and_gradients(pieces)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, said, told)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), cut, plain
  )


def test_a_large_vocabulary_is_scored_in_pieces(monkeypatch):
  """SigLIP 2: 128 texts a chip of 63 words to be scored of 256,000."""
  objective = lm.Objective(tiny.VOCAB, 16, **BARE)
  monkeypatch.setattr(lm, "MOST_LOGITS", 4 * 4 * 3 * tiny.VOCAB.size)
  assert objective.bind({})._fewest_pieces((4, 3)) == 1
  assert objective.bind({})._fewest_pieces((4, 4)) == 2
  assert objective.bind({})._fewest_pieces((8, 9)) == 6
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    with nn.logical_axis_rules([("batch", "data")]):
      assert objective.bind({})._fewest_pieces((8, 12)) == 1
      assert objective.bind({})._fewest_pieces((8, 13)) == 2
      assert objective.bind({})._fewest_pieces((2, 9)) == 1  # less than a row each


def test_no_pieces_at_all_is_an_error():
  with pytest.raises(ValueError, match=r"objectives.lm.pieces=0: want 1 or more"):
    lm.Objective(tiny.VOCAB, 16, pieces=0, **BARE).bind({}).counted(
      jnp.ones((1, 3), bool)
    )


def test_a_hidden_text_tells_nothing():
  """In parallel every position is [MASK] and sees all, padding too."""
  objective = lm.Objective(tiny.VOCAB, 16, parallel=0.5, **BARE).bind({})
  ids = jnp.asarray(tiny.batch(2)["text"])[:, :-1]
  hidden, mask, attention = objective.blank(ids, jnp.asarray([True, False]))
  assert (hidden[0] == tiny.VOCAB.mask).all() and (hidden[1] == ids[1]).all()
  assert mask.all() and attention[0].all()
  np.testing.assert_array_equal(attention[1], np.tril(np.ones((9, 9), bool)))


def test_parallel_prediction_in_training_alone(captioner):
  kind, _, variables, batch, _ = captioner
  made = module(kind, parallel=1.0)
  if kind == "blip":
    with pytest.raises(ValueError, match="wanted of the interleaved stack"):
      tiny.loss(made, variables, batch)
    return
  # All texts are hidden, so what they begin with makes no difference.
  other = batch | dict(text=batch["text"].at[:, 0].set(30))
  a, b = (tiny.loss(made, variables, x)[0] for x in (batch, other))
  assert a == b
  plain = module(kind)
  a, b = (plain.apply(variables, x)[0].value() for x in (batch, other))
  assert a != b
  hidden = made.apply(variables, batch)[0].value()
  np.testing.assert_allclose(hidden, plain.apply(variables, batch)[0].value())


def test_the_writer_of_an_interleaved_stack_has_its_own_self_attention(captioner):
  kind, made, variables, batch, _ = captioner
  if kind != "blip":
    return
  loss = lambda p: made.apply({"params": p}, batch)[0].value()
  blocks = jax.jit(jax.grad(loss))(variables["params"])["model"]["fusion"]["blocks"]
  largest = lambda tree: max(np.abs(x).max() for x in jax.tree.leaves(tree))
  assert largest(blocks["attn"]) == largest(blocks["norm_attn"]) == 0
  for name in ("attn_causal", "norm_attn_causal", "cross", "mlp"):
    assert largest(blocks[name]) > 0, name


def test_biases_that_are_not_there(captioner):
  kind, _, variables, _, _ = captioner
  leaves = jax.tree_util.tree_leaves_with_path(variables["params"]["model"]["fusion"])
  names = {path[-1].key for path, _ in leaves if "blocks" in str(path)}
  assert ("bias" in names) == (kind == "blip")


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_kept_changes_no_word(captioner, beams):
  """Behind a start of two ids; the same without keeping keys and values."""
  _, made, variables, batch, _ = captioner
  texts = {}
  for cache in (True, False):
    settings = decode.Settings(
      max_length=9, eos=tiny.VOCAB.sep, pad=0, beams=beams, cache=cache
    )

    def write(self, batch, settings=settings):
      image = self.model.encode_image(batch["image"])
      start = batch["text"][:, :2]
      return self.objectives["lm"].generate(self.model, image, start, settings)

    run = jax.jit(lambda v, b, write=write: made.apply(v, b, method=write))
    texts[cache] = np.asarray(run(variables, batch))
  np.testing.assert_array_equal(texts[True], texts[False])
  assert len(np.unique(texts[True][:, 2:])) > 2


def test_what_cannot_be_is_told():
  batch = tiny.batch(2)
  with pytest.raises(ValueError, match=r"prompt=0: want 1 \(\[CLS\]\) or more"):
    tiny.init(module("blip", prompt=0), batch)
  odd = module("blip")
  odd = odd.clone(model=odd.model.clone(fusion=odd.model.fusion.clone(reads=("left",))))
  with pytest.raises(ValueError, match="want some of 'bidirectional', 'causal'"):
    tiny.init(odd, batch)
