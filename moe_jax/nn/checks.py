"""Checks that the parts of an MoE layer fit together, before anything is drawn or compiled."""

from moe_jax.errors import InputError, require_option
from moe_jax.nn.routers import Router
from moe_jax.ops.balancing import Balancer


def check_sizes(num_experts: int, num_experts_per_token: int) -> None:
  """Raises `InputError` unless a token can be sent to that many experts."""
  if not 1 <= num_experts_per_token <= num_experts:
    raise InputError(
      f"num_experts_per_token={num_experts_per_token}: must be between 1 and num_experts={num_experts}"
    )


def check_fit(router: Router, balancer: Balancer, num_experts: int) -> None:
  """Raises `InputError` if the balancer needs something that the router does not provide.

  E is `num_experts`.
  """
  require_option("the router", "weighs", router.weighs, ("output", "input"))
  num_scored_experts = router.num_scored_experts or num_experts
  bias = balancer.bias(balancer.init(num_scored_experts))
  if bias is not None and not router.takes_bias:
    raise InputError(
      "the balancer moves the choice by a bias, and the router takes none; use a loss, or no balancer"
    )
  balancer.suits(router, num_scored_experts - num_experts)


def check_flat(router: Router, balancer: Balancer) -> None:
  """Raises `InputError` if the router or balancer needs sequences. Called if the layer gets flat tokens."""
  wrong = "the layer was given flat tokens x_TD; give it x_BLD"
  if router.whole_sequences:
    raise InputError(f"the router decides for whole sequences, and {wrong}")
  if balancer.needs_sequences:
    raise InputError(f"the balancer balances within each sequence, and {wrong}, or choose scope=global_batch")
