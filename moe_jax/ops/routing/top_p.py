"""Top-p routing: a token takes as many experts as it needs (2403.07652)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def top_p(num_experts: int, num_experts_per_token: int, p: float = 0.4) -> Choice:
  """The fewest experts whose probabilities sum to more than `p`, at most K. Weights are the probabilities.

  A token takes its best expert, and each next one as long as those before it sum to `p` or less. The sum must
  exceed `p`, as in the released code (ZhenweiAn/Dynamic_MoE), where p is 0.4. A bias changes the order of the
  experts; the sums and the weights are of probabilities without it.

  The paper does not limit the number of experts. Here K does, because shapes are static: K = E is the paper's
  method, and a smaller K cuts off the further experts of uncertain tokens. Capacity counts K experts per token,
  so a capacity factor below 1 is enough where tokens take fewer. With uniform scores a token takes as many
  experts as it may; the paper keeps the number small with a loss, the balancer `entropy_loss`.

  Args:
    p: in (0, 1).
  """
  if not 0 < p < 1:
    raise InputError(f"router top_p: p must be in (0, 1), got {p}")

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, context.bias_E, num_experts_per_token)
    weight_TK = take_experts(scores_TE, expert_TK)
    # cumsum less the probability itself might not be exactly 0 for the best expert, which is always taken.
    sum_TK = jnp.cumsum(jax.lax.stop_gradient(weight_TK), axis=-1)
    before_TK = jnp.concatenate([jnp.zeros_like(sum_TK[:, :1]), sum_TK[:, :-1]], axis=-1)
    return Routing(
      logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask, before_TK <= p)
    )

  return Choice(choose, fewest=1, replays=False)
