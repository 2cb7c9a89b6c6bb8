"""ReMoE's loss: it makes the weights of a ReLU router sparse and the load even, with a coefficient that adapts."""

from typing import Any

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer
from moe_jax.ops.balancing.losses import all_choices, load_balancing
from moe_jax.types import Array, BatchRouting

_LOWEST, _HIGHEST = (
  1e-30,
  1e30,
)  # of the coefficient; keeps it a float32 above 0 where the target is out of reach


def remoe_loss(start: float = 1e-8, factor: float = 1.2, scope: str = "micro_batch") -> Balancer:
  """The load-balancing L1 loss of ReMoE (2412.14711; formula and rule from the released code).

  With the counts n of tokens per expert and the weights w = relu(x), the loss over T tokens is

    lambda * sum_e E / (K T) * n_e * (1 / T) sum_t w_te

  which is the L1 norm of the weights of a token if the load is even and K experts are used, and pulls harder on
  experts with more tokens. n has no gradient. After each optimizer step, lambda becomes lambda * `factor` if a
  token used more than K experts on average (a sparsity 1 - n/(T E) below 1 - K/E), and lambda / `factor` if it
  used fewer. From 1e-8, it takes some 80 steps until the loss matters; meanwhile about half of the experts are
  used.

  The released code has one lambda for the whole model, and compares the mean sparsity of all layers. Here each
  layer has its own. It stays within [1e-30, 1e30], and does not change without tokens (our choice).

  Args:
    start: the first lambda.
    factor: above 1.
    scope: what n is counted over, as in `switch_loss`.

  State: lambda. Statistics: n [E] and K T, of the whole step.

  Raises:
    InputError: if an option is out of range, or the router does not choose by weights above 0.
  """
  if not start > 0:
    raise InputError(f"balancer remoe_loss: start must be above 0, got {start}")
  if not factor > 1:
    raise InputError(f"balancer remoe_loss: factor must be above 1, got {factor}")

  def count(routing: BatchRouting) -> dict[str, Array]:
    slots_BL = routing.num_experts_per_token * routing.mask_BL.astype(jnp.float32)
    return {"experts": all_choices(routing), "slots": slots_BL}

  def load(sums: dict[str, Array]) -> Array:
    return sums["experts"] / jnp.maximum(sums["slots"], 1)[:, None]

  def observe(state: Array, routing: BatchRouting) -> dict[str, Array]:
    return {name: x.sum(axis=(0, 1)) for name, x in count(routing).items()}

  def losses(state: Array, routing: BatchRouting, step_stats) -> dict[str, Array]:
    return {name: state * loss for name, loss in fixed.losses((), routing, step_stats).items()}

  def update(state: Array, of_step: dict[str, Array]) -> Array:
    direction = jnp.sign(of_step["experts"].sum() - of_step["slots"])
    return jnp.clip(state * factor**direction, _LOWEST, _HIGHEST)

  def suits(router: Any, num_further: int) -> None:
    if not router.sparse_weights:
      raise InputError(
        "balancer remoe_loss: sets how many experts have a weight above 0, and this router chooses otherwise; "
        "use router remoe"
      )

  fixed = load_balancing(1.0, scope, count, load, importance=lambda routing: routing.weights_BLE)
  init = lambda num_experts: jnp.float32(start)
  return fixed._replace(init=init, losses=losses, observe=observe, update=update, suits=suits)
