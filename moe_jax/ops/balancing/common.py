"""The balancer contract, and how several become one.

A balancer is shaped like an optax transformation: pure functions with explicit state. `step_stats`
is the sum of `observe` over everything that one optimizer step sees: all micro-batches, all devices.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_jax.types import Array, BatchRouting, PyTree


class Balancer(NamedTuple):
  """Every field has a default that does nothing, so a method names only what it needs.

  init: number of experts -> state of one layer.
  bias: state -> bias_E that moves the choice of experts, or None.
  losses: (state, routing, step_stats) -> name -> scalar, weight included. A mean over the valid
    tokens of `routing`, so the train step can weigh micro-batches by their number of tokens.
  observe: routing -> stats that add over micro-batches and devices. No gradient.
  update: (state, step_stats) -> state, once per optimizer step, never in evaluation.
  needs_step_stats: `losses` reads `step_stats`; with several micro-batches per step, the train step
    then makes a first pass that only observes.
  """

  init: Callable[[int], PyTree] = lambda num_experts: ()
  bias: Callable[[PyTree], Array | None] = lambda state: None
  losses: Callable[[PyTree, BatchRouting, PyTree], dict[str, Array]] = lambda state, routing, step_stats: {}
  observe: Callable[[BatchRouting], PyTree] = lambda routing: ()
  update: Callable[[PyTree, PyTree], PyTree] = lambda state, step_stats: state
  needs_step_stats: bool = False


def combine(balancers: Mapping[str, Balancer]) -> Balancer:
  """All of `balancers` at once: losses side by side, biases added, each its own state and stats."""
  names = tuple(balancers)
  parts = tuple(balancers.values())

  def bias(state):
    given = [b for b in (part.bias(s) for part, s in zip(parts, state, strict=True)) if b is not None]
    return sum(given) if given else None

  def losses(state, routing, step_stats):
    merged = {}
    for name, part, s, stats in zip(names, parts, state, step_stats, strict=True):
      found = part.losses(s, routing, stats)
      merged |= {name if len(found) == 1 else f"{name}/{key}": value for key, value in found.items()}
    return merged

  return Balancer(
    init=lambda num_experts: tuple(part.init(num_experts) for part in parts),
    bias=bias,
    losses=losses,
    observe=lambda routing: tuple(part.observe(routing) for part in parts),
    update=lambda state, stats: tuple(p.update(s, o) for p, s, o in zip(parts, state, stats, strict=True)),
    needs_step_stats=any(part.needs_step_stats for part in parts),
  )
