"""Sends each row to the device that holds its expert, and returns the result."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.dispatch.common import Shard, exchanged, no_sharding
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.slots import as_one_group, in_queue_order, make_queues
from moe_jax.ops.experts import Experts, Sorted
from moe_jax.ops.grouped_matmul import BLOCK
from moe_jax.sharding.capacity import Capacity, kept_entries, within_budget
from moe_jax.sharding.devices import on_each_device
from moe_jax.sharding.exchange import Shape, exchange, make_plan
from moe_jax.types import Array, Assignment


class Options(NamedTuple):
  """See `moe_jax.sharding.all_to_all`."""

  capacity: str
  chunks: int
  buffer_factor: float
  exchange: str


def all_to_all_dispatch(
  x_GTD: Array,
  assignment: Assignment,
  experts: Experts,
  *,
  num_experts: int,
  capacity: int,
  shard: Shard = no_sharding,
  options: Options,
) -> tuple[Array, Array]:
  """Returns y_GTD = sum of weight * expert(x) over the kept entries, and kept_GA. Fields are [G, A]."""
  function = functools.partial(
    _on_device, num_experts=num_experts, capacity=Capacity(options.capacity, capacity), options=options
  )
  y_GTD, kept_GA = on_each_device(function, x_GTD, assignment, experts)
  return shard(y_GTD, ("group", None, None)), kept_GA


def _on_device(x_GTD, assignment, experts, group, *, num_experts, capacity, options):
  kept_GA = kept_entries(assignment, capacity, num_experts, group)
  kept = assignment._replace(valid_A=kept_GA, holds_slot_A=None)
  if group.size == 1:
    y_GTD, _ = dropless_dispatch(x_GTD, kept, experts, num_experts=num_experts)
    return y_GTD, kept_GA

  # X: entries of one chunk. Y: tokens of all groups.
  x_YD = x_GTD.reshape(-1, x_GTD.shape[-1])
  num_groups, own_experts = x_GTD.shape[0], num_experts // group.size
  one_group = as_one_group(kept, x_GTD.shape[1])
  chunks = _cut(one_group, options.chunks)  # fields [J, entries]
  entries = chunks.valid_A.shape[1]
  # If the number of chunks divides the groups, a chunk consists of whole groups and has at most as many rows as
  # these groups have slots. If groups share slots, the first chunk may fill all of them.
  alone = options.capacity == "group" and num_groups % options.chunks == 0
  groups_of_chunk = num_groups // options.chunks if alone else num_groups
  per_pair, received = capacity.rows(entries, groups_of_chunk, own_experts, group)
  if options.buffer_factor:
    per_pair = min(per_pair, math.ceil(entries * options.buffer_factor / group.size))
    received = min(received, group.size * per_pair)
    fits = lambda chunk: within_budget(chunk.expert_A // own_experts, chunk.valid_A, group.size, per_pair)
    chunks = chunks._replace(valid_A=jax.vmap(fits)(chunks))
    kept_GA = chunks.valid_A.reshape(-1)[: kept_GA.size].reshape(kept_GA.shape)

  there = Shape(group.axis, options.exchange, entries, received + BLOCK, per_pair)
  queues = jax.vmap(lambda chunk: make_queues(chunk.expert_A, chunk.valid_A, num_experts))(chunks)
  length_PJE = lax.all_gather(queues.length_E, group.axis)  # one message for all J chunks
  y_YD = jnp.zeros(x_YD.shape, jnp.result_type(x_YD, assignment.weight_A))
  for i in range(options.chunks):  # chunks are independent, so one's matmul can overlap another's exchange
    chunk, queue = jax.tree.map(lambda field, i=i: field[i], (chunks, queues))
    token_X, weight_X = in_queue_order(chunk, queue, num_experts, x_YD.shape[0])
    counts_PPO = length_PJE[:, i].reshape(group.size, group.size, own_experts)
    plan = make_plan(counts_PPO, lax.axis_index(group.axis))
    rows_MD = exchanged(exchange(x_YD.at[token_X].get(mode="fill", fill_value=0), plan, there))
    rows_MD = experts(rows_MD, Sorted(plan.recv_size_PO.sum(axis=0), rows_MD.shape[0]))
    rows_XD = exchanged(exchange(rows_MD, plan.back(), there.back()))
    y_YD = y_YD.at[token_X].add(rows_XD * weight_X[:, None], mode="drop")
  return y_YD.astype(x_GTD.dtype).reshape(x_GTD.shape), kept_GA


def _cut(one_group: Assignment, chunks: int) -> Assignment:
  """Splits fields [A] into chunks, [J, ceil(A / J)]. Invalid entries fill the last chunk."""
  more = -one_group.valid_A.shape[0] % chunks
  return jax.tree.map(lambda field: jnp.pad(field, (0, more)).reshape(chunks, -1), one_group)
