"""Balancers keep experts evenly loaded. There is one factory per method and one file per family of methods."""

from collections.abc import Sequence

from moe_jax.errors import InputError
from moe_jax.ops.balancing.adaptive import adaptive_loss
from moe_jax.ops.balancing.bias import loss_free_bias, multiplicative_bias
from moe_jax.ops.balancing.common import Balancer, combine
from moe_jax.ops.balancing.deepseek import communication_loss, device_loss, sequence_loss
from moe_jax.ops.balancing.deviation import squared_deviation_loss
from moe_jax.ops.balancing.dynamic import entropy_loss, heterogeneous_loss
from moe_jax.ops.balancing.importance import importance_loss, load_loss
from moe_jax.ops.balancing.longcat import longcat_bias
from moe_jax.ops.balancing.losses import gshard_loss, st_moe_loss, switch_loss, z_loss
from moe_jax.ops.balancing.quantile import quantile_balancing
from moe_jax.ops.balancing.remoe import remoe_loss
from moe_jax.ops.balancing.smebu import smebu
from moe_jax.ops.balancing.threshold import expert_threshold
from moe_jax.ops.once import made_once
from moe_jax.registry import Method, Registry, Spec


def none() -> Balancer:
  """No balancing."""
  return Balancer()


BALANCERS = Registry(
  "balancer",
  {
    "none": none,
    "switch_loss": switch_loss,
    "gshard_loss": gshard_loss,
    "st_moe_loss": st_moe_loss,
    "sequence_loss": sequence_loss,
    "device_loss": device_loss,
    "communication_loss": communication_loss,
    "squared_deviation_loss": squared_deviation_loss,
    "adaptive_loss": adaptive_loss,
    "z_loss": z_loss,
    "entropy_loss": entropy_loss,
    "heterogeneous_loss": heterogeneous_loss,
    "remoe_loss": remoe_loss,
    "importance_loss": importance_loss,
    "load_loss": load_loss,
    "loss_free_bias": loss_free_bias,
    "multiplicative_bias": multiplicative_bias,
    "quantile_balancing": quantile_balancing,
    "expert_threshold": expert_threshold,
    "smebu": smebu,
    "longcat_bias": longcat_bias,
  },
)


def make_balancer(specs: Spec | Sequence[Spec]) -> Balancer:
  """`"switch_loss:0.01,z_loss:0.001"` -> the combination of the balancers that they name."""
  return combined(BALANCERS.resolve_all(specs))


def combined(methods: Sequence[Method]) -> Balancer:
  """All of `methods` at once. A repeated name gets a number."""
  named = [(method.name, method) for method in methods]
  if any(method.source for method in methods):  # a user's, see `made_once`
    return _combined(*named)
  return made_once(_combined, *named)


def _combined(*methods: tuple[str, Method]) -> Balancer:
  parts: dict[str, Balancer] = {}
  for name, method in methods:
    number = sum(known.split("#")[0] == name for known in parts) + 1
    part = _made(name, method)
    if not isinstance(part, Balancer):
      raise InputError(
        f"balancer {name}: its factory returned {type(part).__name__}; it must return a Balancer"
      )
    parts[name if number == 1 else f"{name}#{number}"] = part
  return combine(parts)


def _made(name: str, method: Method) -> Balancer:
  """Makes one balancer. The message of an `InputError` about its options begins with its name."""
  try:
    return method()
  except InputError as error:
    text = str(error)
    raise error if text.startswith("balancer ") else InputError(f"balancer {name}: {text}") from None


def balancer_of(balancer: Spec | Sequence[Spec] | Balancer) -> Balancer:
  """A balancer as it is, or what specs of balancers make."""
  return balancer if isinstance(balancer, Balancer) else make_balancer(balancer)


__all__ = ["BALANCERS", "Balancer", "balancer_of", "combine", "make_balancer"]
