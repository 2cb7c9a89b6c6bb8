"""Balancing without a loss: a bias per expert that moves only the choice."""

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer


def loss_free_bias(rate: float = 0.001) -> Balancer:
  """Loss-free balancing (2408.15664, Algorithm 1): b_e += rate * sign(mean(counts) - counts_e).

  One update per optimizer step, from the counts of the whole step before capacity; the new bias acts
  on the next step, so no token's choice depends on later tokens. After n steps |b_e| <= n * rate.
  """
  if not rate >= 0:
    raise InputError(f"balancer loss_free_bias: rate must be 0 or more, got {rate}")
  return Balancer(
    init=lambda num_experts: jnp.zeros(num_experts, jnp.float32),
    bias=lambda bias_E: bias_E,
    observe=lambda state, routing: routing.selected_BLE.sum(axis=(0, 1)),
    # Not mean - count: XLA divides by a constant E with a rounded reciprocal, and balance would not be 0.
    update=lambda bias_E, counts_E: bias_E + rate * jnp.sign(counts_E.sum() - counts_E.size * counts_E),
  )
