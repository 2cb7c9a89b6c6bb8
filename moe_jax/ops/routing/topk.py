"""Token-choice routers: every token takes its K best experts."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.methods import require_option
from moe_jax.ops.routing.common import Router, full_mask, select_top_k, take_experts, token_major
from moe_jax.types import Array, Routing


def softmax_topk(num_experts: int, num_experts_per_token: int, softmax: str = "after") -> Router:
  """Softmax top-k. `after` the selection (Mixtral, 2401.04088): the K weights of a token sum to 1.
  `before` it (DeepSeekMoE, 2401.06066, eq. 3-5): the weights are the probabilities among all experts.

  The scores, which bias and balancing losses read, are the full softmax in both cases.
  """
  require_option("router softmax_topk", "softmax", softmax, ("before", "after"))

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    del key
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, bias_E, num_experts_per_token)
    if softmax == "after":
      weight_TK = jax.nn.softmax(take_experts(logits_TE, expert_TK), axis=-1)
    else:
      weight_TK = take_experts(scores_TE, expert_TK)
    return Routing(logits_TE, log_scores_TE, mask_T, token_major(expert_TK, weight_TK, mask_T))

  return Router(route)


def sigmoid_topk(
  num_experts: int, num_experts_per_token: int, normalize: bool = False, scale: float = 1.0
) -> Router:
  """Sigmoid top-k (2408.15664: weights are the plain scores). `normalize` divides a token's
  weights by their sum, `scale` multiplies them (DeepSeek-V3, 2412.19437, eq. 12-16: true and 2.5)."""

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    del key
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = jax.nn.log_sigmoid(logits_TE)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, bias_E, num_experts_per_token)
    if normalize:
      # softmax of log-scores is the division by the sum, without an epsilon that could be gamed.
      weight_TK = jax.nn.softmax(jax.nn.log_sigmoid(take_experts(logits_TE, expert_TK)), axis=-1)
    else:
      weight_TK = take_experts(scores_TE, expert_TK)
    return Routing(logits_TE, log_scores_TE, mask_T, token_major(expert_TK, scale * weight_TK, mask_T))

  return Router(route)


def switch_top1(num_experts: int, num_experts_per_token: int) -> Router:
  """Switch (2101.03961, eq. 2): one expert, weighted by its probability among all experts."""
  if num_experts_per_token != 1:
    raise InputError(f"--num_experts_per_token={num_experts_per_token}: router switch_top1 takes 1")
  return softmax_topk(num_experts, 1, softmax="before")


__all__ = ["sigmoid_topk", "softmax_topk", "switch_top1"]
