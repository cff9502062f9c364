"""Visual question answering by writing the answer.

ALBEF (Li 2021, section 4; official models/model_vqa.py): the fused question is what a
text decoder reads, and the answers of a question count by how many people gave them.
Answers are found by ranking a list of candidates.

Shape letters: B questions, A answers of a question, T tokens of an answer, L of the
question, D width, V vocabulary, C candidates, K candidates that are ranked.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import decode
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce
from vlp_jax.ops import schedule


class Objective(nn.Module):
  """Next-token loss of the answers, given question and image; wants `model.decoder`.

  The batch has the question as its text, answer int32 [B, A, T] (cls, tokens, an end),
  answer_mask bool [B, A, T] and answer_weight float32 [B, A], 0 where there are fewer.
  The loss of a question is the sum over its answers of weight times the sum of the
  tokens' losses.

  Attributes:
    vocab, width: of the tokenizer and of the decoder's tokens, handed in by `build`.
    answers, length: A and T.
    distill, distill_ramp: alpha of the teacher's distribution, as in ITC.
    smoothing: share of the target that is spread over the vocabulary (BLIP: 0.1).
    first_twice: in ranking, the first token counts once more (ALBEF; not BLIP).
    act, norm_eps: of the head, as BERT's for masked words.
  """

  vocab: Any
  width: int
  answers: int = 10
  length: int = 8
  distill: float = 0.0
  distill_ramp: schedule.Duration = 0
  smoothing: float = 0.0
  first_twice: bool = True
  act: block.Activation = "gelu"
  norm_eps: float = 1e-12
  init_std: float | None = 0.02

  def setup(self):
    width = self.width
    self.dense = linear.Linear(
      "BLD,DE->BLE", (width, width), ("embed", "proj"), init_std=self.init_std
    )
    self.norm = linear.LayerNorm(self.norm_eps)
    zeros = axes.boxed(nn.initializers.zeros_init(), "vocab")
    self.bias = self.param("bias", zeros, (self.vocab.size,))

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    del res
    return {
      "answer": ((self.answers, self.length), "int32"),
      "answer_mask": ((self.answers, self.length), "bool"),
      "answer_weight": ((self.answers,), "float32"),
    }

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    if self.distill and teacher is None and train:
      raise ValueError(
        "objectives.vqa.distill wants a teacher: set ema_decay, e.g. 0.995."
      )
    ids, mask = batch["answer"], batch["answer_mask"]
    questions, count, length = ids.shape
    ids, mask = ids.reshape(-1, length), mask.reshape(-1, length)
    weight = batch["answer_weight"].reshape(-1)
    logp = self._read(ask.Live(train), model, enc, ids, mask, count)
    hard, right, counted = self._next_words(logp, ids, mask)
    losses = hard
    if self.distill and teacher is not None:
      soft = jnp.exp(self._read(teacher, model, teacher.enc, ids, mask, count))
      distilled = jnp.sum(-jnp.sum(soft * logp, axis=-1) * counted, axis=1)
      alpha = schedule.ramp(enc.step, self.distill, self.distill_ramp)
      losses = (1.0 - alpha) * hard + alpha * distilled
    real = (weight > 0)[:, None] & counted
    total = reduce.Mean.of(losses, weight).total
    return reduce.Mean(total, jnp.float32(questions)), {
      "hard": reduce.Mean(reduce.Mean.of(hard, weight).total, jnp.float32(questions)),
      "accuracy": reduce.Mean.of(right, real),
    }

  def rank(self, model, question, ids, mask, *, most: int):
    """The best answers of a list: the official `rank_answer`.

    The K candidates whose first token is likeliest are scored as a whole.

    Args:
      model: the VLM. question: Tokens [B, L, D], fused.
      ids, mask: int32 [C, T] and bool [C, T], the candidates. most: K.

    Returns:
      (int32 [B, K] candidates, best first; float32 [B, K] their probabilities).
    """
    count = question.x.shape[0]
    call = ask.Live()
    start = jnp.broadcast_to(ids[0, :1], (count, 1))
    first = self._decode(call, model, start, jnp.ones_like(start, bool), question)
    first = jnp.take(first[:, 0], ids[:, 1], axis=1)
    logp_first, chosen = jax.lax.top_k(first, most)
    rows = chosen.reshape(-1)
    told = _repeat(question, most)
    logp = self._decode(call, model, ids[rows], mask[rows], told)
    losses, _, _ = self._next_words(logp[:, :-1], ids[rows], mask[rows])
    score = -losses.reshape(count, most)
    if self.first_twice:
      score = score + logp_first
    probability, order = jax.lax.top_k(jax.nn.softmax(score, axis=1), most)
    return jnp.take_along_axis(chosen, order, axis=1), probability

  def generate(
    self, model: nn.Module, question: Any, settings: decode.Settings
  ) -> jax.Array:
    """Writes an answer to each fused question: int32 [B, settings.max_length].

    `question` is Tokens [B, L, D]. As in BLIP's official code, the padding of the
    question is read here, unlike in training.
    """
    question = question.replace(mask=None)
    told = _repeat(question, settings.beams)
    start = jnp.full((question.x.shape[0], 1), self.vocab.cls, jnp.int32)

    def read_anew(ids, at, kept):
      logp = self._decode(ask.Live(), model, ids, jnp.ones_like(ids, bool), told)
      return jax.lax.dynamic_index_in_dim(logp, at, axis=1, keepdims=False), kept

    if not settings.cache:
      return decode.generate(read_anew, start, settings)

    def read(model, question, ids, at):
      writing = mask_lib.Writing(jnp.asarray(at), settings.max_length)
      real = jnp.ones(ids.shape, bool)
      return model.decode(ids, real, question, attention=writing).x

    writer = ask.writer(model, read)
    _, *kept = writer.begin(question, start, 0)
    given, written = jax.tree.map(lambda x: jnp.repeat(x, settings.beams, axis=1), kept)

    def go_on(ids, at, written):
      word = jax.lax.dynamic_slice_in_dim(ids, at, 1, axis=1)
      x, written = writer.go_on(given, written, told, word, at)
      logits = model.decoded_logits(self.transform(x)) + self.offset()
      return jax.nn.log_softmax(logits[:, 0], axis=-1), written

    return decode.generate(go_on, start, settings, written)

  def _read(self, call, model, enc, ids, mask, count):
    """float32 [B A, T - 1, V]: log probabilities of each next token."""
    question = call(model, "fuse", enc.image, enc.words)
    return self._decode(call, model, ids, mask, _repeat(question, count))[:, :-1]

  def _decode(self, call, model, ids, mask, question):
    """float32 [rows, T, V] log probabilities, by the live modules or the teacher."""
    # What fills up the answers is empty, and must have something to attend to.
    mask = mask | (jnp.arange(mask.shape[1]) == 0)
    x = call(self, "transform", call(model, "decode", ids, mask, question).x)
    logits = call(model, "decoded_logits", x) + call(self, "offset")
    return jax.nn.log_softmax(logits, axis=-1)

  def _next_words(self, logp, ids, mask):
    """(loss [rows], right bool [rows, T - 1], counted bool) of tokens 1 …, by logp."""
    labels, counted = ids[:, 1:], mask[:, 1:]
    losses = -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    if self.smoothing:
      spread = -jnp.mean(logp, axis=-1)
      losses = (1.0 - self.smoothing) * losses + self.smoothing * spread
    right = jnp.argmax(logp, axis=-1) == labels
    return jnp.sum(losses * counted, axis=1), right, counted

  def transform(self, x):
    """[B, T, D] -> [B, T, D]: BERT's dense layer, activation and norm."""
    return self.norm(block.ACTIVATIONS[self.act](self.dense(x)))

  def offset(self):
    """float32 [V], the bias of each word."""
    return self.bias


def _repeat(tokens, count):
  """Tokens of which each row stands `count` times."""
  mask = None if tokens.mask is None else jnp.repeat(tokens.mask, count, axis=0)
  return tokens.replace(x=jnp.repeat(tokens.x, count, axis=0), mask=mask)
