"""Sinkhorn routing (S-BASE): the choice follows a balanced transport plan instead of the raw logits."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def sinkhorn(
  num_experts: int,
  num_experts_per_token: int,
  score: str = "auto",
  tolerance: float = 1e-4,
  max_iterations: int = 100,
) -> Choice:
  """S-BASE (Clark et al., 2202.01169) in Megatron-LM's form (moe_utils.py, `sinkhorn`).

  In training a token takes the K largest entries of its row of the plan d0_t exp(x_te) d1_e. The rows of the
  plan sum to 1 and its columns to n / E, for the n valid tokens of the group. In evaluation a token takes its K
  largest logits. Weights are always scores of the logits themselves. No gradient goes through the iterations.

  The plan is balanced, the choice only nearly so, because the entries of the plan are not 0 or 1.

  Megatron iterates without a bound until d1 changes by less than 1e-4 on average, and exponentiates the logits
  with an epsilon of 1e-8. Here everything is computed with logarithms.

  Leaks the future in training: d1 depends on all tokens of the group.

  Args:
    score: of the weights: `sigmoid`, or `softmax` over all experts. `auto` is Megatron's rule: sigmoid for
      K = 1, otherwise softmax.
    tolerance: the iterations stop once every row sum is this close to 1. Columns are then exact.
    max_iterations: or after this many iterations.
  """
  require_option("router sinkhorn", "score", score, ("auto", "sigmoid", "softmax"))
  if tolerance <= 0:
    raise InputError(f"router sinkhorn: tolerance must be above 0, got {tolerance}")
  if max_iterations < 1:
    raise InputError(f"router sinkhorn: max_iterations must be at least 1, got {max_iterations}")
  use_sigmoid = score == "sigmoid" or (score == "auto" and num_experts_per_token == 1)

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_sigmoid(logits_TE) if use_sigmoid else jax.nn.log_softmax(logits_TE, axis=-1)
    # d0 scales a whole row, which does not change the order of its entries.
    log_d1_E = column_scale(logits_TE, context.mask, tolerance, max_iterations) if context.train else None
    expert_TK = select_top_k(logits_TE, log_d1_E, num_experts_per_token)
    weight_TK = jnp.exp(take_experts(log_scores_TE, expert_TK))
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose, leaks="always", takes_bias=False)


def column_scale(logits_TE: Array, mask_T: Array, tolerance: float, max_iterations: int) -> Array:
  """log d1_E of the plan d0_t exp(x_te) d1_e with row sums 1 and column sums n / E over valid tokens.

  Rows and columns are normalised in turn, columns last. A step that changes log d1 by at most `tolerance`
  leaves every row sum within a factor exp(+-tolerance) of 1.
  """
  logits_TE = jax.lax.stop_gradient(jnp.where(mask_T[:, None], logits_TE, 0))
  num_valid = jnp.maximum(jnp.sum(mask_T, dtype=logits_TE.dtype), 1)
  log_column_sum = jnp.log(num_valid / logits_TE.shape[-1])

  def step(carry):
    log_d1_E, _, i = carry
    log_d0_T = -jax.nn.logsumexp(logits_TE + log_d1_E[None], axis=1)
    log_d0_T = jnp.where(mask_T, log_d0_T, -jnp.inf)
    new_E = log_column_sum - jax.nn.logsumexp(logits_TE + log_d0_T[:, None], axis=0)
    new_E = jnp.where(mask_T.any(), new_E, 0)  # a group of padding alone has no plan
    return new_E, jnp.max(jnp.abs(new_E - log_d1_E)), i + 1

  def goes_on(carry):
    _, change, i = carry
    return (change > tolerance) & (i < max_iterations)

  start = (jnp.zeros(logits_TE.shape[-1:], logits_TE.dtype), jnp.array(jnp.inf, logits_TE.dtype), 0)
  log_d1_E, _, _ = jax.lax.while_loop(goes_on, step, start)
  return log_d1_E
