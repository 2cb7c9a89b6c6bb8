"""Quantile balancing within a group: every group is routed with thresholds that are solved for itself."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def quantile_topk(
  num_experts: int,
  num_experts_per_token: int,
  score: str = "sigmoid",
  rounds: int = 5,
  strength: float = 1.0,
) -> Choice:
  """Top-k of s - strength * beta, with one threshold beta_e per expert and group (kexue.fm/archives/11619).

  Consider all assignments that give each token K experts and each expert n K / E of the n valid tokens. The one
  with the largest sum of scores s is the top-k of s - beta, where beta solves the dual of that linear program.
  `rounds` of alternating minimisation approximate it. In each, alpha_t is set between the K-th and the next
  largest of s_te - beta_e, then beta_e between the q-th and the next largest of s_te - alpha_t, where q is
  n K / E rounded. Any value between the two minimises its step. The article takes the lower one, or numpy's
  interpolated quantile. Here it is the middle, which still improves where the lower one stalls. The counts are
  close to n K / E, not equal to it.

  Weights are the plain scores; thresholds move the choice only.

  The group is what gets balanced. With groups of one sequence, as `sorted` and `dropless` have them, every
  sequence is balanced by itself. Leaks the future even where nothing drops, because the thresholds depend on
  all tokens of the group. It therefore cannot generate token by token. For that, archives/11760 takes the
  quantile of a moving histogram of earlier tokens, which is another method.

  Args:
    score: `sigmoid`, or `softmax` over all experts.
    rounds: of the minimisation, at least 1.
    strength: in [0, 1]. Below 1 it balances in part: archives/11760 advises 0.3 where 1 costs quality.
  """
  require_option("router quantile_topk", "score", score, ("sigmoid", "softmax"))
  if rounds < 1:
    raise InputError(f"router quantile_topk: rounds must be at least 1, got {rounds}")
  if not 0 <= strength <= 1:
    raise InputError(f"router quantile_topk: strength must be in [0, 1], got {strength}")

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_sigmoid(logits_TE) if score == "sigmoid" else jax.nn.log_softmax(logits_TE)
    scores_TE = jnp.exp(log_scores_TE)
    beta_E = expert_thresholds(scores_TE, context.mask, num_experts_per_token, rounds)
    expert_TK = select_top_k(scores_TE, -strength * beta_E, num_experts_per_token)
    weight_TK = take_experts(scores_TE, expert_TK)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose, leaks="always", takes_bias=False)


def expert_thresholds(scores_TE: Array, mask_T: Array, k: int, rounds: int) -> Array:
  """beta_E after `rounds` of alternating minimisation from beta = 0. No gradient."""
  scores_TE = jax.lax.stop_gradient(scores_TE)
  num_tokens, num_experts = scores_TE.shape
  share = (2 * jnp.sum(mask_T) * k + num_experts) // (2 * num_experts)  # n K / E, rounded half up
  last = jnp.maximum(share - 1, 0)  # where the sorted column has the last one taken
  rank_T = jnp.arange(num_tokens)[:, None]
  # The next one must be a valid token; there is none where the expert takes all.
  is_last_T1, is_next_T1 = (
    rank_T == last,
    rank_T == jnp.minimum(last + 1, jnp.maximum(jnp.sum(mask_T) - 1, 0)),
  )

  def one_round(_, beta_E):
    alpha_T = _token_threshold(scores_TE - beta_E[None], k)
    margin_TE = jnp.where(mask_T[:, None], scores_TE - alpha_T[:, None], -jnp.inf)
    sorted_TE = jnp.sort(margin_TE, axis=0, descending=True)
    pick = lambda is_it_T1: jnp.sum(jnp.where(is_it_T1, sorted_TE, 0), axis=0)
    beta_E = (pick(is_last_T1) + pick(is_next_T1)) / 2
    return jnp.where(mask_T.any(), beta_E, 0)

  return jax.lax.fori_loop(0, rounds, one_round, jnp.zeros(num_experts, scores_TE.dtype))


def _token_threshold(values_TE: Array, k: int) -> Array:
  """Half-way between the k-th and the next largest value of every row; the k-th where it is the last."""
  last = min(k + 1, values_TE.shape[-1])
  largest_TX = take_experts(values_TE, select_top_k(values_TE, None, last))
  return (largest_TX[:, k - 1] + largest_TX[:, last - 1]) / 2
