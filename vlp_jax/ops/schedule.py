"""Numbers that change with the step."""

from typing import Annotated

import jax
import jax.numpy as jnp

# A config writes 300, "300 steps", "2 epochs", "1_000_000 examples" or "5%"; `build`
# hands modules the number of steps (`clock.Clock`).
Duration = Annotated[int, "duration"]


def ramp(step: jax.Array, value: float, over: int) -> jax.Array:
  """Grows linearly from 0 at step 0 to `value` at step `over`; `value` if over = 0."""
  if not over:
    return jnp.float32(value)
  return value * jnp.minimum(1.0, step.astype(jnp.float32) / over)


def begun(step: jax.Array, start: int) -> jax.Array:
  """float32 []: 0 before step `start`, then 1."""
  return (step >= start).astype(jnp.float32)
