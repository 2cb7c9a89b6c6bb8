"""MoE++'s router over feed-forward and zero-computation experts (2410.07348)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Router, full_mask, select_top_k, take_experts, token_major
from moe_jax.types import Array, Routing


def moe_plus_plus(
  num_experts: int,
  num_experts_per_token: int,
  zeros: int = 1,
  copies: int = 1,
  constants: int = 2,
  normalize: bool = False,
) -> Router:
  """Top-K of E feed-forward experts and Z = zeros + copies + constants that compute next to nothing.

  An easy token takes fewer feed-forward experts by choosing others: `zero` gives 0, `copy` gives x, `constant`
  a mix of x and a learned vector (eq. 3-5). The logits have E + Z columns, feed-forward experts first, then
  zero, copy and constant ones. The defaults are the paper's 1/1/2 for up to 16 feed-forward experts.

  normalize=false: weights are the probabilities among all E + Z experts (eq. 1).
  normalize=true: divided by their sum over the chosen experts, zero experts left out, as in the released
    code: next to a zero expert the other one has weight 1. (That code doubles the layer's input besides; not here.)

  Entries of zero-computation experts stay in the assignment (expert E or above), so balancers and statistics
  count them; they take no capacity and never drop, while the paper's eq. 8 limits them too. Its capacity of a
  feed-forward expert, gamma tau T / (tau E + Z), is `capacity_factor` gamma tau E / (K (tau E + Z)).
  The loss is the balancer `heterogeneous_loss`. The gating residual (eq. 6), which adds the previous layer's
  logits, is left out: layers here do not see each other's routing.
  """
  kinds = ("zero",) * zeros + ("copy",) * copies + ("constant",) * constants
  if min(zeros, copies, constants) < 0 or not kinds:
    raise InputError(
      f"router moe_plus_plus: zeros={zeros}, copies={copies}, constants={constants} must be 0 or more, and not all 0"
    )

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    del key
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, bias_E, num_experts_per_token)
    if normalize:
      is_zero_TK = (expert_TK >= num_experts) & (expert_TK < num_experts + zeros)
      weight_TK = _softmax_of(take_experts(logits_TE, expert_TK), ~is_zero_TK)
    else:
      weight_TK = take_experts(scores_TE, expert_TK)
    is_bypass_TKZ = expert_TK[:, :, None] == num_experts + jnp.arange(len(kinds))[None, None, :]
    taken_TKZ = is_bypass_TKZ & mask_T[:, None, None]
    bypass_TZ = jnp.sum(jnp.where(taken_TKZ, weight_TK[:, :, None], 0), axis=1)
    assignment = token_major(expert_TK, weight_TK, mask_T)
    return Routing(logits_TE, log_scores_TE, mask_T, assignment, bypass_TZ=bypass_TZ)

  return Router(route, num_extra_logits=len(kinds), bypass=kinds)


def _softmax_of(logits_TK: Array, counts_TK: Array) -> Array:
  """The softmax over the entries that count; the others are 0, also where none counts."""
  # Not -inf: where no entry counts, the softmax would go through NaN.
  lowest = jnp.finfo(logits_TK.dtype).min
  weight_TK = jax.nn.softmax(jnp.where(counts_TK, logits_TK, lowest), axis=-1)
  return jnp.where(counts_TK, weight_TK, 0)
