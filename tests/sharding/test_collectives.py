"""The collectives of compiled programs are all accounted for, and a TPU overlaps some of them with computation."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from moe_jax import sharding
from moe_jax.analysis.hlo import parse
from moe_jax.analysis.overlap import exchanges
from moe_jax.sharding.dispatchers import make_dispatcher
from tests.sharding.cases import CAPACITY, E, assignment, collectives, inputs, mesh_of


def _lowered(spec: str, mesh: str, differentiate: bool = False, platform: str = "cpu"):
  """The program of the dispatcher, its arguments laid out as in training."""
  x, cotangent, experts = inputs()
  given = assignment("even")

  def forward(x, combine, experts):
    y, _ = make_dispatcher(spec).dispatch(
      x, given._replace(weight_A=combine), experts, num_experts=E, capacity=CAPACITY, shard=sharding.constrain
    )
    return y

  gradients = lambda x, *args: jax.vjp(forward, x, *args)[1](cotangent)
  on_mesh = mesh_of(mesh)
  layout = lambda *axes: jax.sharding.NamedSharding(on_mesh, sharding.partition_spec(axes))
  by_group = layout("group")
  of_experts = dataclasses.replace(experts, weights=tuple(layout(*axes) for axes in experts.axes))
  layouts = (by_group, by_group, of_experts)
  with jax.set_mesh(on_mesh):
    function = jax.jit(
      gradients if differentiate else forward,
      in_shardings=layouts,
      out_shardings=layouts if differentiate else by_group,
    )
    return function.trace(x, given.weight_A, experts).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
  ("spec", "mesh", "expected"),
  [
    # counts of rows, then rows there and back
    ("dropless", "data=2,expert=4", {"all-gather": 1, "all-to-all": 2}),
    ("dropless:chunks=3", "data=2,expert=4", {"all-gather": 1, "all-to-all": 6}),
    ("all_to_all:capacity=group", "data=2,expert=4", {"all-gather": 1, "all-to-all": 2}),
    # MiniMax's: every group's counts before anything is sent
    ("all_to_all:capacity=global", "data=2,expert=4", {"all-gather": 2, "all-to-all": 2}),
    # tokens, entries, combine weights; sums
    ("all_gather", "data=2,expert=4", {"all-gather": 3, "reduce-scatter": 1}),
    # and three matrices over fsdp, and the sum over the parts of the hidden width
    ("dropless", "fsdp=2,expert=2,tensor=2", {"all-gather": 4, "all-to-all": 2, "all-reduce": 1}),
    ("dropless", "slice=2,fsdp=2,tensor=2", {"all-gather": 3, "all-reduce": 1}),
    ("dropless", "data=2", {}),
  ],
)
def test_collectives_of_the_forward_pass(spec, mesh, expected):
  assert collectives(_lowered(spec, mesh).compile().as_text()) == expected


def test_collectives_of_the_backward_pass():
  found = collectives(_lowered("dropless", "data=2,expert=4", differentiate=True).compile().as_text())
  # Counts once; rows there and back, and their gradients; gradients of the matrices summed over data.
  assert found["all-gather"] == 1 and found["all-to-all"] == 4
  assert 1 <= found["all-reduce"] <= 3
  assert found["reduce-scatter"] == found["collective-permute"] == 0


def test_gradients_of_parameters_kept_in_parts_are_scattered():
  found = collectives(_lowered("dropless", "slice=2,fsdp=2,tensor=2", differentiate=True).compile().as_text())
  assert found["reduce-scatter"] == 3


def test_the_ragged_exchange_is_what_a_tpu_gets():
  for differentiate, count in ((False, 2), (True, 4)):
    text = _lowered("dropless", "expert=2", differentiate, "tpu").as_text()
    assert text.count("@ragged_all_to_all") == count and "all_to_all(" not in text.replace(
      "@ragged_all_to_all", ""
    )
  assert "ragged_all_to_all" not in _lowered("dropless", "expert=2").as_text()


PROGRAM = """
HloModule jit_f, is_scheduled=true

%fused (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %waits = f32[8,8]{1,0} all-to-all(%x), replica_groups={{0,1}}
  %one = (f32[8,8]{1,0}, f32[8,8]{1,0}) ragged-all-to-all-start(%x, %x)
  %kernel = f32[8,8]{1,0} custom-call(%waits), custom_call_target="k", metadata={op_name="f/ragged_dot"}
  %ragged-dot-metadata = s32[8]{0} custom-call(%x), custom_call_target="k", metadata={op_name="f/ragged_dot"}
  %two = (f32[8,8]{1,0}, f32[8,8]{1,0}) ragged-all-to-all-start(%kernel, %x)
  %done.1 = f32[8,8]{1,0} ragged-all-to-all-done(%one)
  %product = f32[8,8]{1,0} fusion(%done.1, %x), kind=kOutput, calls=%fused
  %done.2 = f32[8,8]{1,0} ragged-all-to-all-done(%two)
  %three = (f32[8,8]{1,0}, f32[8,8]{1,0}) ragged-all-to-all-start(%product, %x)
  ROOT %done.3 = f32[8,8]{1,0} ragged-all-to-all-done(%three)
}
"""


def test_products_between_start_and_done_are_found():
  found = [(e.name, e.waits, e.products) for e in exchanges(parse(PROGRAM))]
  assert found == [("waits", True, 0), ("one", False, 1), ("two", False, 1), ("three", False, 0)]


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, pip install libtpu"
)
@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason="the TPU compiler of JAX 0.10 overlaps nothing here"
)
def test_a_tpu_program_computes_while_rows_travel():
  root = pathlib.Path(__file__).resolve().parents[2]
  command = [sys.executable, str(root / "scripts/exchange_overlap.py"), "--forward", "--chunks=1,4"]
  environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  rows = [line.split() for line in done.stdout.splitlines()[2:]]
  (_, whole, _, enclosing, *_), (_, parts, _, overlapped, *_) = rows
  assert (int(whole), int(enclosing)) == (2, 0)  # one exchange there, one back, and nothing else to do
  assert int(parts) == 8 and int(overlapped) >= 3
