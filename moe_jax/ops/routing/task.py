"""Routers that decide for more than one token: by task, and by sequence (2110.03742)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Router, full_mask
from moe_jax.ops.routing.topk import softmax_topk
from moe_jax.types import Array, Routing


def task_level(num_experts: int, num_experts_per_token: int, tasks: int = 16) -> Router:
  """Task-level routing (2110.03742, section 3.1): the experts of a token follow from its task alone.

  Its logits are a learned row of the domain of its text, one of `tasks`; the layer looks it up. Choice and
  weights are those of `softmax_topk`, as the paper takes GShard's two best experts. A task needs only its own
  K experts, so they can be served without the others.

  All tokens of a sequence go to the same K experts: with groups of one sequence, capacity drops most of them
  unless it is E/K times the fair share. Use the dispatcher `dropless`, or groups of several sequences.
  """
  if tasks < 1:
    raise InputError(f"router task_level: tasks must be at least 1, got {tasks}")
  return Router(softmax_topk(num_experts, num_experts_per_token).route, num_tasks=tasks)


def sequence_level(num_experts: int, num_experts_per_token: int) -> Router:
  """Sentence-level routing (2110.03742, section 3.1): one choice for all tokens of a sequence.

  The logits are those of the sequence's mean representation. The projection is linear, so that is the mean
  of its tokens' logits, padding left out; gradients reach every token through it. Choice and weights are those
  of `softmax_topk`. The mean holds later tokens: it leaks in a causal model. On capacity see `task_level`.
  """
  route_mean = softmax_topk(num_experts, num_experts_per_token).route

  def route(
    logits_TE: Array,
    *,
    sequence_T: Array,
    bias_E: Array | None = None,
    key: Array | None = None,
    mask_T: Array | None = None,
  ) -> Routing:
    mask_T = full_mask(logits_TE, mask_T)
    # At most as many sequences as tokens. where, not a product: padding may hold anything.
    in_sequence = lambda x: jax.ops.segment_sum(x, sequence_T, num_segments=mask_T.shape[0])[sequence_T]
    sum_TE = in_sequence(jnp.where(mask_T[:, None], logits_TE, 0))
    count_T = in_sequence(mask_T.astype(logits_TE.dtype))
    mean_TE = sum_TE / jnp.maximum(count_T, 1)[:, None]
    return route_mean(mean_TE, bias_E=bias_E, key=key, mask_T=mask_T)

  return Router(route, reads=("sequence_T",), leaks="always")
