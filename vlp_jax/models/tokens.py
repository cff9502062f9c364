"""What every encoder and fusion returns."""

import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.nn import attention as attention_lib


@flax.struct.dataclass
class Tokens:
  """A batch of token sequences: x [B, L, D]; mask bool [B, L], None = all are real.

  pooled [B, D]: what the encoder has made of the whole beside its tokens (CoCa); None:
  nothing, it is made of the tokens.
  raw [B, L, D]: the tokens before the encoder's last norm, where it keeps them (FLAVA's
  fusion reads them); None: it does not.
  keys: keys and values [B, L, K, N, H] for all K layers of a fusion that attends to the
  tokens (its `remember`); None: each layer makes its own.
  """

  x: jax.Array
  mask: jax.Array | None = None
  pooled: jax.Array | None = None
  raw: jax.Array | None = None
  keys: attention_lib.KeyValue | None = None

  @property
  def real(self) -> jax.Array:
    """The mask, bool [B, L]: of ones where there is none."""
    return jnp.ones(self.x.shape[:2], bool) if self.mask is None else self.mask


@flax.struct.dataclass
class Fused:
  """What a fusion returns that keeps both streams and makes one vector of a pair.

  x [B, L, D], mask bool [B, L]: the text, which has seen the image. image: Tokens
  [B, S, D], which have seen the text. pooled [B, C]: of the pair.
  """

  x: jax.Array
  mask: jax.Array
  image: Tokens
  pooled: jax.Array
