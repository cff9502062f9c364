"""Where the time goes: of a CPU here; of a GPU or TPU, by what its trace would hold."""

import types

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.bench import profile

LAYERS = 3


# Of the classes in jaxlib that a trace is read by.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_the_kernels_of_a_cpu():
  @jax.jit
  def step(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  args = jnp.ones((256, 256)), jnp.ones((LAYERS, 256, 256))
  jax.block_until_ready(step(*args))
  steps = 2
  found = profile.kernels(
    lambda: jax.block_until_ready([step(*args) for _ in range(steps)]), steps
  )
  names = {each["name"]: each for each in found["kernels"]}
  assert all(name and not name[-1].isdigit() for name in names)
  # A layer has one product, as XLA may name it.
  products = [n for n in names if n.startswith(("dot", "ynn", "onednn"))]
  assert sum(names[n]["count"] for n in products) == LAYERS
  assert names["while"]["count"] == 1
  assert abs(found["busy_ms"] - sum(each["ms"] for each in found["kernels"])) < 1e-6


def test_of_a_device_its_own_lines_alone_count():
  event = lambda name, ns, **stats: types.SimpleNamespace(
    name=name, duration_ns=ns, stats=stats.items()
  )
  line = lambda name, *events: types.SimpleNamespace(name=name, events=events)
  plane = lambda name, *lines: types.SimpleNamespace(name=name, lines=lines)
  host = plane(
    "/host:CPU", line("tf_XLAEigen/1", event("fusion.1", 7, hlo_op="fusion.1"))
  )
  stream = line("Stream #13(Compute)", event("kernel_name", 5, hlo_op="fusion.12"))
  more = line("XLA Modules", event("jit_step", 9))
  first = plane("/device:GPU:0", stream, more)
  second = plane("/device:GPU:1", line("Stream #13", event("kernel_name", 6)))
  data = types.SimpleNamespace(planes=[host, first, second])
  assert list(profile._events(data)) == [("fusion kernel_name", 5)]
  data.planes = [host]
  assert list(profile._events(data)) == [("fusion", 7)]
  data.planes = []
  assert not list(profile._events(data))
