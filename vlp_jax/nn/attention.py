"""softmax(Q K^T / sqrt(d)) V: one seam, several backends.

Shape letters: B batch, L query length, S key length, N heads, H head_dim, D width.
"""

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import tiled_attention

Backend = Literal["auto", "einsum", "xla", "tiled", "cudnn"]


@flax.struct.dataclass
class KeyValue:
  """Keys and values [B, S, N, H] made elsewhere, for what shares them.

  The queries may have T times as many rows: row i asks those of row i // T.
  """

  key: jax.Array
  value: jax.Array


@flax.struct.dataclass
class Given:
  """The mask of something that is read whole while a text is written: it stays."""

  mask: jax.Array | None


def fastest(query: jax.Array, key: jax.Array) -> str:
  """cuDNN where the devices have it, tiles of long sequences on one CPU, else XLA.

  query [B, L, N, H], key [B, S, N, H]. cuDNN's flash attention is of 16-bit numbers and
  heads of a multiple of 8, at most 128. For a single query it would have keys and
  values filled up and copied, which is as much as there is to do. Tiles are made one
  after another, which would gather what is spread over devices.
  """
  platform = axes.platform()
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  head_dim = query.shape[-1]
  several = query.shape[1] > 1
  if platform == "gpu" and half and several and head_dim % 8 == 0 and head_dim <= 128:
    return "cudnn"
  alone = platform == "cpu" and axes.alone()
  return "tiled" if alone and tiled_attention.worth(query, key) else "xla"


def chosen(backend: Backend, query: jax.Array, key: jax.Array, *, plain: bool) -> str:
  """What "auto" stands for; plain: weights are neither wanted nor dropped out."""
  if backend != "auto":
    return backend
  return fastest(query, key) if plain else "einsum"


def cudnn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | mask_lib.First | None,
) -> jax.Array:
  """cuDNN's flash attention, of any lengths and with any mask: [B, L, N, H].

  JAX has it train even lengths alone, and with masks that are told for each query:
  where that is not so, the arrays are filled up and the mask is spread.
  """
  length, keys = query.shape[1], key.shape[1]
  odd = [(0, length % 2), (0, keys % 2)]
  real = None
  if isinstance(mask, mask_lib.First):
    real, mask = (length, mask.real), None
  if length % 2 or keys % 2:
    query = jnp.pad(query, ((0, 0), odd[0], (0, 0), (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), odd[1], (0, 0), (0, 0))) for x in (key, value))
    if mask is None and real is None:
      real = (length, keys)
  lengths = {}
  if real is not None:
    names = ("query_seq_lengths", "key_value_seq_lengths")
    full = (jnp.full(query.shape[:1], count, jnp.int32) for count in real)
    lengths = dict(zip(names, full, strict=True))
  if mask is not None:
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
    mask = jnp.pad(mask, ((0, 0), (0, 0), *odd))
  mixed = jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation="cudnn", **lengths
  )
  return mixed[:, :length]


class Attention(nn.Module):
  """Multi-head attention of x to itself or to another sequence.

  With the collection "attention" mutable, the weights [B, N, L, S] are sown as
  "weights"; with a collection "perturbations", its "weights" are added to them, so
  that a gradient with respect to it is the gradient of the attention map.

  Where a text is written (`mask_lib.Writing`), its "keys" and "values" [B, T, N, H] are
  kept in the collection "written", and those of a memory [B, S, N, H], made the first
  time, in "given"; the caller makes them mutable.

  Attributes:
    num_heads: of width D / num_heads each.
    backend: "einsum" plain arrays; "xla" and "cudnn" of
      `jax.nn.dot_product_attention`; "tiled" of `ops.tiled_attention`; "auto" einsum
      where weights are wanted or dropped out, else the `fastest`.
    dropout: of the attention weights (BERT's attention_probs_dropout_prob).
    out_width: of what comes out; None: that of x.
  """

  num_heads: int
  backend: Backend = "auto"
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"
  bias: bool = True
  out_width: int | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array | KeyValue | None = None,
    mask: jax.Array | mask_lib.Writing | Given | None = None,
    *,
    train: bool = False,
  ) -> jax.Array:
    """x [B, L, D], memory [B, S, D'], keys and values of it, or None for x, mask bool
    [B, 1, 1|L, S]. Where a text is written, the mask of the words themselves is
    Writing, that of a memory Given."""
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

    def keys_and_values():
      if isinstance(memory, KeyValue):
        return memory.key, memory.value
      key = project("key", memory, "BSD,DNH->BSNH")
      return key, project("value", memory, "BSD,DNH->BSNH")

    if isinstance(mask, Given):
      key, value = self._given(keys_and_values)
      mask = mask.mask
    elif isinstance(mask, mask_lib.Writing):
      key, value = self._written(keys_and_values(), mask)
      mask = mask.seen(x.shape[1])
    else:
      key, value = keys_and_values()
    # What asks the same keys becomes one text.
    rows = query.shape
    query = query.reshape(key.shape[0], -1, *rows[2:])
    mixed = attend(self, query, key, value, mask, train).reshape(rows)
    out = linear.Linear(
      "BLNH,NHD->BLD",
      (*heads, self.out_width or width),
      ("heads", "head_dim", "embed"),
      name="out",
      **common,
    )(mixed)
    return axes.constrain(out, "batch", "length", "act_embed")

  def _given(self, make):
    """Keys and values of a memory, made once."""
    if not self.has_variable("given", "keys"):
      for name, made in zip(("keys", "values"), make(), strict=True):
        self.put_variable("given", name, made)
    return self.get_variable("given", "keys"), self.get_variable("given", "values")

  def _written(self, new, writing):
    """Keys and values of all places of the text, into which the new ones are put."""
    out = []
    for name, part in zip(("keys", "values"), new, strict=True):
      shape = (part.shape[0], writing.length, *part.shape[2:])
      empty = jnp.zeros(shape, part.dtype)
      kept = self.get_variable("written", name, empty)
      kept = jax.lax.dynamic_update_slice_in_dim(kept, part, writing.at, axis=1)
      self.put_variable("written", name, kept)
      out.append(kept)
    return out


def attend(
  module: nn.Module,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | mask_lib.First | None,
  train: bool,
  bias: jax.Array | None = None,
) -> jax.Array:
  """[B, L, N, H] of query [B, L, N, H], key and value [B, S, N, H].

  bias float32 [1, N, L, S] is added to the logits; "auto" then is einsum or XLA.

  For use in a compact method of `module`, which has the fields backend, dropout and
  dtype of `Attention`.
  """
  dropped = train and module.dropout > 0
  probed = module.has_variable("perturbations", "weights")
  sown = module.is_mutable_collection("attention") and not module.is_initializing()
  watched = probed or sown
  backend = module.backend
  if backend == "auto" and bias is not None and not (dropped or watched):
    backend = "xla"
  backend = chosen(backend, query, key, plain=not (dropped or watched))
  if isinstance(mask, mask_lib.First) and backend != "cudnn":
    mask = mask.seen(key.shape[1])
  if backend != "einsum":
    if dropped:
      raise ValueError(
        f'attention backend "{backend}" cannot drop weights out: set'
        ' dropout_attention to 0, or backend to "einsum" or "auto".'
      )
    if backend in ("cudnn", "tiled"):
      if bias is not None:
        raise ValueError(
          f'attention backend "{backend}" takes no biases by distance: set backend to'
          ' "auto", "xla" or "einsum".'
        )
      own = cudnn if backend == "cudnn" else tiled_attention.attend
      return own(query, key, value, mask)
    return jax.nn.dot_product_attention(
      query, key, value, bias=bias, mask=mask, implementation=backend
    )
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum(
    "BLNH,BSNH->BNLS", query * scale, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1)
  if sown:
    module.sow("attention", "weights", weights)
  if probed:
    weights = weights + module.get_variable("perturbations", "weights")
  weights = dropout_lib.Dropout(module.dropout)(weights, deterministic=not dropped)
  return jnp.einsum("BNLS,BSNH->BLNH", weights.astype(module.dtype), value)
