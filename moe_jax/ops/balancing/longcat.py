"""LongCat-Flash's bias: how many feed-forward experts a token uses, and that these are used evenly."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer
from moe_jax.types import Array, BatchRouting


class Counts(NamedTuple):
  """Sums over the tokens of a step."""

  counts_E: Array  # tokens per expert before capacity, float32
  tokens: Array  # float32
  slots: Array  # K times the tokens, float32


def longcat_bias(
  rate: float = 0.01, ffn_experts_per_token: float = 0.0, zero_computation: int = 8
) -> Balancer:
  """The bias of LongCat-Flash (2509.01322, formula from the paper), for a router with zero-computation experts.

  With N feed-forward and Z other experts, K experts per token, T tokens in the step and counts n before capacity:

    b_i += rate * (K_e / (K N) - n_i / (K T))     for the N feed-forward experts; all others keep b = 0

  It rests where every feed-forward expert has K_e T / N tokens, so a token uses K_e of them on average. The
  others need no balance among themselves, because they compute nothing.

  The paper lets the rate decay, and adds a loss over groups of devices. We have neither. Its rate is not known to
  us; the default is our choice. The errors are of the size 1/N, as softmax scores are, so it holds for any N.

  Args:
    rate: the paper's mu, in units of the score.
    ffn_experts_per_token: K_e, between 0 and K. 0: K N / (N + Z), the uniform share. The released model has
      about 8 of K = 12 (from memory, not re-read), which is that share for N = 512 and Z = 256.
    zero_computation: Z: the last Z columns of the router are zero-computation experts. The default of the router
      `longcat_topk` has 8.

  State: bias_E [N + Z]. Statistics: `Counts`.

  Raises:
    InputError: if an option is out of range, or the router has another number of zero-computation experts.
  """
  for name, value, right in (
    ("rate", rate, rate >= 0),
    ("ffn_experts_per_token", ffn_experts_per_token, ffn_experts_per_token >= 0),
    ("zero_computation", zero_computation, zero_computation >= 1),
  ):
    if not right:
      least = 1 if name == "zero_computation" else 0
      raise InputError(f"balancer longcat_bias: {name} must be {least} or more, got {value}")

  def init(num_experts: int) -> Array:
    if num_experts <= zero_computation:
      raise InputError(
        f"balancer longcat_bias: zero_computation={zero_computation} leaves no feed-forward expert among the "
        f"{num_experts} that the router scores; use router longcat_topk"
      )
    return jnp.zeros(num_experts, jnp.float32)

  def suits(router: Any, num_further: int) -> None:
    if num_further != zero_computation:
      raise InputError(
        f"balancer longcat_bias: counts on {zero_computation} zero-computation experts, and the router has "
        f"{num_further}; say zero_computation={num_further}"
        if num_further
        else "balancer longcat_bias: the router has no zero-computation experts; use router longcat_topk"
      )

  def observe(bias_E: Array, routing: BatchRouting) -> Counts:
    k = routing.num_experts_per_token
    if ffn_experts_per_token > k:
      raise InputError(
        f"balancer longcat_bias: ffn_experts_per_token={ffn_experts_per_token} is more than the {k} experts of a "
        "token"
      )
    tokens = routing.mask_BL.sum().astype(jnp.float32)
    return Counts(routing.selected_BLE.sum(axis=(0, 1)), tokens, k * tokens)

  def update(bias_E: Array, of_step: Counts) -> Array:
    num_experts = bias_E.size
    num_ffn = num_experts - zero_computation
    uniform = of_step.slots * num_ffn / num_experts
    target = (ffn_experts_per_token * of_step.tokens if ffn_experts_per_token else uniform) / num_ffn
    error_E = (target - of_step.counts_E) / jnp.maximum(of_step.slots, 1)
    return bias_E + rate * jnp.where(jnp.arange(num_experts) < num_ffn, error_E, 0)

  return Balancer(init=init, bias=lambda bias_E: bias_E, observe=observe, update=update, suits=suits)
