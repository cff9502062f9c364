"""Image-text matching: does this text belong to this image?

ALBEF (Li 2021, section 3.2): one positive pair, and two negatives mined by contrastive
similarity, for each row of the batch; official models/model_pretrain.py. ViLT and METER
replace the image of every second pair at random (vilt/modules/objectives.py
compute_itm_wpa), which is once through the fusion and not thrice.

Shape letters: B batch, L length, S image tokens, D width, C = 2 classes.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.nn import linear
from vlp_jax.objectives import wpa
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce
from vlp_jax.ops import rows as rows_lib


class Objective(nn.Module):
  """Classifies fused pairs as matching (class 1) or not (class 0).

  Attributes:
    width: of the fused tokens, handed in by `build`.
    pooled_width: of what the fusion makes of a pair (`VLM.pool_pair`), handed in by
      `build`; None: as the tokens.
    negatives: "hard" draws from the softmax of contrastive similarity, "random"
      evenly.
    mined_by: whose embeddings a "hard" negative is found by: the teacher's, where there
      is one (ALBEF, BLIP's pretraining), or the live ones (BLIP's retrieval).
    group: negatives come from within runs of so many rows (ALBEF: 64, the batch of
      one of its GPUs); None: from the global batch.
    exclude: "image" never takes a text of the same image for a negative, "pair" only
      leaves out the row itself (ALBEF's pretraining code).
    layout: "triples" keeps each pair, and adds a negative for its text and one for its
      image; "half" keeps half of the pairs, and gives the others a negative image.
    align: weight of word-patch alignment on the same pass (`objectives/wpa.py`); wants
      a fusion that returns the image's tokens too.
    align_special: aligned are all tokens (UNITER), not words and patches alone (ViLT).
  """

  width: int
  pooled_width: int | None = None
  negatives: Literal["hard", "random"] = "hard"
  mined_by: Literal["teacher", "live"] = "teacher"
  group: int | None = None
  exclude: Literal["image", "pair"] = "image"
  layout: Literal["triples", "half"] = "triples"
  align: float = 0.0
  align_special: bool = False

  # How it takes part in accumulation (`training/accumulate.py`): row by row, once its
  # negatives are drawn.
  accumulates = "rows"

  def setup(self):
    width = self.pooled_width or self.width
    self.head = linear.Linear("BD,DC->BC", (width, 2), ("embed", None))

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    drawn = self.draw(model, enc, batch, teacher=teacher, train=train)
    return self.rows(model, enc, batch, drawn, teacher=teacher, train=train)

  def together(self, rows: int) -> int:
    """So many neighbours have to stay in one microbatch of `rows`.

    Raises:
      ValueError: negatives come from further away.
    """
    if self.group is None or rows % self.group:
      raise ValueError(
        f"config: objectives.itm.group={self.group}: negatives are drawn among so many"
        " neighbours (None: the whole batch), who have to be in one microbatch, which"
        f" has {rows} rows: set objectives.itm.group to {rows} or another divisor of"
        " it, or lower accumulate."
      )
    return self.group

  def draw(self, model, enc, batch, *, teacher=None, train=False):
    """What is random, of each row: {name: [B, …]}.

    "image", "text": places, within the row's group, of the image that its text is
    shown with, and of the text of its image. "weight" is how much a row counts.
    """
    del train
    if self.layout == "half":
      image, labels, found = self.replace(model, enc, batch, teacher)
      drawn = dict(image=image, label=labels, found=found)
      weight = found.astype(jnp.float32)
    else:
      image, text, found = self.mine(model, enc, batch, teacher)
      drawn = dict(image=image, text=text, found=found)
      weight = 1.0 + 2.0 * found
    size = self.group or found.shape[0]
    places = {k: v % size for k, v in drawn.items() if k in ("image", "text")}
    return drawn | places | dict(weight=weight)

  def rows(self, model, enc, batch, drawn, *, teacher=None, train=False):
    """Loss and metrics of some rows, whole groups of them, with what was drawn."""
    del batch, teacher
    rows = jnp.arange(drawn["found"].shape[0], dtype=jnp.int32)
    start = rows - rows % (self.group or rows.shape[0])
    image = start + drawn["image"]
    if self.layout == "half":
      images = self.take(_without_keys(enc.image), image)
      labels, found = drawn["label"], drawn["found"]
      return self.match(model, images, enc.words, labels, found, train=train)
    text, found = start + drawn["text"], drawn["found"]
    return self.loss(model, enc, image, text, found, train=train)

  def mine(self, model, enc, batch, teacher):
    """Negatives: (image for each text int32 [B], text for each image, found [B])."""
    ids = batch["image_id"]
    allowed = mask_lib.negatives_allowed(ids, group=self.group, matches=self.exclude)
    t2i = i2t = jnp.zeros(allowed.shape, jnp.float32)
    if self.negatives == "hard":
      # ALBEF and BLIP reuse ITC's similarities: live rows, teacher's columns.
      live = teacher is None or self.mined_by == "live"
      other = enc if live else teacher.enc
      scale = model.inverse_temperature()
      i2t = jax.lax.stop_gradient(scale * enc.zimg @ other.ztxt.T)
      t2i = jax.lax.stop_gradient(scale * enc.ztxt @ other.zimg.T)
    image_key, text_key = jax.random.split(self.make_rng("sample"))
    image_of_text, found = mask_lib.draw_negatives(image_key, t2i, allowed)
    text_of_image, _ = mask_lib.draw_negatives(text_key, i2t, allowed)
    return image_of_text, text_of_image, found

  def replace(self, model, enc, batch, teacher):
    """Half of the images replaced: (image for each text int32 [B], labels, found).

    Exactly B // 2 rows keep theirs, as officially; which is drawn.
    """
    image_of_text, _, found = self.mine(model, enc, batch, teacher)
    rows = jnp.arange(found.shape[0], dtype=jnp.int32)
    keeps = jax.random.permutation(self.make_rng("sample"), rows) < found.shape[0] // 2
    at = jnp.where(keeps, rows, image_of_text)
    return at, keeps.astype(jnp.int32), keeps | found

  def loss(self, model, enc, image_of_text, text_of_image, found, *, train):
    """Cross-entropy over B positives and 2 B negatives, those of a row side by side."""
    labels = jnp.tile(jnp.array([1, 0, 0], jnp.int32), found.shape[0])
    weight = jnp.stack([jnp.ones_like(found), found, found], axis=1).reshape(-1)
    if enc.image.keys is None or self.align:
      pairs = self.pairs(enc, image_of_text, text_of_image)
      return self.match(model, *pairs, labels, weight, train=train)
    logits = self.shared(model, enc, image_of_text, text_of_image, train=train)
    return self.count(logits, labels, weight)

  def match(self, model, images, texts, labels, weight, *, train):
    """Loss and metrics of pairs of Tokens, labels int32 [B], counted by weight [B]."""
    fused = model.fuse(images, texts, train=train)
    logits = self.classify(model, fused)
    if not self.align:
      return self.count(logits, labels, weight)
    distance = wpa.distance(fused, model.fused_image(fused), special=self.align_special)
    signed = jnp.where(labels == 1, distance, -distance)
    return self.count(logits, labels, weight, signed)

  def count(self, logits, labels, weight, signed=None):
    """Loss and metrics of logits [R, 2], and of signed distances [R] of alignment."""
    logp = jax.nn.log_softmax(logits, axis=1)
    losses = -jnp.take_along_axis(logp, labels[:, None], axis=1)[:, 0]
    right = jnp.argmax(logits, axis=1) == labels
    metrics = {"accuracy": reduce.Mean.of(right, weight)}
    if signed is not None:
      losses = losses + self.align * signed
      metrics["wpa"] = reduce.Mean.of(signed, weight)
    return reduce.Mean.of(losses, weight), metrics

  def take(self, tokens, rows):
    """Tokens of which each row has become another one of its group, int32 [B]."""
    split = axes.mesh_axes("batch")
    return rows_lib.take(tokens, rows, group=self.group, axes=split)

  def pairs(self, enc, image_of_text, text_of_image):
    """Tokens of 3 B images and texts: of each row its pair, negative image and text."""
    image, text = _without_keys(enc.image), enc.words
    images = _beside(image, self.take(image, image_of_text), image)
    return images, _beside(text, text, self.take(text, text_of_image))

  def shared(self, model, enc, image_of_text, text_of_image, *, train):
    """float32 [3 B, 2] of `pairs`, of which an image's two texts ask the same keys."""
    image, text = enc.image, enc.words
    both = _beside(self.take(text, text_of_image), text)
    own = self.classify(model, model.fuse(image, both, train=train))
    other_images = self.take(_without_keys(image), image_of_text)
    others = self.classify(model, model.fuse(other_images, text, train=train))
    own = own.reshape(-1, 2, 2)
    return jnp.stack([own[:, 1], others, own[:, 0]], axis=1).reshape(-1, 2)

  def logits(self, model, image, text, *, train=False):
    """float32 [B, 2] of pairs of image and text Tokens."""
    return self.classify(model, model.fuse(image, text, train=train))

  def classify(self, model, fused):
    """float32 [B, 2] of what `model.fuse` returned."""
    return self.head(model.pool_pair(fused)).astype(jnp.float32)

  def score(self, model, image, text):
    """float32 [B]: the logit of "match", by which ALBEF's evaluation ranks."""
    return self.logits(model, image, text)[:, 1]


def _without_keys(image):
  """Image Tokens of which other rows are taken.

  From device to device, keys for all layers would be more to send than to make.
  """
  return image.replace(keys=None)


def _beside(*parts):
  """Rows of each in turn: those of one image, or text, stay on its device."""
  merge = lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:])
  return jax.tree.map(merge, *parts)
