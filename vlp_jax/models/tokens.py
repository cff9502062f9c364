"""What every encoder and fusion returns."""

import flax.struct
import jax


@flax.struct.dataclass
class Tokens:
  """A batch of token sequences: x [B, L, D]; mask bool [B, L], None = all are real.

  pooled [B, D]: what the encoder has made of the whole beside its tokens (CoCa); None:
  nothing, it is made of the tokens.
  """

  x: jax.Array
  mask: jax.Array | None = None
  pooled: jax.Array | None = None
