"""Transformer blocks, scanned over layers.

Shape letters: B batch, L length, S memory length, D width, F mlp.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import pointwise

Norm = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]
# A place in a sequence: of all rows the same, or int32 [B]; None: every place.
Place = int | jax.Array | None

ACTIVATIONS = {
  "gelu": pointwise.gelu,
  "gelu_tanh": pointwise.gelu_tanh,
  "quick_gelu": pointwise.quick_gelu,
  "relu": jax.nn.relu,
  "silu": pointwise.silu,
}

# Collections that have a value for each layer.
LAYERED = ("params", "attention", "perturbations", "written", "given")


def products(primitive, *args, **params):
  """A remat policy: matrix products are kept, those of cuDNN's attention too."""
  fused = primitive.name.startswith("dot_product_attention_fwd")
  return fused or jax.checkpoint_policies.dots_saveable(primitive, *args, **params)


REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": products,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Mlp(nn.Module):
  """Two linear maps with an activation between: D -> F -> D."""

  mlp_dim: int
  act: Activation = "gelu"
  init_std: float | None = 0.02
  dtype: str = "float32"
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    common = dict(bias=self.bias, init_std=self.init_std, dtype=self.dtype)
    act = ACTIVATIONS[self.act]
    up = jax.ShapeDtypeStruct((*x.shape[:-1], self.mlp_dim), self.dtype)
    rows = axes.kernel_rows(up, self.dtype, "act_mlp")
    biased = None
    if rows is not None and self.bias and isinstance(act, pointwise.Activation):
      biased = lambda y, bias: act.biased(y, bias, rows)
    x = linear.Linear(
      "BLD,DF->BLF",
      (width, self.mlp_dim),
      ("embed", "mlp"),
      name="up",
      then=biased,
      **common,
    )(x)
    x = x if biased else act(x)
    x = axes.constrain(x, "batch", "length", "act_mlp")
    return linear.Linear(
      "BLF,FD->BLD", (self.mlp_dim, width), ("mlp", "embed"), name="down", **common
    )(x)


@flax.struct.dataclass
class Own:
  """What a layer of a stack is given for itself alone.

  drop_path float32 []: chance of dropping its branches; None: off.
  memory: keys and values of the memory, where they were made for all layers at once
  (`remember`); None: the layer makes its own.
  """

  drop_path: jax.Array | None = None
  memory: attention_lib.KeyValue | None = None


def pick(x: jax.Array, at: Place) -> jax.Array:
  """x [B, L, …] at one place of each row: [B, 1, …]; None: x."""
  if at is None:
    return x
  if isinstance(at, int):
    return x[:, at : at + 1]
  return jnp.take_along_axis(x, at.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def pick_queries(mask: Any, at: Place, batch: int) -> Any:
  """A mask bool [1|B, 1, L, S] of one query of each row, [B, 1, 1, S].

  What is the same for all queries, or wanted of all, comes as it is.
  """
  if at is None or not isinstance(mask, jax.Array) or mask.shape[2] == 1:
    return mask
  queries = jnp.broadcast_to(mask[:, 0], (batch, *mask.shape[2:]))
  return pick(queries, at)[:, None]


class Block(nn.Module):
  """Self-attention, cross-attention where there is a memory, and an MLP.

  norm="pre" is ViT's x + f(norm(x)); norm="post" is BERT's norm(x + f(x)).

  Attributes:
    mlp_before: where there is a memory, another MLP before the cross-attention
      (open_clip's CoCa, whose decoder is a block without the image and one with it, in
      turn).
    norm_memory: a norm on the memory (the same, `ln_1_kv`).
    bias: of all linear maps and norms within (CapPa's decoder has none).
  """

  num_heads: int
  mlp_dim: int
  norm: Norm = "pre"
  norm_eps: float = 1e-6
  act: Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  mlp_before: bool = False
  norm_memory: bool = False
  bias: bool = True
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, own, mask, memory, memory_mask, train, at=None):
    """x [B, L, D], own Own, mask bool [B, 1, 1|L, L], None or Writing,
    memory [B, S, D'] or None, memory_mask bool [B, 1, 1, S] or None. at: the place that
    alone goes on from the self-attention, as `pick` takes it; None: all."""
    branch = functools.partial(residual, self, drop_path=own.drop_path, train=train)
    attend = functools.partial(attention, self, train=train)
    memory = memory if own.memory is None else own.memory
    x = branch(x, "norm_attn", attend("attn", None, mask, at=at), at=at)
    if memory is not None:
      if self.mlp_before:
        x = branch(x, "norm_before", mlp(self, "mlp_before"))
      if self.norm_memory:
        norm = linear.LayerNorm(
          self.norm_eps, self.dtype, self.bias, name="norm_memory"
        )
        memory = norm(memory)
      seen = mask_of_memory(memory_mask, mask)
      x = branch(x, "norm_cross", attend("cross", memory, seen))
    x = branch(x, "norm_mlp", mlp(self, "mlp"))
    return axes.constrain(x, "batch", "length", "act_embed"), None


def residual(
  module: nn.Module,
  x: jax.Array,
  norm_name: str,
  layer: Callable[[jax.Array], jax.Array],
  *,
  drop_path: jax.Array | None,
  train: bool,
  at: Place = None,
) -> jax.Array:
  """x and what `layer` makes of it, with norm and dropout as the fields of a block say.

  For use in a compact method of `module`, which has the fields of `Block`. at: the
  place that `layer` answers for; None: all.
  """
  norm = linear.LayerNorm(module.norm_eps, module.dtype, module.bias, name=norm_name)
  y = x
  if module.norm == "pre":
    y, x = norm(x, fork=True)
  y, x = layer(y), pick(x, at)
  y = dropout_lib.Dropout(module.dropout)(y, deterministic=not train)
  y = drop_paths(module, y, drop_path, train=train)
  return x + y if module.norm == "pre" else norm(x + y)


def attention(
  module: nn.Module,
  name: str,
  memory: jax.Array | None,
  mask: jax.Array | None,
  *,
  train: bool,
  at: Place = None,
) -> Callable[[jax.Array], jax.Array]:
  """The layer that attends to `memory` (None: to its input), for `residual`.

  at: the place of its input that asks; None: all do.
  """
  layer = attention_lib.Attention(
    module.num_heads,
    module.backend,
    module.dropout_attention,
    module.init_std,
    module.dtype,
    module.bias,
    name=name,
  )

  def attend(y):
    seen = y if memory is None else memory
    return layer(pick(y, at), seen, pick_queries(mask, at, y.shape[0]), train=train)

  return attend


def mask_of_memory(memory_mask: Any, mask: Any) -> Any:
  """What a cross-attention is told: Given where the text is one that is written."""
  if isinstance(mask, mask_lib.Writing):
    return attention_lib.Given(memory_mask)
  return memory_mask


def mlp(module: nn.Module, name: str) -> Mlp:
  """The MLP of a block, for `residual`."""
  fields = (module.mlp_dim, module.act, module.init_std, module.dtype, module.bias)
  return Mlp(*fields, name=name)


def drop_paths(module: nn.Module, y: jax.Array, rate, *, train: bool) -> jax.Array:
  """Stochastic depth: drops the whole branch of an example, and scales the others.

  `rate` is a number, or the float32 scalar that a scanned layer receives; None: off.
  """
  if rate is None or not train:
    return y
  keep = jax.random.bernoulli(
    module.make_rng("dropout"), 1.0 - rate, (y.shape[0], 1, 1)
  )
  return jnp.where(keep, y / (1.0 - rate), 0.0).astype(y.dtype)


def stack(module: nn.Module, layer: type[nn.Module] = Block) -> nn.Module:
  """The scanned blocks of a tower: one layer whose parameters have an axis "layers".

  For use in the tower's `setup`. `layer` is called as `Block` is. Reads the tower's
  fields: those of the layer, and
    depth: number of layers.
    drop_path: chance of dropping the last layer's branches; grows linearly from 0.
    remat: what the backward pass keeps: "none" keeps all, "full" recomputes all,
      "dots" keeps matrix products, "dots_no_batch" those without a batch axis.
    unroll: layers per turn of the scan; more is faster to run, slower to compile.
  """
  return scanned(module, layer, module.depth)(**common_fields(module, layer))


def scanned(module: nn.Module, layer: type[nn.Module], depth: int) -> type[nn.Module]:
  """`layer` over so many layers, as the fields of a tower say (`stack`).

  Traced once: Flax's first of two traces is for what comes out broadcast, and nothing
  does. Twice where parameters are made: keys count traces, and a seed is to keep its
  meaning.
  """
  return nn.scan(
    rematerialised(module, layer),
    variable_axes=dict.fromkeys(LAYERED, 0),
    split_rngs={"params": True, "dropout": True},
    in_axes=(0,) + 4 * (nn.broadcast,),
    length=depth,
    unroll=min(module.unroll, depth),
    metadata_params={nn.PARTITION_NAME: "layers"},
    check_constancy_invariants=module.is_initializing(),
  )


def rematerialised(
  module: nn.Module, layer: type[nn.Module], static: tuple[int, ...] = (6,)
) -> type[nn.Module]:
  """`layer` that keeps for its backward pass what the tower's `remat` says.

  static: arguments of its call that are no arrays; 0 is the layer itself, 6 `train`.
  """
  if module.remat == "none":
    return layer
  policy = REMAT[module.remat]
  return nn.remat(layer, prevent_cse=False, static_argnums=static, policy=policy)


def last_norm(module: nn.Module) -> Callable[[jax.Array], jax.Array]:
  """What ends a stack: a norm where its blocks begin with theirs (norm="pre").

  For use in the tower's `setup`.
  """
  if module.norm != "pre":
    return lambda x: x
  return linear.LayerNorm(module.norm_eps, module.dtype, name="norm")


def drop_rates(module: nn.Module, first: float = 0.0) -> jax.Array | None:
  """float32 [depth], from `first` to `module.drop_path`; None: nothing is dropped."""
  if not module.drop_path:
    return None
  return jnp.linspace(first, module.drop_path, module.depth)


def run(
  module: nn.Module,
  x: jax.Array,
  mask: jax.Array | None = None,
  memory: Any = None,
  memory_mask: Any = None,
  *,
  keys: attention_lib.KeyValue | None = None,
  at: Place = None,
  train: bool = False,
) -> jax.Array:
  """Runs `module.blocks`, made by `stack`, over x [B, L, D].

  memory [B, S, D'] and its mask are as the layer wants them: one, or a tree of arrays.
  keys: those of the memory for all layers, as `remember` makes them.
  at: the place whose token alone is wanted, [B, 1, D]. The last layer then makes no
  other, where `can_pick`.
  """
  x = x.astype(module.dtype)
  length = x.shape[1]
  if memory is None and keys is None and wants_even(module, x, mask, train=train):
    x, mask = even(x, mask)
  memory = jax.tree.map(lambda m: m.astype(module.dtype), memory)
  own = Own(drop_rates(module), jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), keys))
  given = (mask, memory, memory_mask, train)
  if at is not None and can_pick(module, train=train):
    return axes.row_major(_run_to(module, x, own, given, at))
  x, _ = module.blocks(x, own, *given)
  return axes.row_major(pick(x[:, :length], at))


def can_pick(module: nn.Module, *, train: bool) -> bool:
  """Whether the last layer of a tower of `Block` can make one token alone.

  It is a layer by itself then: not where parameters are made, where weights of
  attention are looked at, or where dropout draws for each layer and token. And not
  where layers are scanned: the parameters of the others would be copied for it, which
  takes as long as it saves.
  """
  drops = module.dropout or module.dropout_attention or module.drop_path
  if module.is_initializing() or _watched(module) or (train and drops):
    return False
  unrolled = 1 < module.depth <= module.unroll
  return unrolled and axes.devices_along("length") == 1


def _watched(module):
  """Whether somebody looks at a stack's attention."""
  return module.is_mutable_collection("attention") or module.has_variable(
    "perturbations", "blocks"
  )


def _run_to(module, x, own, given, at):
  """`run` whose last layer makes the token at one place alone."""
  params = nn.unbox(module.blocks.variables["params"])
  fields = common_fields(module, Block) | dict(parent=None)
  lower, last = (
    jax.tree.map(lambda a, part=part: a[part], (params, own))
    for part in (slice(None, -1), -1)
  )
  tower = scanned(module, Block, module.depth - 1)(**fields)
  x, _ = tower.apply({"params": lower[0]}, x, lower[1], *given)
  static = (6, 7) if isinstance(at, int) else (6,)
  top = rematerialised(module, Block, static)(**fields)
  x, _ = top.apply({"params": last[0]}, x, last[1], *given, at)
  return x


def wants_even(module: nn.Module, x: jax.Array, mask: Any, *, train: bool) -> bool:
  """Whether a stack's self-attention of x [B, L, D] is cuDNN's, and L is odd.

  cuDNN's wants even lengths: filled up here, x is copied once, not in every layer.
  """
  plain = mask is None or (isinstance(mask, jax.Array) and mask.ndim == 4)
  dropped = train and module.dropout_attention > 0
  if x.shape[1] % 2 == 0 or not plain or _watched(module) or dropped:
    return False
  if axes.devices_along("length") > 1:
    return False
  shape = (*x.shape[:2], module.num_heads, x.shape[2] // module.num_heads)
  heads = jax.ShapeDtypeStruct(shape, module.dtype)
  return attention_lib.chosen(module.backend, heads, heads, plain=True) == "cudnn"


def even(
  x: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array | mask_lib.First]:
  """x [B, L, D] and mask bool [B, 1, 1|L, L] with a place more, which none sees."""
  length = x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
  if mask is None:
    return x, mask_lib.First(length)
  rows = (0, 0 if mask.shape[2] == 1 else 1)
  return x, jnp.pad(mask, ((0, 0), (0, 0), rows, (0, 1)))


def remember(module: nn.Module, memory: jax.Array) -> attention_lib.KeyValue | None:
  """Keys and values [B, S, K, N, H] of a memory [B, S, D'] for all K layers at once.

  For a stack whose layers attend to it by "cross", without a norm of their own on it:
  what is fused with it several times, then asks for them once. None while parameters
  are made, and where nothing is fused, so that there are none.
  """
  made = module.blocks.variables.get("params")
  if module.is_initializing() or made is None:
    return None
  params = nn.unbox(made["cross"])

  def project(name):
    kernel = params[name]["kernel"].astype(module.dtype)
    made = jnp.einsum("BSD,KDNH->BSKNH", memory.astype(module.dtype), kernel)
    if "bias" in params[name]:
      made = made + params[name]["bias"].astype(module.dtype)
    return axes.constrain(made, "batch", "length", None, "act_heads", None)

  return attention_lib.KeyValue(project("key"), project("value"))


def common_fields(module: nn.Module, cls: type) -> dict[str, Any]:
  """The fields of `cls` that `module` has too: how a tower hands its own down."""
  return {
    name: getattr(module, name)
    for name in cls.__dataclass_fields__
    if name not in ("parent", "name") and name in type(module).__dataclass_fields__
  }
