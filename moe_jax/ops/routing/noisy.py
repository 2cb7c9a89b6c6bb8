"""Top-k of noisy logits: noise spreads the choice, and makes the load of an expert differentiable.

How many tokens an expert gets is a count and has no gradient. The probability that it would get a token if its
noise were drawn again has one: the smooth load, which `load_loss` balances.
"""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Router, full_mask, select_top_k, take_experts, token_major
from moe_jax.types import Array, Routing


def learned_std(side_logits_TX: Array, min_std: float) -> Array:
  """The standard deviation of the noise, learned per token and expert (1701.06538, eq. 4)."""
  return jax.nn.softplus(side_logits_TX) + min_std


def add_noise(logits_TE: Array, std_TE: Array | float, key: Array | None) -> Array:
  """Normal noise; none without a key."""
  return logits_TE if key is None else logits_TE + std_TE * jax.random.normal(key, logits_TE.shape)


def win_probability(
  logits_TE: Array, noisy_TE: Array, std_TE: Array | float, k: int, with_self: bool = False
) -> Array:
  """[T, E], the probability that a new draw of an expert's noise alone puts it among the k best.

  1701.06538, eq. 8-9: the threshold is the k-th highest noisy logit of the other experts. That is the next one
  below for an expert among the k best, and the last one among them for all others. `with_self`: of all
  experts, as in V-MoE. Differentiable in everything that is an array, also through the threshold.
  """
  num_experts = logits_TE.shape[-1]
  if k == num_experts and not with_self:
    return jnp.ones_like(logits_TE)  # every expert is always among the best
  best_TK = select_top_k(noisy_TE, None, min(k + 1, num_experts))
  values_TK = take_experts(noisy_TE, best_TK)
  threshold_TE = values_TK[:, k - 1 : k]
  if not with_self:
    is_in_TE = jnp.any(best_TK[:, :k, None] == jnp.arange(num_experts)[None, None], axis=1)
    threshold_TE = jnp.where(is_in_TE, values_TK[:, k : k + 1], threshold_TE)
  return jax.scipy.special.ndtr((logits_TE - threshold_TE) / std_TE)


def real_tokens(values_TE: Array, mask_T: Array) -> Array:
  """0 for padding, which may hold numbers that overflow and would give gradients that are no numbers."""
  return jnp.where(mask_T[:, None], values_TE, 0)


def noisy_topk(num_experts: int, num_experts_per_token: int, min_std: float = 0.01) -> Router:
  """Noisy top-k (1701.06538, eq. 3-5 and appendix A): h = logits + std * normal, std = softplus(side logits).

  The weights are the softmax over the K highest h, so they sum to 1. Without a key (evaluation) there is no
  noise: h = logits. Logits and side logits start at 0: then noise alone chooses, all experts alike.

  The scores, which other balancers read, are the softmax of the logits without noise. A bias is added to the
  softmax of h, for the choice only. The smooth load is that without a bias.

  min_std: added to std, and above 0: the slope of the smooth load grows as 1 / std. The paper adds nothing;
    Tensor2Tensor has such a term.
  """
  if not min_std > 0:
    raise InputError(f"router noisy_topk: min_std must be above 0, got {min_std}")

  def route(
    logits_TE: Array,
    *,
    side_logits_TX: Array,
    bias_E: Array | None = None,
    key: Array | None = None,
    mask_T: Array | None = None,
  ) -> Routing:
    mask_T = full_mask(logits_TE, mask_T)
    clean_TE = real_tokens(logits_TE, mask_T)
    std_TE = learned_std(real_tokens(side_logits_TX, mask_T), min_std)
    noisy_TE = add_noise(clean_TE, std_TE, key)
    expert_TK = select_top_k(jax.nn.softmax(noisy_TE, axis=-1), bias_E, num_experts_per_token)
    weight_TK = jax.nn.softmax(take_experts(noisy_TE, expert_TK), axis=-1)
    return Routing(
      logits_TE,
      jax.nn.log_softmax(logits_TE, axis=-1),
      mask_T,
      token_major(expert_TK, weight_TK, mask_T),
      smooth_load_TE=win_probability(clean_TE, noisy_TE, std_TE, num_experts_per_token),
    )

  return Router(
    route, reads=("side_logits_TX",), gives_smooth_load=True, num_side_logits=num_experts, zero_init=True
  )


def vmoe_topk(num_experts: int, num_experts_per_token: int, noise: float = 1.0) -> Router:
  """V-MoE's router (2106.05974; as in its code, google-research/vmoe: vmoe/nn/routing.py): the noise is fixed,
  h = logits + noise / E * normal.

  Further differences from `noisy_topk`: the weights are the softmax of h among all experts, taken before the K
  highest are chosen; and the smooth load compares with the K-th highest h of all experts, that of the expert
  itself included.

  Its published losses are `importance_loss:0.005:group:scores` and `load_loss:0.005:group`.
  """
  if not noise > 0:
    raise InputError(
      f"router vmoe_topk: noise must be above 0, got {noise}; without any it is softmax_topk:before"
    )
  std = noise / num_experts

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    mask_T = full_mask(logits_TE, mask_T)
    clean_TE = real_tokens(logits_TE, mask_T)
    noisy_TE = add_noise(clean_TE, std, key)
    probs_TE = jax.nn.softmax(noisy_TE, axis=-1)
    expert_TK = select_top_k(probs_TE, bias_E, num_experts_per_token)
    return Routing(
      logits_TE,
      jax.nn.log_softmax(logits_TE, axis=-1),
      mask_T,
      token_major(expert_TK, take_experts(probs_TE, expert_TK), mask_T),
      smooth_load_TE=win_probability(clean_TE, noisy_TE, std, num_experts_per_token, with_self=True),
    )

  return Router(route, gives_smooth_load=True)
