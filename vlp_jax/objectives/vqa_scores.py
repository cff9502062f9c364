"""Visual question answering as a choice of answers, each right to a degree.

ViLT and METER (official modules/objectives.py compute_vqa), after BAN: the pooled pair
is classified over the 3,129 frequent answers, against soft scores by how many people
gave them, in as many binary cross-entropies.

Shape letters: B questions, P width of the pooled pair, C answers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import classifier
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Binary cross-entropy, summed over answers, of batch["answer_scores"] f32 [B, C].

  The batch has the question as its text.

  Attributes:
    width: of the fused tokens, handed in by `build`; the head's hidden layer is twice
      as wide.
    answers: C.
  """

  width: int
  answers: int = 3_129

  def setup(self):
    self.head = classifier.Classifier(2 * self.width, self.answers)

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    del res
    return {"answer_scores": ((self.answers,), "float32")}

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    logits = self.logits(model, enc.image, enc.words, train=train)
    scores = batch["answer_scores"].astype(jnp.float32)
    losses = jnp.maximum(logits, 0) - logits * scores
    losses = (losses + jnp.log1p(jnp.exp(-jnp.abs(logits)))).sum(axis=1)
    best = jnp.argmax(logits, axis=1)
    # VQA's accuracy: the score of the answer that is given.
    given = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
    return reduce.Mean.of(losses), {"score": reduce.Mean.of(given)}

  def predict(self, model, image, text) -> jax.Array:
    """float32 [B, C]: logits of image and question Tokens, without dropout."""
    return self.logits(model, image, text)

  def logits(self, model, image, text, *, train=False) -> jax.Array:
    """float32 [B, C] of image and question Tokens."""
    fused = model.fuse(image, text, train=train)
    return self.head(model.pool_pair(fused)).astype(jnp.float32)
