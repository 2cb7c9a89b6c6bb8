"""What compiled programs move between devices is what the simulation counts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.analysis.communication import simulate as com
from moe_jax.analysis.communication.machine import Machine
from moe_jax.config import MeshConfig
from moe_jax.nn import Context, MoE
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.sharding.exchange import Shape, exchange, make_plan, ragged_arguments
from tests.analysis.routed import draw


def all_to_all_bytes(program: str) -> list[int]:
  """Of every all-to-all of a compiled program: the bytes of one device's result, which are those of its operand."""
  found = []
  for result in re.findall(r"= (.*?) all-to-all(?:-start)?\(", program):
    shapes = re.findall(r"(?:f32|s32)\[([\d,]*)\]", result)
    found.append(sum(4 * int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes))
  return found


@pytest.mark.parametrize(("data", "expert"), [(1, 8), (2, 4)])
@pytest.mark.parametrize("dispatcher", ["einsum", "sorted"])
def test_capacity_buffers_move_as_counted(dispatcher, data, expert):
  """Dispatch and combine of the compiled layer, byte for byte, and nothing that the routing could change."""
  batch, length, dim, experts = 16, 32, 24, 8
  moe = {"num_experts": experts, "expert_dim": 40, "dispatcher": dispatcher, "group_size": 16}
  mesh = sharding.make_mesh(MeshConfig(data=data, expert=expert))
  with jax.set_mesh(mesh):
    graphdef, params, rest = nnx.split(MoE(dim, **moe, rngs=nnx.Rngs(0)), nnx.Param, ...)
    layouts = sharding.state_shardings(mesh, params)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    layout = sharding.batch_sharding(mesh)
    forward = lambda params, x_BLD: nnx.merge(graphdef, params, rest)(x_BLD, Context(train=True))[0]
    x = jax.ShapeDtypeStruct((batch, length, dim), jnp.float32)
    jitted = jax.jit(forward, in_shardings=(layouts, layout), out_shardings=layout)
    program = jitted.lower(params, x).compile().as_text()

  groups, capacity = batch * length // 16, expert_capacity(16, 2, 1.25, experts)
  machine = Machine(nodes=2, devices_per_node=4)
  rows = com.capacity_rows(
    machine, groups=groups, num_experts=experts, capacity=capacity, expert_parallelism=expert
  )
  if expert == 4:
    assert rows.network_PP.sum() == 0  # the exchange stays inside replicas, which are nodes here
  # Of what an instruction holds, the device's own part of 1 in `expert` stays.
  moved = [b * 8 * (expert - 1) // expert for b in all_to_all_bytes(program)]
  assert moved == [(rows * (4 * dim)).total] * 2


def test_dropless_rows_move_as_counted(rng):
  """The exchange of the dropless dispatcher: rows that arrive from elsewhere, one by one, and what is asked for them."""
  machine, dim = Machine(nodes=2, devices_per_node=4), 3
  routed = draw(machine, rng, tokens=64, experts=16, k=3)
  target_A, source_A = routed.device_E[routed.expert_A], routed.device_T[routed.token_A]
  counts_PPO = np.zeros((8, 8, 2), np.int32)
  np.add.at(counts_PPO, (source_A, target_A, routed.expert_A % 2), 1)
  here, width = 64 // 8 * 3, int(counts_PPO.sum(axis=2).max())
  rows_MD = np.repeat(1.0 + np.arange(8, dtype=np.float32), here)[:, None] * np.ones((1, dim), np.float32)

  def move(rows_MD, counts_PPO):
    plan = make_plan(counts_PPO, jax.lax.axis_index("expert"))
    _, send_size_X, _, _ = ragged_arguments(plan)
    return exchange(rows_MD, plan, Shape("expert", "padded", here, 8 * width, width)), send_size_X

  mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
  by_device = PartitionSpec("expert")
  moved = jax.shard_map(move, mesh=mesh, in_specs=(by_device, PartitionSpec()), out_specs=by_device)
  compiled = jax.jit(moved).lower(rows_MD, counts_PPO).compile()
  placed = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in
            ((rows_MD, by_device), (counts_PPO, PartitionSpec())))  # fmt: skip
  arrived_MD, send_size_X = map(np.asarray, compiled(*placed))
  sender_PM = arrived_MD[:, 0].reshape(8, -1)
  arrived_PP = (sender_PM[None] == 1.0 + np.arange(8)[:, None, None]).sum(axis=2)
  # What a device with the ragged exchange, such as a TPU, is told to send.
  asked_PP = send_size_X.reshape(8, 8, 2).sum(axis=2)
  for found_PP in (arrived_PP, asked_PP):
    np.fill_diagonal(found_PP, 0)

  traffic = com.dispatch_rows(routed, machine, "expert")
  for found_PP in (arrived_PP, asked_PP):
    np.testing.assert_array_equal(found_PP, traffic.network_PP + traffic.local_PP)
  assert traffic.total == int((source_A != target_A).sum())
  # The padded exchange moves the fullest pair's rows for every pair.
  (held,) = all_to_all_bytes(compiled.as_text())
  padded = com.capacity_rows(machine, groups=8, num_experts=8, capacity=width)
  assert held * 8 * 7 // 8 == (padded * (4 * dim)).total >= traffic.total * 4 * dim
