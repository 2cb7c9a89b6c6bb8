"""Sinkhorn routing (S-BASE): the choice follows a balanced transport plan instead of the raw logits."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Router, full_mask, select_top_k, take_experts, token_major
from moe_jax.types import Array, Routing


def sinkhorn(
  num_experts: int,
  num_experts_per_token: int,
  score: str = "auto",
  tolerance: float = 1e-4,
  max_iterations: int = 100,
) -> Router:
  """S-BASE (Clark et al., 2202.01169) in Megatron-LM's form (moe_utils.py, `sinkhorn`).

  In training a token takes the K largest entries of its row of the plan d0_t exp(x_te) d1_e, whose rows sum
  to 1 and whose columns sum to n / E, for the n valid tokens of the group. In evaluation it takes the K
  largest logits. Weights are always those of the raw logits: `score=sigmoid` or `softmax` over all experts;
  `auto` is Megatron's rule, sigmoid for K = 1 and softmax else. No gradient goes through the iterations.

  The plan is balanced, the choice only nearly so: it takes the largest of entries that are not 0 or 1.

  `tolerance` bounds how far the sum of any row may be from 1 where the iteration stops (columns are then
  exact), unless `max_iterations` ends it before. Megatron stops at a mean change of d1 below 1e-4, without a
  bound on iterations, and exponentiates the logits with an epsilon of 1e-8; here all is in logarithms.

  Leaks the future in training: d1 depends on all tokens of the group.
  """
  require_option("router sinkhorn", "score", score, ("auto", "sigmoid", "softmax"))
  if tolerance <= 0:
    raise InputError(f"router sinkhorn: tolerance must be above 0, got {tolerance}")
  if max_iterations < 1:
    raise InputError(f"router sinkhorn: max_iterations must be at least 1, got {max_iterations}")
  use_sigmoid = score == "sigmoid" or (score == "auto" and num_experts_per_token == 1)

  def route(
    logits_TE: Array,
    *,
    train: bool,
    bias_E: Array | None = None,
    key: Array | None = None,
    mask_T: Array | None = None,
  ) -> Routing:
    del bias_E, key
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = jax.nn.log_sigmoid(logits_TE) if use_sigmoid else jax.nn.log_softmax(logits_TE, axis=-1)
    # d0 scales a whole row: it does not change which entries of the row are the largest.
    log_d1_E = column_scale(logits_TE, mask_T, tolerance, max_iterations) if train else None
    expert_TK = select_top_k(logits_TE, log_d1_E, num_experts_per_token)
    weight_TK = jnp.exp(take_experts(log_scores_TE, expert_TK))
    return Routing(logits_TE, log_scores_TE, mask_T, token_major(expert_TK, weight_TK, mask_T))

  return Router(route, reads=("train",), leaks="always", takes_bias=False)


def column_scale(logits_TE: Array, mask_T: Array, tolerance: float, max_iterations: int) -> Array:
  """log d1_E of the plan d0_t exp(x_te) d1_e with row sums 1 and column sums n / E over valid tokens.

  Rows and columns are normalised in turn, columns last. A step that changes log d1 by at most `tolerance`
  leaves every row sum within a factor exp(+-tolerance) of 1.
  """
  logits_TE = jax.lax.stop_gradient(jnp.where(mask_T[:, None], logits_TE, 0))
  num_valid = jnp.maximum(jnp.sum(mask_T), 1)
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
