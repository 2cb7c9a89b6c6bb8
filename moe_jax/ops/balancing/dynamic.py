"""Losses of methods whose tokens take varying numbers of experts."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer, normalized_scores, token_mean
from moe_jax.ops.balancing.losses import all_choices, load_balancing
from moe_jax.types import BatchRouting


def entropy_loss(weight: float = 0.0001) -> Balancer:
  """The dynamic loss of top-p routing: the mean over tokens of -sum_e p_e log p_e, in nats (2403.07652).

  A peaked distribution passes `p` with fewer experts, so it keeps the router `top_p` from taking all of them.
  It balances nothing: the paper adds a load-balancing loss (`switch_loss`).
  """

  def losses(state, routing, step_stats):
    log_probs_BLE = jax.nn.log_softmax(routing.log_scores_BLE, axis=-1)
    entropy_BL = -jnp.sum(jnp.exp(log_probs_BLE) * log_probs_BLE, axis=-1)
    return {"entropy_loss": weight * token_mean(entropy_BL, routing)}

  return Balancer(losses=losses)


def heterogeneous_loss(
  weight: float = 0.01, zero_computation: int = 4, tau: float = 0.75, scope: str = "global_batch"
) -> Balancer:
  """MoE++'s load-balancing loss sum_i eta_i f_i p_i, with eta = tau for zero-computation experts (2410.07348, eq. 7).

  A smaller `tau` sends more tokens to zero-computation experts: the loss wants an expert's share to be
  proportional to 1/eta, which is tau / (tau E + Z) for each of the E feed-forward experts and 1 / (tau E + Z) for
  each of the Z others, as in eq. 8. Written as sum_i load_i importance_i / share_i it is the paper's sum times
  (tau E + Z) / (tau K), so that it is 1 at those shares, whatever E, Z, K and tau; `tau` 1 is `switch_loss`.

  `zero_computation` is Z, the last columns of the router: 4 for the defaults of the router `moe_plus_plus`.
  """
  if zero_computation < 0 or not tau > 0:
    raise InputError(
      "balancer heterogeneous_loss: zero_computation must be 0 or more and tau above 0, "
      f"got {zero_computation} and {tau}"
    )

  def init(num_experts: int) -> tuple[()]:
    if num_experts <= zero_computation:
      raise InputError(
        f"balancer heterogeneous_loss: zero_computation={zero_computation} leaves no feed-forward expert among the "
        f"{num_experts} that the router scores; use router moe_plus_plus"
      )
    return ()

  def suits(router: Any, num_further: int) -> None:
    if num_further != zero_computation:
      raise InputError(
        f"balancer heterogeneous_loss: counts on {zero_computation} zero-computation experts, and the router has "
        f"{num_further}; say zero_computation={num_further}"
      )

  def importance(routing: BatchRouting):
    num_experts = routing.logits_BLE.shape[-1]
    is_ffn_E = jnp.arange(num_experts) < num_experts - zero_computation
    share_E = jnp.where(is_ffn_E, tau, 1.0)
    # load_balancing multiplies by the number of experts, which is 1 / share for equal shares.
    return normalized_scores(routing) / (num_experts * share_E / share_E.sum())[None, None]

  return load_balancing(weight, scope, all_choices, importance=importance)._replace(
    init=init, suits=suits
  )
