"""What every encoder and fusion returns."""

import flax.struct
import jax


@flax.struct.dataclass
class Tokens:
  """A batch of token sequences: x [B, L, D]; mask bool [B, L], None = all are real."""

  x: jax.Array
  mask: jax.Array | None = None
