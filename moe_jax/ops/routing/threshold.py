"""Expert Threshold routing (2603.11535): a token goes to every expert whose threshold its score reaches."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, apply_bias, select_top_k, take_experts, token_major
from moe_jax.types import Array, ExpertScale, RouterContext, Routing


def expert_threshold(num_experts: int, num_experts_per_token: int, most: int = 0) -> Choice:
  """Token t goes to expert e if its logit is at least c_e (2603.11535). Weights are the sigmoids of the logits.

  The thresholds c are those of balancer `expert_threshold`, a moving quantile that lets K of E experts take a token on
  average. It is expert choice without its leak: the decision for a token needs no other token of the batch, and a
  token has as many experts as want it, possibly none. Without the balancer, c is 0. Another bias is added to the
  logits, not to their sigmoids.

  The comparison of logits, the sigmoid and ">=" are those of the authors' code (src/models/engines/common.py). The
  paper was not re-read. The code does not bound the experts of a token. Here `most` does, because shapes are static:
  where more want the token, those with the largest x - c get it. Capacity counts K experts per token.

  Args:
    most: the largest number of experts of a token; 0: min(E, 4K).

  Raises:
    InputError: if `most` is not between 1 and E, or the balancer's bias multiplies.
  """
  most = most or min(num_experts, 4 * num_experts_per_token)
  if not 1 <= most <= num_experts:
    raise InputError(
      f"router expert_threshold: most={most} must be between 1 and num_experts={num_experts}, or 0 for "
      "4 times num_experts_per_token"
    )

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    if isinstance(context.bias_E, ExpertScale):
      raise InputError("router expert_threshold: adds the bias of a balancer, and this one multiplies")
    log_scores_TE = jax.nn.log_sigmoid(logits_TE)
    above_TE = jax.lax.stop_gradient(apply_bias(logits_TE, context.bias_E))
    expert_TY = select_top_k(above_TE, None, most)
    weight_TY = jnp.exp(take_experts(log_scores_TE, expert_TY))
    wants_TY = take_experts(above_TE, expert_TY) >= 0
    assignment = token_major(expert_TY, weight_TY, context.mask, wants_TY)
    return Routing(logits_TE, log_scores_TE, context.mask, assignment)

  return Choice(choose, has_threshold=True, most=most, fewest=0)
