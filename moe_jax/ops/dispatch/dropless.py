"""No capacity: a grouped matmul over all tokens sorted by expert (MegaBlocks, 2211.15841)."""

import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Experts, Shard, no_sharding
from moe_jax.ops.dispatch.slots import make_queues
from moe_jax.ops.grouped_matmul import grouped_matmul
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
  token_A = jnp.where(in_queue_A, token_A[queues.entry_A], x_TD.shape[0])
  weight_A = jnp.where(in_queue_A, assignment.weight_A.reshape(-1)[queues.entry_A], 0)
  rows_AD = x_TD.at[token_A].get(mode="fill", fill_value=0)
  rows_AD = experts(rows_AD, lambda rows, w_EXY: grouped_matmul(rows, w_EXY, queues.length_E))
  weighted_AD = rows_AD * weight_A[:, None]
  y_TD = jnp.zeros(x_TD.shape, weighted_AD.dtype).at[token_A].add(weighted_AD, mode="drop")
  return shard(y_TD.astype(x_GTD.dtype).reshape(x_GTD.shape), ("group", None, None)), assignment.valid_A
