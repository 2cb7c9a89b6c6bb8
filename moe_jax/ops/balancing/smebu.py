"""SMEBU: a bias that follows the load smoothly and with momentum."""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer
from moe_jax.types import Array, BatchRouting


class MomentumBias(NamedTuple):
  """The state of a bias that moves with momentum."""

  bias_E: Array  # float32
  momentum_E: Array  # float32, the average of past moves


def smebu(rate: float = 5e-4, kappa: float = 2.0, beta: float = 0.5) -> Balancer:
  """Soft-clamped momentum expert bias updates (Trinity Large, 2602.17004; formulas from the paper).

  After each optimizer step, with the counts n of tokens per expert before capacity:

    v = (mean(n) - n) / mean(n)           1 for an expert without tokens, 0 at balance
    d = rate * tanh(kappa * v), d = d - mean(d)
    m = beta * m + (1 - beta) * d
    b = b + m

  Unlike the sign in `loss_free_bias`, the moves vanish at balance, and no load makes a bias move by more than
  2 `rate`. As there, the bias changes only the choice, from the next step on. Without tokens v is 0 (our choice).

  Args:
    rate: the limit of a move before centring, in units of the score; the paper's lambda.
    kappa: how steeply the moves follow small errors.
    beta: the momentum, in [0, 1).

  State: `MomentumBias`. Statistics: counts_E [E].

  Raises:
    InputError: if an option is out of range.
  """
  for name, value, right, want in (
    ("rate", rate, rate >= 0, "0 or more"),
    ("kappa", kappa, kappa > 0, "above 0"),
    ("beta", beta, 0 <= beta < 1, "in [0, 1)"),
  ):
    if not right:
      raise InputError(f"balancer smebu: {name} must be {want}, got {value}")

  def init(num_experts: int) -> MomentumBias:
    return MomentumBias(jnp.zeros(num_experts, jnp.float32), jnp.zeros(num_experts, jnp.float32))

  def count(state: MomentumBias, routing: BatchRouting) -> Array:
    return routing.selected_BLE.sum(axis=(0, 1))

  def update(state: MomentumBias, counts_E: Array) -> MomentumBias:
    # Not mean - count, which XLA may round to another value than 0 at balance.
    violation_E = (counts_E.sum() - counts_E.size * counts_E) / jnp.maximum(counts_E.sum(), 1)
    move_E = rate * jnp.tanh(kappa * violation_E)
    momentum_E = beta * state.momentum_E + (1 - beta) * (move_E - move_E.mean())
    return MomentumBias(state.bias_E + momentum_E, momentum_E)

  return Balancer(init=init, bias=lambda state: state.bias_E, observe=count, update=update)
