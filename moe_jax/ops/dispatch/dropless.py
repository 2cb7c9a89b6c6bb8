"""Dispatch without a capacity: a grouped matmul over all tokens sorted by expert (MegaBlocks, 2211.15841)."""

import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Shard, no_sharding
from moe_jax.ops.dispatch.slots import as_one_group, in_queue_order, make_queues
from moe_jax.ops.experts import Experts, Sorted
from moe_jax.ops.grouped_matmul import block_of
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
  x_XD = x_GTD.reshape(-1, x_GTD.shape[-1])
  queues = make_queues(one_group.expert_A, one_group.valid_A, num_experts)
  token_M, weight_M = in_queue_order(one_group, queues, num_experts, x_XD.shape[0])
  block = block_of(x_XD.shape[0])
  # Rows without a token follow the queues, as the grouped product requires.
  token_M = jnp.pad(token_M[:num_rows], (0, block), constant_values=x_XD.shape[0])
  weight_M = jnp.pad(weight_M[:num_rows], (0, block))
  rows_MD = x_XD.at[token_M].get(mode="fill", fill_value=0)
  rows_MD = experts(rows_MD, Sorted(queues.length_E, rows_MD.shape[0], block=block))
  weighted_MD = rows_MD * weight_M[:, None]
  y_XD = jnp.zeros(x_XD.shape, weighted_MD.dtype).at[token_M].add(weighted_MD, mode="drop")
  return shard(y_XD.astype(x_GTD.dtype).reshape(x_GTD.shape), ("group", None, None)), assignment.valid_A
