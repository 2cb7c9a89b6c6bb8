"""Top-k of noisy logits: noise spreads the choice, and makes the load of an expert differentiable.

The number of tokens that an expert gets is a count and has no gradient. The probability that it would get a
token if its noise were drawn again has one. That is the smooth load, which `load_loss` balances.
"""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def learned_std(noise_logits_TX: Array, min_std: float) -> Array:
  """The standard deviation of the noise, learned per token and expert (1701.06538, eq. 4)."""
  return jax.nn.softplus(noise_logits_TX) + min_std


def add_noise(logits_TX: Array, std_TX: Array | float, key: Array | None) -> Array:
  """Normal noise; none without a key."""
  if key is None:
    return logits_TX
  return logits_TX + std_TX * jax.random.normal(key, logits_TX.shape, logits_TX.dtype)


def win_probability(
  logits_TX: Array, noisy_TX: Array, std_TX: Array | float, k: int, with_self: bool = False
) -> Array:
  """[T, X], the probability that an expert is among the k best if only its own noise is drawn again.

  1701.06538, eq. 8-9. An expert is compared with the k-th highest noisy logit of the other experts: for one of
  the k best experts that is the (k+1)-th highest of all, otherwise the k-th highest. With `with_self` it is
  always the k-th highest of all experts, as in V-MoE. Differentiable in every array, also through what an
  expert is compared with.
  """
  num = logits_TX.shape[-1]
  if k == num and not with_self:
    return jnp.ones_like(logits_TX)  # every expert is always among the best
  best_TY = select_top_k(noisy_TX, None, min(k + 1, num))
  values_TY = take_experts(noisy_TX, best_TY)
  threshold_TX = jnp.broadcast_to(values_TY[:, k - 1 : k], logits_TX.shape)
  if not with_self:
    is_in_TX = jnp.any(best_TY[:, :k, None] == jnp.arange(num)[None, None], axis=1)
    threshold_TX = jnp.where(is_in_TX, values_TY[:, k : k + 1], threshold_TX)
  return jax.scipy.special.ndtr((logits_TX - threshold_TX) / std_TX)


def real_tokens(values_TX: Array, mask_T: Array) -> Array:
  """`values_TX` with 0 for padding, whose values could overflow and make gradients NaN."""
  return jnp.where(mask_T[:, None], values_TX, 0)


def noisy_topk(num_experts: int, num_experts_per_token: int, min_std: float = 0.01) -> Choice:
  """Noisy top-k (1701.06538, eq. 3-5 and appendix A): h = logits + std * normal, std = softplus(noise logits).

  The choice is `choose(logits_TE, noise_logits_TE, context)`; both arguments are learned projections, which
  start at zero. So noise alone chooses at first, and all experts are equally likely.

  The weights are the softmax over the K highest h, so they sum to 1. Without a key, as in evaluation, there is
  no noise and h = logits. Scores, which balancers read, are the softmax of the logits without noise. A bias is
  added to the softmax of h for the choice only, and the smooth load ignores it.

  Args:
    min_std: added to std, above 0. Without it the slope of the smooth load, which grows as 1 / std, has no
      bound. The paper has no such term; Tensor2Tensor has.
  """
  if not min_std > 0:
    raise InputError(f"router noisy_topk: min_std must be above 0, got {min_std}")

  def choose(logits_TE: Array, noise_logits_TE: Array, context: RouterContext) -> Routing:
    clean_TE = real_tokens(logits_TE, context.mask)
    std_TE = learned_std(real_tokens(noise_logits_TE, context.mask), min_std)
    noisy_TE = add_noise(clean_TE, std_TE, context.key)
    expert_TK = select_top_k(jax.nn.softmax(noisy_TE, axis=-1), context.bias_E, num_experts_per_token)
    weight_TK = jax.nn.softmax(take_experts(noisy_TE, expert_TK), axis=-1)
    return Routing(
      logits_TE,
      jax.nn.log_softmax(logits_TE, axis=-1),
      context.mask,
      token_major(expert_TK, weight_TK, context.mask),
      smooth_load_TE=win_probability(clean_TE, noisy_TE, std_TE, num_experts_per_token),
    )

  return Choice(choose, gives_smooth_load=True, zero_init=True)


def vmoe_topk(num_experts: int, num_experts_per_token: int, noise: float = 1.0) -> Choice:
  """V-MoE's router (2106.05974), as in its code (google-research/vmoe, vmoe/nn/routing.py).

  The noise has a fixed size: h = logits + noise / E * normal. There are two more differences from
  `noisy_topk`. The weights are the softmax of h over all experts, taken before the K highest are chosen. The
  smooth load compares with the K-th highest h of all experts, the expert itself included.

  Its published losses are `importance_loss:0.005:group:scores` and `load_loss:0.005:group`.
  """
  if not noise > 0:
    raise InputError(
      f"router vmoe_topk: noise must be above 0, got {noise}; without any it is softmax_topk:before"
    )
  std = noise / num_experts

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    clean_TE = real_tokens(logits_TE, context.mask)
    noisy_TE = add_noise(clean_TE, std, context.key)
    probs_TE = jax.nn.softmax(noisy_TE, axis=-1)
    expert_TK = select_top_k(probs_TE, context.bias_E, num_experts_per_token)
    return Routing(
      logits_TE,
      jax.nn.log_softmax(logits_TE, axis=-1),
      context.mask,
      token_major(expert_TK, take_experts(probs_TE, expert_TK), context.mask),
      smooth_load_TE=win_probability(clean_TE, noisy_TE, std, num_experts_per_token, with_self=True),
    )

  return Choice(choose, gives_smooth_load=True)
