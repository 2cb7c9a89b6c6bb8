"""Gathers all tokens on every device of the group; each device computes its own experts, and the sums are scattered.

A device receives every token of the group once, rather than once per expert that the token chose. This is less
than the exchange of rows sends if a token chooses at least as many experts as the group has devices, and all
sizes are known in advance.
"""

import functools

import jax.numpy as jnp
from jax import lax

from moe_jax.ops.dispatch.common import Shard, no_sharding
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.slots import as_one_group
from moe_jax.ops.experts import Experts
from moe_jax.sharding.capacity import Capacity, kept_entries
from moe_jax.sharding.devices import on_each_device
from moe_jax.types import Array, Assignment


def all_gather_dispatch(
  x_GTD: Array,
  assignment: Assignment,
  experts: Experts,
  *,
  num_experts: int,
  capacity: int,
  shard: Shard = no_sharding,
  scope: str,
) -> tuple[Array, Array]:
  """Returns y_GTD = sum of weight * expert(x) over the kept entries, and kept_GA. Fields are [G, A]."""
  function = functools.partial(_on_device, num_experts=num_experts, capacity=Capacity(scope, capacity))
  y_GTD, kept_GA = on_each_device(function, x_GTD, assignment, experts)
  return shard(y_GTD, ("group", None, None)), kept_GA


def _on_device(x_GTD, assignment, experts, group, *, num_experts, capacity):
  kept_GA = kept_entries(assignment, capacity, num_experts, group)
  kept = assignment._replace(valid_A=kept_GA, holds_slot_A=None)
  if group.size == 1:
    y_GTD, _ = dropless_dispatch(x_GTD, kept, experts, num_experts=num_experts)
    return y_GTD, kept_GA

  num_groups, num_tokens, dim = x_GTD.shape
  own_experts = num_experts // group.size
  gather = lambda x: lax.all_gather(x, group.axis, tiled=True)
  one_group = as_one_group(kept, num_tokens)
  # Two integers per entry in one message. Expert number E marks an entry that is not kept.
  expert_X = jnp.where(one_group.valid_A, one_group.expert_A, num_experts)
  token_X = one_group.token_A + lax.axis_index(group.axis) * num_groups * num_tokens
  token_X, expert_X = gather(jnp.stack([token_X, expert_X], axis=-1)).T
  expert_X -= lax.axis_index(group.axis) * own_experts
  mine_X = (expert_X >= 0) & (expert_X < own_experts)
  entries = Assignment(token_X, jnp.where(mine_X, expert_X, 0), gather(one_group.weight_A), mine_X)

  _, num_rows = capacity.rows(kept_GA.size, num_groups, own_experts, group)
  y, _ = dropless_dispatch(
    gather(x_GTD).reshape(1, -1, dim),
    Assignment(*(field if field is None else field[None] for field in entries)),
    experts,
    num_experts=own_experts,
    num_rows=num_rows,
  )
  y = lax.psum_scatter(y[0], group.axis, tiled=True)
  return y.reshape(x_GTD.shape), kept_GA
