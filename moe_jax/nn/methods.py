"""The methods that a layer's configuration names, checked against each other before anything is compiled."""

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.dispatch import NEVER_DROPS, default_group_size, get_dispatcher
from moe_jax.ops.methods import method_name, split_methods
from moe_jax.ops.routing import Router, make_router


def router_of(config: MoEConfig) -> Router:
  return make_router(config.router, config.num_experts, config.num_experts_per_token)


def num_scored_experts(config: MoEConfig) -> int:
  """Experts that the router scores: those with a feed-forward network, and zero-computation ones."""
  return config.num_experts + router_of(config).num_extra_logits


def check_methods(config: MoEConfig) -> None:
  """Raises `InputError` on an unknown method, or a router, balancer and dispatcher that do not fit."""
  config.check()
  get_dispatcher(config.dispatcher)
  router, balancer = router_of(config), make_balancer(config.balancers)
  bias = balancer.bias(balancer.init(num_scored_experts(config)))
  if bias is not None and not router.takes_bias:
    raise InputError(
      f"--balancers={config.balancers}: moves the choice by a bias, and router {method_name(config.router)} "
      "takes none; use a loss, or none"
    )
  if balancer.needs_smooth_load and not router.gives_smooth_load:
    raise InputError(
      f"--balancers={config.balancers}: reads the smooth load, which router {method_name(config.router)} does "
      "not give; use --router=noisy_topk"
    )


def sees_later_tokens(config: MoEConfig) -> bool:
  """Whether a token's output depends on later tokens of its sequence."""
  leaks = router_of(config).leaks
  return leaks == "always" or (leaks == "drops" and config.dispatcher not in NEVER_DROPS)


def check_causal(config: MoEConfig) -> None:
  """Raises `InputError` where a token's output would depend on later tokens, unless accepted by name."""
  router = router_of(config)
  name = method_name(config.router)
  if not sees_later_tokens(config) or name in split_methods(config.accept_leaks):
    return
  where = {"always": "", "drops": " where capacity drops assignments (--dispatcher=dropless drops none)"}
  raise InputError(
    f"--router={config.router}: in a causal model its choices depend on later tokens{where[router.leaks]}; "
    f"to train it nonetheless, say --accept_leaks={name}"
  )


def group_size(config: MoEConfig, length: int) -> int:
  """Tokens per routing group for sequences of `length` tokens.

  Raises:
    InputError: the router needs whole sequences and the groups cut them.
  """
  if "sequence_T" not in router_of(config).reads:
    return config.group_size or default_group_size(config.dispatcher, length)
  if config.group_size % length:
    raise InputError(
      f"--group_size={config.group_size}: router {method_name(config.router)} decides for whole sequences; use a "
      f"multiple of sequence_length={length}, or 0"
    )
  return config.group_size or length
