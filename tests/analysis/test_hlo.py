"""Tests the parser of compiled programs on programs whose collectives and products are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import sharding
from moe_jax.analysis import collectives, flops, hlo
from moe_jax.analysis.ahead_of_time import kernels
from moe_jax.config import MeshConfig

MESH = {"slice": 1, "data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
STEPS = 3


def compiled(body, in_specs, out_specs, *shapes, steps=STEPS):
  """Text of a program that runs `body` on each device `steps` times in a loop."""
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=4))

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  def program(*args):
    return jax.lax.scan(lambda carry, _: (carry, body(*args, carry)), jnp.float32(0), None, length=steps)[1]

  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(program).lower(*args).compile().as_text()


def run_body(kind, axis):
  exchange = {
    "all-gather": lambda x: jax.lax.all_gather(x, axis, tiled=True),
    "all-reduce": lambda x: jax.lax.psum(x, axis),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, axis, tiled=True),
    "all-to-all": lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]),
  }[kind]
  # The carry makes each run depend on the loop, which otherwise is emptied.
  return lambda x, carry: exchange(x + carry + jnp.sin(x))


@pytest.mark.parametrize("axis", ["data", "expert"])
@pytest.mark.parametrize(
  ("kind", "buffer", "sent"),
  [  # of 64 x 8 float32 on each device, times n devices along the axis
    ("all-gather", lambda b, n: b * n, lambda b, n: b * (n - 1)),
    ("all-reduce", lambda b, n: b, lambda b, n: 2 * b * (n - 1) // n),
    ("reduce-scatter", lambda b, n: b, lambda b, n: b * (n - 1) // n),
    ("all-to-all", lambda b, n: b, lambda b, n: b * (n - 1) // n),
    ("collective-permute", lambda b, n: b, lambda b, n: b),
  ],
)
def test_collectives_have_kind_axes_count_and_bytes(kind, axis, buffer, sent):
  text = compiled(run_body(kind, axis), P(), P(), (64, 8))
  own, n = 64 * 8 * 4, MESH[axis]
  rows = collectives.by_kind(collectives.collectives(hlo.parse(text), MESH))
  runs = rows[0]["count"]
  # XLA may take what is the same in every run out of the loop.
  assert runs in (1, STEPS)
  assert rows == [
    {
      "kind": kind,
      "axes": [axis],
      "count": runs,
      "buffer_bytes": runs * buffer(own, n),
      "sent_bytes": runs * sent(own, n),
    }
  ]


GROUPS = """HloModule m, num_partitions=8

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %y = f32[16]{{0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add
}}
"""


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ["expert"]),
    ("replica_groups=[2,4]<=[8]", ["expert"]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ["data"]),
    ("replica_groups=[1,8]<=[8]", ["data", "expert"]),
    ("replica_groups=mesh['data'=2,'expert'=4] {'expert'}", ["expert"]),
    ("replica_groups=mesh['data'=2,'expert'=4] {'data'}", ["data"]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ["data", "expert"]),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", ["data"]),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", ["expert"]),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ["expert"]),
    ("replica_groups=mesh['a'=4,'c'=2], device_ids=(0,4,1,5,2,6,3,7) {'c'}", ["data"]),
    ("replica_groups={}", ["data", "expert"]),
    ("replica_groups={{0,1,2,5},{4,3,6,7}}", ["?"]),
  ],
)
def test_groups_of_devices_are_read_in_every_form(groups, axes):
  program = hlo.parse(GROUPS.format(groups=groups))
  assert collectives.collectives(program, MESH)[0].axes == tuple(axes)


ASYNCHRONOUS = """HloModule m

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[]{:T(128)}, /*index=1*/f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4]{0:T(128)} get-tuple-element(%s), index=1
  %start = (f32[4]{0}, f32[16]{0:T(128)S(1)}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %x)
}

%condition (s.1: (s32[], f32[4])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (x: f32[4], y: f32[8]) -> f32[2] {
  %x.1 = f32[4]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %zero = s32[]{:T(128)} constant(START)
  %state = (s32[], f32[4]{0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[4]{0}) while(%state), condition=%condition, body=%body
  %begin = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%y), calls=%wrapped
  %continue = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%begin), calls=%wrapped
  ROOT %end = f32[2]{0} async-done(%continue), calls=%wrapped
}
"""


@pytest.mark.parametrize(("start", "runs"), [(0, 7), (2, 5), (9, 0)])
def test_pairs_count_once_and_loops_by_their_condition(start, runs):
  program = hlo.parse(ASYNCHRONOUS.replace("START", str(start)))
  assert program.unknown_loops == ()
  found = {one.kind: one for one in collectives.collectives(program, MESH)}
  assert {kind: (one.count, one.buffer_bytes) for kind, one in found.items()} == {
    "all-gather": (runs, 64),
    "reduce-scatter": (1, 32),
  }


def test_a_loop_that_depends_on_data_is_told():
  text = ASYNCHRONOUS.replace("s32[]{:T(128)} constant(7)", "s32[]{:T(128)} parameter(1)")
  program = hlo.parse(text.replace("START", "0"))
  assert program.unknown_loops == ("loop",)


def test_bytes_of_shapes():
  assert (
    hlo.num_bytes("(bf16[2,4]{1,0:T(8,128)(2,1)}, /*index=1*/pred[3], f8e4m3fn[5], u32[]{:S(2)}, s4[6])")
    == 16 + 3 + 5 + 4 + 3
  )


@pytest.mark.parametrize(
  ("window", "shapes", "expected"),
  [
    # a plain product: 4 x 5 rows of 8 with 8 x 6
    ("dim_labels=b0f_0io->b0f", ("f32[4,5,8]", "f32[1,8,6]", "f32[4,5,6]"), 2 * 4 * 5 * 8 * 6),
    # a batch of 3 products, as XLA:TPU writes them: a window of all 3 that meets one of them at each place
    (
      "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
      ("f32[3,5,8]", "f32[3,8,6]", "f32[3,5,6]"),
      2 * 3 * 5 * 8 * 6,
    ),
    # a real convolution: at the edges the window meets padding
    (
      "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
      ("f32[2,7,8]", "f32[3,8,6]", "f32[2,7,6]"),
      2 * 2 * (3 * 7 - 2) * 8 * 6,
    ),
  ],
)
def test_operations_of_convolutions(window, shapes, expected):
  left, right, out = shapes
  text = (
    f"HloModule m\n\nENTRY %main (x: {left}, w: {right}) -> {out} {{\n  %x = {left} parameter(0)\n"
    f'  %w = {right} parameter(1)\n  ROOT %y = {out} convolution(%x, %w), {window}, metadata={{op_name="a"}}\n}}\n'
  )
  assert flops.compiled_flops(hlo.parse(text))[0] == expected


@pytest.mark.parametrize(
  ("right", "out"),
  [
    ("bf16[4,8,6]", "bf16[32,6]"),
    ("bf16[32,6]", "bf16[4,8,6]"),
  ],  # rows by matrix; rows by rows, summed by group
)
def test_operations_of_the_kernel_that_a_ragged_product_becomes(right, out):
  text = (
    f"HloModule m\n\nENTRY %main (s: s32[5], x: bf16[32,8], w: {right}) -> {out} {{\n"
    f"  %s = s32[5] parameter(0)\n  %x = bf16[32,8] parameter(1)\n  %w = {right} parameter(2)\n"
    f'  ROOT %ragged-dot-none = {out} custom-call(%s, %x, %w), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/ragged_dot_general/ragged-dot-none"}\n}\n'
  )
  done, parts = flops.compiled_flops(hlo.parse(text))
  assert done == parts["experts"] == 2 * 32 * 8 * 6


@pytest.mark.parametrize("scan", [True, False])
def test_products_in_a_loop_count_as_often_as_they_run(scan):
  """XLA's own count is right where nothing is in a loop."""
  x, w = jax.ShapeDtypeStruct((32, 48), jnp.float32), jax.ShapeDtypeStruct((5, 48, 48), jnp.float32)

  def looped(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  def unrolled(x, w):
    for i in range(5):
      x = jnp.tanh(x @ w[i])
    return x.sum()

  step = jax.jit(jax.grad(looped if scan else unrolled, (0, 1))).lower(x, w).compile()
  expected = 3 * 5 * 2 * 32 * 48 * 48  # forward and twice as much backward
  assert flops.compiled_flops(hlo.parse(step.as_text()))[0] == expected
  own = step.cost_analysis()["flops"]
  assert own < 0.5 * expected if scan else own == pytest.approx(expected, rel=0.05)


def test_varying_axes_of_any_product_of_axes(rng):
  mesh = {"a": 2, "b": 3, "c": 4}
  ids = np.arange(24).reshape(2, 3, 4)
  for axes in ([0], [1], [2], [0, 2], [1, 2], [0, 1, 2]):
    others = [i for i in range(3) if i not in axes]
    groups = ids.transpose([*others, *axes]).reshape(-1, np.prod([ids.shape[i] for i in axes]))
    groups = rng.permuted(groups, axis=1)
    assert collectives.varying_axes(groups, mesh) == tuple("abc"[i] for i in axes)


SPLASH = """HloModule m

ENTRY %main (p: s8[1,2,2]) -> bf16[2,4,1024,64] {
  %seen = s8[1,2,2]{2,1,0} parameter(0)
  %q = bf16[2,4,1024,64]{3,2,1,0} parameter(1)
  %k = bf16[2,1,1024,64]{3,2,1,0} parameter(2)
  %v = bf16[2,1,1024,32]{3,2,1,0} parameter(3)
  %splash_mha_fwd_residuals.3 = (bf16[2,4,1024,32]{3,2,1,0}, f32[2,4,1024,128]{3,2,1,0}) custom-call(%seen, %q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/splash_of_786432_pairs/vmap(x)/pallas_call"}
  %out = bf16[2,4,1024,32]{3,2,1,0} get-tuple-element(%splash_mha_fwd_residuals.3), index=0
  %splash_mha_dq_no_residuals = bf16[2,4,1024,64]{3,2,1,0} custom-call(%seen, %q, %k, %v, %out), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(splash_of_786432_pairs)/pallas_call"}
  ROOT %splash_mha_dkv_no_residuals.1 = (bf16[2,1,1024,64]{3,2,1,0}, bf16[2,1,1024,32]{3,2,1,0}) custom-call(%seen, %q, %k, %v, %out), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(splash_of_786432_pairs)/pallas_call"}
}
"""


def test_the_products_in_kernels_of_attention():
  """Three of four tiles of 512 x 512: scores and values forward; scores, two of values, two of queries or keys back."""
  program = hlo.parse(SPLASH)
  one = 2 * 2 * 4 * 3 * 512**2  # a product over one column
  forward, of_queries, of_keys = 64 + 32, 64 + 32 + 64, 64 + 32 + 32 + 64
  assert flops.compiled_flops(program)[0] == one * (forward + of_queries + of_keys)
  assert kernels(program) == {"splash_mha_dkv": 1, "splash_mha_dq": 1, "splash_mha_fwd": 1}
