"""Top-p routing: a token takes as many experts as it needs (2403.07652)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Router, full_mask, select_top_k, take_experts, token_major
from moe_jax.types import Array, Routing


def top_p(num_experts: int, num_experts_per_token: int, p: float = 0.4) -> Router:
  """The fewest experts whose probabilities sum past `p`, at most K; weights are the plain probabilities.

  A token takes its best expert, and the next one as long as those before sum to `p` or less: the sum must
  exceed `p`, as in the released code, where p is 0.4 (ZhenweiAn/Dynamic_MoE). A bias only orders the experts:
  what is summed, and the weights, are the probabilities without it.

  The paper sets no limit to the number of experts. Here K is one, because shapes are static: K = E gives the
  paper's method, and a smaller K cuts off what uncertain tokens would take beyond. Capacity counts K experts
  per token, so a capacity factor below 1 is enough where tokens take fewer. Uniform scores would take all the
  experts they can: the paper keeps the sets small by the balancer `entropy_loss`.
  """
  if not 0 < p < 1:
    raise InputError(f"router top_p: p must be in (0, 1), got {p}")

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    del key
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, bias_E, num_experts_per_token)
    weight_TK = take_experts(scores_TE, expert_TK)
    # cumsum - itself would not be exactly 0 for the best expert, which is always taken.
    sum_TK = jnp.cumsum(jax.lax.stop_gradient(weight_TK), axis=-1)
    before_TK = jnp.concatenate([jnp.zeros_like(sum_TK[:, :1]), sum_TK[:, :-1]], axis=-1)
    return Routing(
      logits_TE, log_scores_TE, mask_T, token_major(expert_TK, weight_TK, mask_T, before_TK <= p)
    )

  return Router(route)
