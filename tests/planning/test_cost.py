"""Costs read from the text of compiled programs: small texts, and real programs."""

import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import pytest

from vlp_jax.planning import cost as cost_lib
from vlp_jax.planning import hardware
from vlp_jax.planning import roofline

# A loop of five in the TPU compiler's manner: its length stands in the condition, what
# is on the chip says S(1), and a layer of the stacked weights is sliced in a fusion.
LOOP = (pathlib.Path(__file__).parent / "loop.hlo.txt").read_text("utf-8")


def entry(*lines):
  """A program of these lines."""
  return "ENTRY %main (x: f32[2]) -> f32[2] {\n" + "\n".join(lines) + "\n}\n"


def test_a_loop_counts_as_often_as_it_runs():
  found = cost_lib.of(LOOP, devices=8)
  assert found.flops == {"half": 5 * 2 * 8 * 128 * 256}
  assert found.unknown_loops == ()
  assert found.by_kind() == {
    "all-reduce": dict(count=5, bytes=5 * 8 * 256 * 2, sent=5 * 8 * 256 * 2 * 2 * 3 / 4)
  }


def test_bytes_are_of_main_memory_and_of_what_is_read_of_it():
  found = cost_lib.of(LOOP, devices=8)
  # A turn reads the counter and a layer of the weights, and writes the product, which
  # the message reads; the copies of the counter and into the chip are outside of it.
  turn = 128 * 256 * 2 + 8 * 256 * 2 + 8 * 256 * 2 + 4
  counter = 2 * 4
  assert found.bytes == 5 * turn + 8 * 128 * 2 + counter


def test_a_loop_whose_end_is_not_known_counts_once_and_is_told():
  unknown = LOOP.replace("%end = s32[]{:T(128)} constant(5)", "%end = s32[] iota()")
  found = cost_lib.of(unknown, devices=8)
  assert found.unknown_loops == ("loop",)
  assert found.flops == {"half": 2 * 8 * 128 * 256}


def test_a_loop_whose_length_xla_says():
  said = LOOP.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  )
  assert cost_lib.of(said, devices=8).flops == {"half": 7 * 2 * 8 * 128 * 256}


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("replica_groups={{0,1,2},{3,4,5}}", 3),
    ("replica_groups=[16,4]<=[64]", 4),
    ("replica_groups=[16,4]<=[4,16]T(1,0)", 4),
    ("replica_groups=mesh['a'=8,'b'=2] {'a'}", 8),
    ("replica_groups=mesh['a'=8,'b'=2] {'a','b'}", 16),
    ("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}", 4),
    ("replica_groups={}", 64),
    ("source_target_pairs={{0,1},{1,0}}", 2),
  ],
)
def test_groups_of_collectives(groups, size):
  text = entry(
    "  %x = f32[2]{0} parameter(0)",
    f"  ROOT %y = f32[2]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add",
  )
  (message,) = cost_lib.of(text, devices=64).messages
  assert message.group == size
  assert message.sent == 2 * (size - 1) / size * 8


def test_kinds_of_collectives():
  text = entry(
    "  %x = f32[64]{0} parameter(0)",
    "  %g = (f32[64]{0}, f32[256]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]",
    "  %h = f32[256]{0} all-gather-done(%g)",
    "  %r = f32[64]{0} reduce-scatter(%h), replica_groups=[1,4]<=[4], to_apply=%add",
    "  %p = f32[64]{0} collective-permute(%r), source_target_pairs={{0,1}}",
    "  ROOT %a = f32[64]{0} all-to-all(%p), replica_groups=[1,4]<=[4]",
  )
  assert cost_lib.of(text, devices=4).by_kind() == {
    "all-gather": dict(count=1, bytes=1024, sent=768),
    "all-to-all": dict(count=1, bytes=256, sent=192),
    "collective-permute": dict(count=1, bytes=256, sent=256),
    "reduce-scatter": dict(count=1, bytes=1024, sent=768),
  }


def test_a_collective_spread_over_fusions_counts_once():
  config = 'backend_config={"async_collective_fusion_config":{"flag_start":"1"}}'
  groups = "replica_groups=[1,4]<=[4]"
  parts = [
    f"""%part.{i} (p: f32[8], q: f32[4]) -> (f32[32], f32[4]) {{
  %p.{i} = f32[8]{{0}} parameter(0)
  %q.{i} = f32[4]{{0}} parameter(1)
  %g.{i} = f32[32]{{0}} all-gather(%p.{i}), channel_id=9, {groups}, {config}
  %m.{i} = f32[4]{{0}} negate(%q.{i})
  ROOT %t.{i} = (f32[32]{{0}}, f32[4]{{0}}) tuple(%g.{i}, %m.{i})
}}
"""
    for i in range(3)
  ]
  calls = [
    f"  %f.{i} = (f32[32]{{0}}, f32[4]{{0}}) fusion(%x, %y), calls=%part.{i}"
    for i in range(3)
  ]
  text = "".join(parts) + entry(
    "  %x = f32[8]{0} parameter(0)", "  %y = f32[4]{0} parameter(1)", *calls
  )
  found = cost_lib.of(text, devices=4)
  assert found.by_kind() == {"all-gather": dict(count=1, bytes=128, sent=96)}
  # What rides along with it is no traffic of each fusion.
  assert found.bytes == 3 * (16 + 16)


@pytest.mark.parametrize(
  ("line", "flops"),
  [
    # A batch of 12 products as the TPU compiler writes it: one valid place each.
    (
      "convolution(%x, %w), window={size=12 stride=11 pad=11_11 lhs_dilate=12},"
      " dim_labels=0bf_0oi->0bf",
      {"single": 2 * 12 * 7 * 64 * 5},
    ),
    (
      "convolution(%x, %w), window={size=12 stride=11 pad=11_11 lhs_dilate=12},"
      " dim_labels=0bf_0oi->0bf, operand_precision={highest,highest}",
      {"single_high": 2 * 12 * 7 * 64 * 5},
    ),
    (
      "dot(%x, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0},"
      " rhs_contracting_dims={2}",
      {"single": 2 * 12 * 7 * 64 * 5},
    ),
    (
      'custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config='
      '{"gemm_backend_config":{"dot_dimension_numbers":'
      '{"lhs_contracting_dimensions":["2"]}}}',
      {"single": 2 * 12 * 7 * 64 * 5},
    ),
    ('custom-call(%x, %w), custom_call_target="Mystery"', {}),
    ("add(%x, %w)", {}),
  ],
)
def test_operations_of_products(line, flops):
  text = entry(
    "  %x = f32[12,7,64]{2,1,0} parameter(0)",
    "  %w = f32[12,5,64]{2,1,0} parameter(1)",
    f"  ROOT %y = f32[12,7,5]{{2,1,0}} {line}",
  )
  assert cost_lib.of(text, devices=1).flops == flops


def test_operations_of_a_convolution_with_padding():
  text = entry(
    "  %x = bf16[2,8,3]{2,1,0} parameter(0)",
    "  %w = bf16[3,3,16]{2,1,0} parameter(1)",
    "  ROOT %y = bf16[2,8,16]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1},"
    " dim_labels=b0f_0io->b0f",
  )
  # 8 places of 3 taps, of which the two ends lack one each.
  assert cost_lib.of(text, devices=1).flops == {"half": 2 * 2 * 16 * 3 * 22}


def test_attention_of_cudnn():
  line = (
    'custom-call(%x, %x, %x), custom_call_target="__cudnn$fmha{}", backend_config='
    '{{"cudnn_fmha_backend_config":{{"intermediate_tensor_shape":{{"element_type":"BF16",'
    '"dimensions":["2","4","10","20"]}}}}}}'
  )
  for name, times in (("Softmax", 4), ("SoftmaxBackward", 10)):
    text = entry(
      "  %x = bf16[2,10,4,64]{3,2,1,0} parameter(0)",
      f"  ROOT %y = bf16[2,10,4,64]{{3,2,1,0}} {line.format(name)}",
    )
    assert cost_lib.of(text, devices=1).flops == {"half": times * 2 * 10 * 4 * 64 * 20}


def test_a_slice_in_a_fusion_within_a_fusion():
  slice_ = """%slice (p: f32[5,64], i: s32[]) -> f32[64] {
  %p.1 = f32[5,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,64]{1,0} dynamic-slice(%p.1, %i.1, %z), dynamic_slice_sizes={1,64}
  ROOT %b = f32[64]{0} bitcast(%s)
}
"""
  outer = """%outer (i: s32[], p: f32[5,64]) -> f32[5,64] {
  %i.2 = s32[] parameter(0)
  %p.2 = f32[5,64]{1,0} parameter(1)
  %f = f32[64]{0} fusion(%p.2, %i.2), kind=kLoop, calls=%slice
  %n = f32[64]{0} negate(%f)
  %m = f32[1,64]{1,0} bitcast(%n)
  %z.2 = s32[] constant(0)
  ROOT %u = f32[5,64]{1,0} dynamic-update-slice(%p.2, %m, %i.2, %z.2)
}
"""
  text = (
    slice_
    + outer
    + entry(
      "  %i = s32[] parameter(0)",
      "  %x = f32[5,64]{1,0} parameter(1)",
      "  ROOT %y = f32[5,64]{1,0} fusion(%i, %x), kind=kLoop, calls=%outer",
    )
  )
  # One layer is read, one is written where it was; and the index, which two read.
  moved = 2 * 64 * 4 + 4
  assert cost_lib.of(text, devices=1).bytes == moved
  # JAX 0.11 and later, on a GPU: started, and waited for elsewhere.
  started = "((s32[], f32[5,64]{1,0}), f32[5,64]{1,0}, u32[]) fusion-start(%i, %x)"
  apart = text.replace("ROOT %y = f32[5,64]{1,0} fusion(%i, %x)", f"%y = {started}")
  done = "  ROOT %z = f32[5,64]{1,0} fusion-done(%y)\n}\n"
  assert apart != text
  apart = apart.removesuffix("}\n") + done
  assert cost_lib.of(apart, devices=1).bytes == moved


@pytest.mark.parametrize(
  ("line", "moved"),
  [
    # Into the chip, and back: the main memory's side counts.
    ("(f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%x)", 256),
    ("(f32[64]{0}, f32[64]{0}, u32[]) copy-start(%x)", 516),
    ("((f32[64]{0}), f32[16]{0:S(1)}, s32[]{:S(2)}) slice-start(%x)", 64),
    ("((f32[64]{0}), f32[16]{0}, s32[]{:S(2)}) slice-start(%x)", 128),
    ("f32[64]{0} negate(%x)", 512),
    ("f32[16]{0} slice(%x), slice={[0:16]}", 128),
    ("f32[8,8]{1,0:T(8,128)} reshape(%x)", 256 + 8 * 128 * 4),
    ("f32[64]{0} bitcast(%x)", 0),
  ],
)
def test_bytes_of_one_instruction(line, moved):
  text = entry("  %x = f32[64]{0} parameter(0)", f"  ROOT %y = {line}")
  assert cost_lib.of(text, devices=1).bytes == moved


def test_the_dearest_branch_is_taken():
  branch = """%{0} (x: f32[{1},8]) -> f32[{1},8] {{
  %x.{0} = f32[{1},8]{{1,0}} parameter(0)
  ROOT %d.{0} = f32[{1},8]{{1,0}} dot(%x.{0}, %x.{0}), lhs_contracting_dims={{1}}
}}
"""
  text = (
    branch.format("small", 2)
    + branch.format("large", 8)
    + entry(
      "  %p = s32[] parameter(0)",
      "  %x = f32[8,8]{1,0} parameter(1)",
      "  ROOT %y = f32[8,8]{1,0} conditional(%p, %x, %x),"
      " branch_computations={%small, %large}",
    )
  )
  assert cost_lib.of(text, devices=1).flops == {"single": 2 * 8 * 8 * 8}


def test_no_program():
  with pytest.raises(ValueError, match="has no ENTRY"):
    cost_lib.of("nothing", devices=1)


@pytest.fixture(scope="module")
def data_parallel():
  """The gradient of four scanned layers of 16 x 16, a batch of 32 over 8 devices."""
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:8]
  )

  def loss(w, x):
    y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    return (y**2).sum()

  whole = NamedSharding(mesh, PartitionSpec())
  w = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32, sharding=whole)
  x = jax.ShapeDtypeStruct(
    (32, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
  )
  made = jax.jit(jax.grad(loss), out_shardings=whole).lower(w, x).compile()
  return cost_lib.of(made.as_text(), devices=8)


def test_a_real_program_sends_its_gradients_once(data_parallel):
  assert set(data_parallel.by_kind()) == {"all-reduce"}
  assert data_parallel.by_kind()["all-reduce"]["bytes"] == 4 * 16 * 16 * 4
  assert {message.group for message in data_parallel.messages} == {8}


def test_a_real_program_computes_forward_and_twice_backward(data_parallel):
  rows = 32 // 8
  assert data_parallel.flops == {"single": 3 * 4 * 2 * rows * 16 * 16}
  assert data_parallel.unknown_loops == ()


def test_times():
  chip = hardware.Chip("tpu", {"half": 100.0, "single": 50.0}, 1, 1, 10.0, 5.0, 2.0)
  cost = cost_lib.Cost(
    work=(
      cost_lib.Work(2, {"half": 100.0}, 5.0),  # 1 s of compute, 0.5 of memory
      cost_lib.Work(1, {"single": 50.0}, 30.0),  # 1 s, 3 s
    ),
    messages=(cost_lib.Message("all-reduce", 2, 5.0, 2),),
    unknown_loops=(),
  )
  found = roofline.times(cost, chip)
  assert found == roofline.Times(compute=3.0, memory=4.0, messages=2.0, serial=5.0)
  assert (found.step, found.limit) == (5.0, "memory")
  # Over two nodes, their network is the slower.
  assert roofline.times(cost, chip, nodes=2).messages == 5.0
  assert (found * 2 + found).serial == 15.0
