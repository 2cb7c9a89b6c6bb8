"""The methods that a layer's configuration names, checked against each other before anything is compiled."""

from typing import NamedTuple

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError, unknown_name
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.dispatch import default_group_size
from moe_jax.ops.routing import Router, make_router
from moe_jax.registry import method_name, split_methods
from moe_jax.sharding.dispatchers import get_dispatcher


class LayerKind(NamedTuple):
  """What must be known of a kind of layer before one is made; `nn.transformer.LAYERS` makes them."""

  routes: bool  # has a router, which then says what leaks, and balancers, jitter and groups
  leaks: str = ""  # see `Router.leaks`


LAYER_KINDS = {"moe": LayerKind(routes=True), "soft_moe": LayerKind(routes=False, leaks="always")}


def layer_kind(config: MoEConfig) -> LayerKind:
  """Raises `InputError` on an unknown layer."""
  name = method_name(config.layer)
  if name not in LAYER_KINDS:
    raise unknown_name("layer", name, LAYER_KINDS)
  return LAYER_KINDS[name]


def router_of(config: MoEConfig) -> Router:
  return make_router(config.router, config.num_experts, config.num_experts_per_token)


def num_scored_experts(config: MoEConfig) -> int:
  """Experts that the router scores: those with a feed-forward network, and zero-computation ones."""
  extra = router_of(config).num_extra_logits if layer_kind(config).routes else 0
  return config.num_experts + extra


def check_methods(config: MoEConfig) -> None:
  """Raises `InputError` on an unknown method, or a router, balancer and dispatcher that do not fit."""
  config.check()
  get_dispatcher(config.dispatcher)
  if not layer_kind(config).routes:
    _check_unrouted(config)
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
  for number in balancer.zero_computation:
    if number != router.num_extra_logits:
      raise InputError(
        f"--balancers={config.balancers}: counts on {number} zero-computation experts, and --router={config.router} "
        f"has {router.num_extra_logits}; say zero_computation={router.num_extra_logits}"
      )


def _check_unrouted(config: MoEConfig) -> None:
  """A layer without a router would ignore these fields without a word."""
  for field in ("router", "balancers", "group_size", "jitter"):
    value, default = getattr(config, field), getattr(MoEConfig, field)
    if value != default:
      raise InputError(f"--{field}={value}: --layer={config.layer} does not route; leave it at {default}")


def leaks(config: MoEConfig) -> str:
  """See `Router.leaks`."""
  kind = layer_kind(config)
  return router_of(config).leaks if kind.routes else kind.leaks


def check_flat(config: MoEConfig) -> None:
  """Raises `InputError` where a method needs sequences, for tokens that come without."""
  wrong = "the layer was given flat tokens x_TD; give it x_BLD"
  if "sequence_T" in router_of(config).reads:
    raise InputError(f"--router={config.router}: decides for whole sequences, and {wrong}")
  if make_balancer(config.balancers).needs_sequences:
    raise InputError(
      f"--balancers={config.balancers}: balances within each sequence, and {wrong}, or choose scope=global_batch"
    )


def sees_later_tokens(config: MoEConfig) -> bool:
  """Whether a token's output depends on later tokens of its sequence."""
  when = leaks(config)
  return when == "always" or (when == "drops" and not get_dispatcher(config.dispatcher).never_drops)


def deciding_method(config: MoEConfig) -> tuple[str, str]:
  """(flag, value) of what decides which tokens an expert sees."""
  flag = "router" if layer_kind(config).routes else "layer"
  return flag, getattr(config, flag)


def check_causal(config: MoEConfig) -> None:
  """Raises `InputError` where a token's output would depend on later tokens, unless accepted by name."""
  flag, spec = deciding_method(config)
  name = method_name(spec)
  if not sees_later_tokens(config) or name in split_methods(config.accept_leaks):
    return
  where = {"always": "", "drops": " where capacity drops assignments (--dispatcher=dropless drops none)"}
  raise InputError(
    f"--{flag}={spec}: in a causal model its output depends on later tokens{where[leaks(config)]}; "
    f"to train it nonetheless, say --accept_leaks={name}"
  )


def group_size(config: MoEConfig, length: int) -> int:
  """Tokens per routing group for sequences of `length` tokens.

  Raises:
    InputError: the router needs whole sequences and the groups cut them.
  """
  if not layer_kind(config).routes:
    return length
  if "sequence_T" not in router_of(config).reads:
    return config.group_size or default_group_size(config.dispatcher, length)
  if config.group_size % length:
    raise InputError(
      f"--group_size={config.group_size}: router {method_name(config.router)} decides for whole sequences; use a "
      f"multiple of sequence_length={length}, or 0"
    )
  return config.group_size or length
