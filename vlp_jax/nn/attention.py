"""softmax(Q K^T / sqrt(d)) V: one seam, several backends.

Shape letters: B batch, L query length, S key length, N heads, H head_dim, D width.
"""

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.nn import linear

Backend = Literal["auto", "einsum", "xla", "cudnn"]


@flax.struct.dataclass
class KeyValue:
  """Keys and values [B, S, N, H] made elsewhere, for layers that share them."""

  key: jax.Array
  value: jax.Array


class Attention(nn.Module):
  """Multi-head attention of x to itself or to another sequence.

  With the collection "attention" mutable, the weights [B, N, L, S] are sown as
  "weights"; with a collection "perturbations", its "weights" are added to them, so
  that a gradient with respect to it is the gradient of the attention map.

  Attributes:
    num_heads: of width D / num_heads each.
    backend: "einsum" plain arrays; "xla" and "cudnn" of
      `jax.nn.dot_product_attention`; "auto" einsum where weights are wanted or
      dropped out, else cudnn for 16-bit inputs on a GPU, else xla.
    dropout: of the attention weights (BERT's attention_probs_dropout_prob).
  """

  num_heads: int
  backend: Backend = "auto"
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"
  bias: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array | KeyValue | None = None,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> jax.Array:
    """x [B, L, D], memory [B, S, D'], keys and values of it, or None for x, mask bool
    [B, 1, 1|L, S]."""
    memory = x if memory is None else memory
    width = x.shape[-1]
    if width % self.num_heads:
      raise ValueError(
        f"width {width} is not a multiple of num_heads {self.num_heads}."
      )
    heads = (self.num_heads, width // self.num_heads)
    common = dict(bias=self.bias, init_std=self.init_std, dtype=self.dtype)

    def project(name, inputs, eqn):
      shape = (inputs.shape[-1], *heads)
      layer = linear.Linear(
        eqn, shape, ("embed", "heads", "head_dim"), name=name, **common
      )
      return axes.constrain(layer(inputs), "batch", "length", "act_heads", None)

    query = project("query", x, "BLD,DNH->BLNH")
    if isinstance(memory, KeyValue):
      key, value = memory.key, memory.value
    else:
      key = project("key", memory, "BSD,DNH->BSNH")
      value = project("value", memory, "BSD,DNH->BSNH")
    mixed = self._attend(query, key, value, mask, train)
    out = linear.Linear(
      "BLNH,NHD->BLD",
      (*heads, width),
      ("heads", "head_dim", "embed"),
      name="out",
      **common,
    )(mixed)
    return axes.constrain(out, "batch", "length", "act_embed")

  def _attend(self, query, key, value, mask, train):
    dropped = train and self.dropout > 0
    probed = self.has_variable("perturbations", "weights")
    sown = self.is_mutable_collection("attention") and not self.is_initializing()
    watched = probed or sown
    backend = self.backend
    if backend == "auto":
      half = query.dtype in (jnp.bfloat16, jnp.float16)
      fast = "cudnn" if half and jax.default_backend() == "gpu" else "xla"
      backend = "einsum" if dropped or watched else fast
    if backend != "einsum":
      if dropped:
        raise ValueError(
          f'attention backend "{backend}" cannot drop weights out: set'
          ' dropout_attention to 0, or backend to "einsum" or "auto".'
        )
      return jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation=backend
      )
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum(
      "BLNH,BSNH->BNLS", query * scale, key, preferred_element_type=jnp.float32
    )
    if mask is not None:
      logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if sown:
      self.sow("attention", "weights", weights)
    if probed:
      weights = weights + self.get_variable("perturbations", "weights")
    weights = nn.Dropout(self.dropout)(weights, deterministic=not dropped)
    return jnp.einsum("BNLS,BSNH->BLNH", weights.astype(self.dtype), value)
