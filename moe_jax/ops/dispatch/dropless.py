"""No capacity: a grouped matmul over all tokens sorted by expert (MegaBlocks, 2211.15841)."""

import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Experts, Shard, no_sharding
from moe_jax.ops.dispatch.slots import make_queues
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
) -> tuple[Array, Array]:
  """Returns y_GTD = sum of weight * expert(x) over the valid entries, and kept_GA = valid_GA. Fields are [G, A].

  `capacity` is ignored, and groups only delimit the tokens that an entry can name.
  """
  del capacity
  num_groups, num_tokens, dim = x_GTD.shape
  x_TD = x_GTD.reshape(num_groups * num_tokens, dim)
  offset_G = num_tokens * jnp.arange(num_groups, dtype=jnp.int32)
  token_A = (assignment.token_A + offset_G[:, None]).reshape(-1)
  valid_A = assignment.valid_A.reshape(-1)
  queues = make_queues(assignment.expert_A.reshape(-1), valid_A, num_experts)

  in_queue_A = queues.expert_A < num_experts
  # Rows of no token follow the queues, as the grouped product wants.
  token_R = jnp.where(in_queue_A, token_A[queues.entry_A], x_TD.shape[0])
  token_R = jnp.pad(token_R, (0, BLOCK), constant_values=x_TD.shape[0])
  weight_R = jnp.where(in_queue_A, assignment.weight_A.reshape(-1)[queues.entry_A], 0)
  weight_R = jnp.pad(weight_R, (0, BLOCK))
  rows_RD = x_TD.at[token_R].get(mode="fill", fill_value=0)
  rows_RD = experts(rows_RD, SortedByExpert(queues.length_E))
  weighted_RD = rows_RD * weight_R[:, None]
  y_TD = jnp.zeros(x_TD.shape, weighted_RD.dtype).at[token_R].add(weighted_RD, mode="drop")
  return shard(y_TD.astype(x_GTD.dtype).reshape(x_GTD.shape), ("group", None, None)), assignment.valid_A
