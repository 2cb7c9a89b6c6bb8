"""ReMoE: a token uses every expert whose logit is above 0."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing

LOG_OF_ZERO = -1e4  # its exponential is 0 in float32; minus infinity would make ratios of scores NaN


def remoe(num_experts: int, num_experts_per_token: int, max_experts: int = 0) -> Choice:
  """ReLU routing (ReMoE, 2412.14711): the weight of an expert is relu(x), and experts with weight 0 are not used.

  Nothing is selected, so the layer is continuous in the logits. The number of experts of a token varies. The
  balancer `remoe_loss` brings its mean to K = `num_experts_per_token`. At the start, it is about E/2.

  The list of assignments has a static length. It holds all E experts of each token, valid or not, so buffers of
  a dispatcher are E/K times those of a top-K router. `max_experts` makes it shorter, and a token with more
  experts above 0 then uses only that many of the largest. Capacity is still computed from K.

  Args:
    num_experts: E.
    num_experts_per_token: K, the number that `remoe_loss` aims at, on average.
    max_experts: the largest number of experts of a token; 0: E, as in the paper.

  Raises:
    InputError: if `max_experts` is not 0 or between K and E.
  """
  if max_experts and not num_experts_per_token <= max_experts <= num_experts:
    raise InputError(
      f"router remoe: max_experts must be 0, or between num_experts_per_token={num_experts_per_token} and "
      f"num_experts={num_experts}, got {max_experts}"
    )

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    weight_TE = jax.nn.relu(logits_TE)
    is_active_TE = weight_TE > 0
    log_scores_TE = jnp.where(is_active_TE, jnp.log(jnp.where(is_active_TE, weight_TE, 1)), LOG_OF_ZERO)
    if max_experts in (0, num_experts):
      expert_TX = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), logits_TE.shape)
      weight_TX = weight_TE
    else:
      expert_TX = select_top_k(logits_TE, None, max_experts)
      weight_TX = take_experts(weight_TE, expert_TX)
    assignment = token_major(expert_TX, weight_TX, context.mask, valid_TK=weight_TX > 0)
    return Routing(logits_TE, log_scores_TE, context.mask, assignment)

  most = max_experts or num_experts
  return Choice(choose, takes_bias=False, sparse_weights=True, most=most, fewest=0)
