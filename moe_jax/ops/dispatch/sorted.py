"""Gathers tokens by index and scatters the experts' outputs back, with or without capacity buffers."""

import jax
import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Shard, no_sharding, run_experts
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.slots import assign_slots
from moe_jax.ops.experts import Experts
from moe_jax.types import Array, Assignment


def sorted_dispatch(
  x_GTD: Array,
  assignment: Assignment,
  experts: Experts,
  *,
  num_experts: int,
  capacity: int,
  shard: Shard = no_sharding,
) -> tuple[Array, Array]:
  """Returns y_GTD = sum of weight * expert(x) over the kept entries, and kept_GA. Fields are [G, A].

  Devices exchange buffers of a fixed size. Without `shard`, there is no exchange, and the kept entries go through
  the grouped product, which skips empty slots. On CPU, at capacity factor 1.25, a training step of the layer then
  takes 0.9 times as long (scripts/bench_layer.py, `sorted`, `buffers`).
  """
  _, num_tokens, _ = x_GTD.shape
  slots = jax.vmap(lambda a: assign_slots(a, num_tokens, num_experts, capacity))(assignment)
  if shard is no_sharding:
    kept = assignment._replace(valid_A=slots.kept_A)
    return dropless_dispatch(x_GTD, kept, experts, num_experts=num_experts)
  rows_GECD = jax.vmap(lambda x, token: x.at[token].get(mode="fill", fill_value=0))(x_GTD, slots.token_EC)
  rows_GECD = run_experts(experts, rows_GECD, shard)
  y_GTD = jax.vmap(_combine)(rows_GECD, assignment.weight_A, slots.entry_EC, slots.token_EC, x_GTD)
  return shard(y_GTD, ("group", None, None)), slots.kept_A


def _combine(rows_ECD, weight_A, entry_EC, token_EC, x_TD):
  weight_EC = weight_A.at[entry_EC].get(mode="fill", fill_value=0)
  weighted_ECD = rows_ECD * weight_EC[..., None]
  y_TD = jnp.zeros(x_TD.shape, weighted_ECD.dtype).at[token_EC].add(weighted_ECD, mode="drop")
  return y_TD.astype(x_TD.dtype)
