"""Machines, and routings laid out on them, for the tests of communication."""

import numpy as np

from moe_jax.analysis.communication import simulate as com
from moe_jax.analysis.communication.machine import Machine

SMALL = Machine(nodes=2, devices_per_node=2)  # devices 0 and 1, 2 and 3
UNEVEN = Machine(nodes=3, devices_per_node=4)


def lay(machine: Machine, expert_TK, num_experts: int) -> com.Routed:
  """Tokens and experts in equal parts in order."""
  expert_TK = np.asarray(expert_TK)
  tokens, k = expert_TK.shape
  return com.Routed(
    machine.place(tokens, "tokens"),
    machine.place(num_experts, "experts"),
    np.repeat(np.arange(tokens), k),
    expert_TK.reshape(-1),
  )


def draw(machine: Machine, rng, tokens=48, experts=24, k=4) -> com.Routed:
  """K different experts per token, the first ones more often."""
  share_E = np.arange(experts, 0, -1.0) ** 2
  chosen = [rng.choice(experts, k, replace=False, p=share_E / share_E.sum()) for _ in range(tokens)]
  return lay(machine, chosen, experts)


def arrows(counts_PP) -> dict:
  return {(int(p), int(q)): int(counts_PP[p, q]) for p, q in np.argwhere(counts_PP)}
