"""Routers over feed-forward and zero-computation experts: MoE++ (2410.07348) and LongCat-Flash (2509.01322)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def moe_plus_plus(
  num_experts: int,
  num_experts_per_token: int,
  zeros: int = 1,
  copies: int = 1,
  constants: int = 2,
  normalize: bool = False,
) -> Choice:
  """Top-k of E feed-forward experts and Z = zeros + copies + constants zero-computation experts.

  Easy tokens use fewer feed-forward experts by choosing the others: `zero` computes 0, `copy` the input x,
  `constant` a mix of x and a learned vector (eq. 3-5). The defaults are the paper's 1, 1 and 2 for up to 16
  feed-forward experts. The loss is the balancer `heterogeneous_loss`.

  The choice is `choose(logits_TE, context) -> (routing, weight_TZ)`. logits_TE have E + Z columns:
  feed-forward experts first, then zero, copy and constant ones. weight_TZ, float32 and differentiable, are the
  weights of the zero-computation experts, 0 where one is not chosen and for padding.

  Zero-computation experts also have entries in the assignment, as experts E and above, so balancers and
  statistics count them. They take no capacity and never drop, although eq. 8 of the paper limits them too. The
  paper's capacity of a feed-forward expert, gamma tau T / (tau E + Z), is `capacity_factor`
  gamma tau E / (K (tau E + Z)). The gating residual (eq. 6) is left out: it adds the logits of the previous
  layer, and layers here do not see each other's routing.

  Args:
    zeros, copies, constants: how many there are of each kind.
    normalize: false: weights are the probabilities among all E + Z experts (eq. 1). true: these are divided by
      their sum over the chosen experts without the zero experts, as in the released code, so next to a zero
      expert the only other one has weight 1. (That code also doubles the layer's input. This does not.)
  """
  num_zero_computation = len(zero_computation_kinds(zeros, copies, constants))

  def choose(logits_TE: Array, context: RouterContext) -> tuple[Routing, Array]:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, context.bias_E, num_experts_per_token)
    if normalize:
      is_zero_TK = (expert_TK >= num_experts) & (expert_TK < num_experts + zeros)
      weight_TK = _softmax_of(take_experts(logits_TE, expert_TK), ~is_zero_TK)
    else:
      weight_TK = take_experts(scores_TE, expert_TK)
    weight_TZ = _weights_of_others(expert_TK, weight_TK, context.mask, num_experts, num_zero_computation)
    assignment = token_major(expert_TK, weight_TK, context.mask)
    return Routing(logits_TE, log_scores_TE, context.mask, assignment), weight_TZ

  return Choice(choose)


def longcat_topk(
  num_experts: int, num_experts_per_token: int, identities: int = 8, scale: float = 6.0
) -> Choice:
  """Top-k of E feed-forward experts and Z identity experts, which return their input (LongCat-Flash, 2509.01322).

  With s = softmax(x) over all E + Z, the K largest s + bias are chosen. Their weights are `scale` * s, not
  renormalised (from the released code). The released model has E = 512, Z = 256 and K = 12. The balancer
  `longcat_bias` sets how many feed-forward experts a token uses on average.

  The choice returns (routing, weight_TZ) as that of `moe_plus_plus` does.

  Args:
    identities: Z. The default is half of the default E, as in the released model.
    scale: what multiplies the weights. 6 fits the released sizes. With few experts, where s is larger, use 1.

  Raises:
    InputError: if there is no identity expert, or `scale` is not above 0.
  """
  if identities < 1:
    raise InputError(f"router longcat_topk: identities must be 1 or more, got {identities}")
  if not scale > 0:
    raise InputError(f"router longcat_topk: scale must be above 0, got {scale}")

  def choose(logits_TE: Array, context: RouterContext) -> tuple[Routing, Array]:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, context.bias_E, num_experts_per_token)
    weight_TK = scale * take_experts(scores_TE, expert_TK)
    weight_TZ = _weights_of_others(expert_TK, weight_TK, context.mask, num_experts, identities)
    assignment = token_major(expert_TK, weight_TK, context.mask)
    return Routing(logits_TE, log_scores_TE, context.mask, assignment), weight_TZ

  return Choice(choose)


def _weights_of_others(
  expert_TK: Array, weight_TK: Array, mask_T: Array, num_experts: int, num_others: int
) -> Array:
  """[T, Z]: the weights of the experts from `num_experts` on; 0 where one is not chosen and for padding."""
  is_chosen_TKZ = expert_TK[:, :, None] == num_experts + jnp.arange(num_others)[None, None, :]
  is_chosen_TKZ &= mask_T[:, None, None]
  return jnp.sum(jnp.where(is_chosen_TKZ, weight_TK[:, :, None], 0), axis=1)


def zero_computation_kinds(zeros: int, copies: int, constants: int) -> tuple[str, ...]:
  """The kind of each zero-computation expert, in the order of the logits: "zero", "copy" or "constant".

  Raises:
    InputError: a negative number, or no expert at all.
  """
  if min(zeros, copies, constants) < 0 or not (zeros or copies or constants):
    raise InputError(
      f"router moe_plus_plus: zeros={zeros}, copies={copies}, constants={constants} must be 0 or more, and not all 0"
    )
  return ("zero",) * zeros + ("copy",) * copies + ("constant",) * constants


def _softmax_of(logits_TK: Array, counts_TK: Array) -> Array:
  """The softmax over the entries that count; the others are 0, also where none counts."""
  # Not -inf: where no entry counts, the softmax would go through NaN.
  lowest = jnp.finfo(logits_TK.dtype).min
  weight_TK = jax.nn.softmax(jnp.where(counts_TK, logits_TK, lowest), axis=-1)
  return jnp.where(counts_TK, weight_TK, 0)
