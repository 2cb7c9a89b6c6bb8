"""Routers with one decision for many tokens: all those of a task, or of a sequence (2110.03742)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, require
from moe_jax.ops.routing.topk import softmax_topk
from moe_jax.types import Array, RouterContext, Routing


def task_level(num_experts: int, num_experts_per_token: int, tasks: int = 16) -> Choice:
  """Task-level routing (2110.03742, section 3.1): the experts of a token depend on its task alone.

  The logits are a learned row per task; the router module looks up the row of the sequence's domain. Choice and
  weights are those of `softmax_topk`, as the paper takes GShard's two best experts. A task needs only its own K
  experts, so it can be served without the others.

  All tokens of a sequence go to the same K experts. With groups of one sequence, capacity drops most of them
  unless the capacity factor is E/K. Use the dispatcher `dropless`, or groups of several sequences.

  Args:
    tasks: S, the number of tasks.
  """
  if tasks < 1:
    raise InputError(f"router task_level: tasks must be at least 1, got {tasks}")
  return softmax_topk(num_experts, num_experts_per_token)._replace(num_tasks=tasks)


def sequence_level(num_experts: int, num_experts_per_token: int) -> Choice:
  """Sentence-level routing (2110.03742, section 3.1): one choice for all tokens of a sequence.

  The logits are those of the mean representation of a sequence. Because the projection is linear, that is the
  mean over the logits of its valid tokens, and gradients reach all of them. Choice and weights are those of
  `softmax_topk`. On capacity see `task_level`. It reads `context.sequence`.

  Leaks the future: the mean includes later tokens.
  """
  softmax = softmax_topk(num_experts, num_experts_per_token)

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    sequence_T = require(context.sequence, "router sequence_level", "the sequence of each token")
    # There are at most as many sequences as tokens. Not a product with the mask: padding may hold NaN.
    in_sequence = lambda x: jax.ops.segment_sum(x, sequence_T, num_segments=len(sequence_T))[sequence_T]
    sum_TE = in_sequence(jnp.where(context.mask[:, None], logits_TE, 0))
    count_T = in_sequence(context.mask.astype(logits_TE.dtype))
    return softmax.choose(sum_TE / jnp.maximum(count_T, 1)[:, None], context)

  return Choice(choose, leaks="always", whole_sequences=True)
