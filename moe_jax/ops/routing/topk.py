"""Token-choice routers: every token takes its K best experts."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def log_sqrt_softplus(logits_TE: Array) -> Array:
  """log(sqrt(log(1 + exp(x)))), finite also where the score itself is 0 in float32."""
  is_small_TE = logits_TE < -15.0  # there log(softplus(x)) is x to the last bit of a float32
  log_softplus_TE = jnp.log(jax.nn.softplus(jnp.where(is_small_TE, -15.0, logits_TE)))
  return 0.5 * jnp.where(is_small_TE, logits_TE, log_softplus_TE)


LOG_SCORES = {
  "softmax": jax.nn.log_softmax,
  "sigmoid": jax.nn.log_sigmoid,
  "sqrt_softplus": log_sqrt_softplus,
}


def weigh(log_scores_TE: Array, expert_TK: Array, normalize: bool, scale: float) -> Array:
  """Weights [T, K]: the scores of the chosen, with `normalize` divided by their sum, times `scale`."""
  chosen_TK = take_experts(log_scores_TE, expert_TK)
  # softmax of log-scores is the division by the sum, without an epsilon that could be gamed.
  return scale * (jax.nn.softmax(chosen_TK, axis=-1) if normalize else jnp.exp(chosen_TK))


def softmax_topk(num_experts: int, num_experts_per_token: int, softmax: str = "after") -> Choice:
  """Softmax top-k. `after` the selection (Mixtral, 2401.04088): the K weights of a token sum to 1.
  `before` it (DeepSeekMoE, 2401.06066, eq. 3-5): the weights are the probabilities among all experts.

  The scores, which bias and balancing losses read, are the full softmax in both cases.
  """
  require_option("router softmax_topk", "softmax", softmax, ("before", "after"))

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, context.bias_E, num_experts_per_token)
    if softmax == "after":
      weight_TK = jax.nn.softmax(take_experts(logits_TE, expert_TK), axis=-1)
    else:
      weight_TK = take_experts(scores_TE, expert_TK)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose)


def scored_topk(
  router: str, num_experts_per_token: int, score: str = "softmax", normalize: bool = True, scale: float = 1.0
) -> Choice:
  """Top-k of any of `LOG_SCORES`, for routers with logits of their own. `router` is their name, for errors."""
  require_option(f"router {router}", "score", score, tuple(LOG_SCORES))

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = LOG_SCORES[score](logits_TE)
    expert_TK = select_top_k(jnp.exp(log_scores_TE), context.bias_E, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize, scale)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose)


def sigmoid_topk(
  num_experts: int, num_experts_per_token: int, normalize: bool = False, scale: float = 1.0
) -> Choice:
  """Sigmoid top-k (2408.15664: weights are the plain scores). `normalize` divides a token's
  weights by their sum, `scale` multiplies them (DeepSeek-V3, 2412.19437, eq. 12-16: true and 2.5)."""
  return scored_topk("sigmoid_topk", num_experts_per_token, "sigmoid", normalize, scale)


def llama4_topk(num_experts: int, num_experts_per_token: int) -> Choice:
  """Llama 4, as in the released code (transformers, `Llama4TextMoe`): weights multiply what the experts read.

  The K largest logits, with weights sigmoid(x). The released models have K = 1 and one shared expert. An expert
  reads weight * h, and its output is added without a weight. A bias moves the choice by the sigmoids: above 17 these
  are all 1 in float32, and of equal sums the lower index is taken.
  """

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_sigmoid(logits_TE)
    by_TE = logits_TE if context.bias_E is None else jnp.exp(log_scores_TE)
    expert_TK = select_top_k(by_TE, context.bias_E, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize=False, scale=1.0)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose, weighs="input")


def sqrt_softplus_topk(
  num_experts: int, num_experts_per_token: int, normalize: bool = True, scale: float = 1.0
) -> Choice:
  """Top-k of sqrt(softplus(x)), weights divided by their sum (DeepSeek-V4, 2606.19348, section 2.1).

  Unlike a sigmoid the score has no upper bound. `scale` multiplies the weights: 1.5 in the released V4-Flash,
  2.5 in V4-Pro.
  """

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = log_sqrt_softplus(logits_TE)
    expert_TK = select_top_k(jnp.exp(log_scores_TE), context.bias_E, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize, scale)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose)


def switch_top1(num_experts: int, num_experts_per_token: int) -> Choice:
  """Switch (2101.03961, eq. 2): one expert, weighted by its probability among all experts."""
  if num_experts_per_token != 1:
    raise InputError(f"num_experts_per_token={num_experts_per_token}: router switch_top1 takes 1")
  return softmax_topk(num_experts, 1, softmax="before")


__all__ = [
  "LOG_SCORES",
  "llama4_topk",
  "scored_topk",
  "sigmoid_topk",
  "softmax_topk",
  "sqrt_softplus_topk",
  "switch_top1",
  "weigh",
]
