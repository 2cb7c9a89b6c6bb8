"""Dispatch without a capacity: a grouped matmul over all tokens sorted by expert (MegaBlocks, 2211.15841)."""

import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Experts, Shard, no_sharding
from moe_jax.ops.dispatch.slots import as_one_group, in_queue_order, make_queues
from moe_jax.ops.experts import SortedByExpert
from moe_jax.ops.grouped_matmul import BLOCK
from moe_jax.types import Array, Assignment


def dropless_dispatch(
  x_GTD: Array,
  assignment: Assignment,
  experts: Experts,
  *,
  num_experts: int,
  capacity: int = 0,
  shard: Shard = no_sharding,
  num_rows: int | None = None,
) -> tuple[Array, Array]:
  """Returns y_GTD = sum of weight * expert(x) over the valid entries, and kept_GA = valid_GA. Fields are [G, A].

  `capacity` is ignored, and groups only delimit the tokens that an entry can refer to. `num_rows` is the maximum
  number of valid entries, if the caller knows it. The experts then multiply at most that many rows.
  """
  del capacity
  one_group = as_one_group(assignment, x_GTD.shape[1])
  x_TD = x_GTD.reshape(-1, x_GTD.shape[-1])
  queues = make_queues(one_group.expert_A, one_group.valid_A, num_experts)
  token_R, weight_R = in_queue_order(one_group, queues, num_experts, x_TD.shape[0])
  # Rows without a token follow the queues, as the grouped product requires.
  token_R = jnp.pad(token_R[:num_rows], (0, BLOCK), constant_values=x_TD.shape[0])
  weight_R = jnp.pad(weight_R[:num_rows], (0, BLOCK))
  rows_RD = x_TD.at[token_R].get(mode="fill", fill_value=0)
  rows_RD = experts(rows_RD, SortedByExpert(queues.length_E))
  weighted_RD = rows_RD * weight_R[:, None]
  y_TD = jnp.zeros(x_TD.shape, weighted_RD.dtype).at[token_R].add(weighted_RD, mode="drop")
  return shard(y_TD.astype(x_GTD.dtype).reshape(x_GTD.shape), ("group", None, None)), assignment.valid_A
