"""Balancers keep experts evenly loaded. There is one factory per method and one file per family of methods."""

from moe_jax.ops.balancing.adaptive import adaptive_loss
from moe_jax.ops.balancing.bias import loss_free_bias, multiplicative_bias
from moe_jax.ops.balancing.common import Balancer, combine
from moe_jax.ops.balancing.deepseek import communication_loss, device_loss, sequence_loss
from moe_jax.ops.balancing.deviation import squared_deviation_loss
from moe_jax.ops.balancing.dynamic import entropy_loss, heterogeneous_loss
from moe_jax.ops.balancing.importance import importance_loss, load_loss
from moe_jax.ops.balancing.losses import gshard_loss, st_moe_loss, switch_loss, z_loss
from moe_jax.ops.balancing.quantile import quantile_balancing
from moe_jax.registry import build, method_name, split_methods


def none() -> Balancer:
  """No balancing."""
  return Balancer()


BALANCERS = {
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
  "importance_loss": importance_loss,
  "load_loss": load_loss,
  "loss_free_bias": loss_free_bias,
  "multiplicative_bias": multiplicative_bias,
  "quantile_balancing": quantile_balancing,
}


def make_balancer(spec: str) -> Balancer:
  """Returns the combination of balancers that e.g. `"switch_loss:0.01,z_loss:0.001"` names.

  Repeated names are numbered.
  """
  parts: dict[str, Balancer] = {}
  for part in split_methods(spec):
    name = method_name(part)
    number = sum(known.split("#")[0] == name for known in parts) + 1
    parts[name if number == 1 else f"{name}#{number}"] = build("balancer", BALANCERS, part)
  return combine(parts)


__all__ = ["BALANCERS", "Balancer", "combine", "make_balancer"]
