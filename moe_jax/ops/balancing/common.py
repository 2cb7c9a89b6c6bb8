"""The balancer contract, and how several become one.

A balancer is shaped like an optax transformation: pure functions with explicit state. Its statistics are
sums of `observe` over everything that one optimizer step sees: all micro-batches, all devices.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.types import Array, BatchRouting, ExpertScale, PyTree, StepStats


class Balancer(NamedTuple):
  """Every field has a default that does nothing, so a method names only what it needs.

  init: number of experts -> state of one layer. Raises InputError if the method does not suit that number.
  bias: state -> bias_E that moves the choice of experts (or an `ExpertScale`), or None.
  losses: (state, routing, step_stats) -> name -> scalar, weight included. A mean over the valid
    tokens of `routing`, so the train step can weigh micro-batches by their number of tokens.
  observe: (state, routing) -> stats that add over micro-batches and devices. No gradient.
  update: (state, stats of the whole step) -> state, once per optimizer step, never in evaluation.
  needs_whole_step: `losses` reads `step_stats.whole`; with several micro-batches per step, the train step
    then makes a first pass that only observes.
  needs_sequences: `losses` or `observe` treats each sequence on its own, so a flat list of tokens will not do.
  suits: raises InputError if the method cannot work with a router, given as anything with the attributes of
    `moe_jax.nn.routers.Router` and the number of experts that it scores beyond those that have a network.
  """

  init: Callable[[int], PyTree] = lambda num_experts: ()
  bias: Callable[[PyTree], Array | ExpertScale | None] = lambda state: None
  losses: Callable[[PyTree, BatchRouting, StepStats], dict[str, Array]] = lambda state, routing, stats: {}
  observe: Callable[[PyTree, BatchRouting], PyTree] = lambda state, routing: ()
  update: Callable[[PyTree, PyTree], PyTree] = lambda state, stats: state
  needs_whole_step: bool = False
  needs_sequences: bool = False
  suits: Callable[[Any, int], None] = lambda router, num_further: None


def combine(balancers: Mapping[str, Balancer]) -> Balancer:
  """All of `balancers` at once: losses side by side, biases added, each its own state and stats."""
  names = tuple(balancers)
  parts = tuple(balancers.values())

  def bias(state):
    given = [b for b in (part.bias(s) for part, s in zip(parts, state, strict=True)) if b is not None]
    if len(given) > 1 and any(isinstance(b, ExpertScale) for b in given):
      raise InputError(
        f"balancers {', '.join(names)}: a bias that multiplies cannot be joined with another bias"
      )
    return given[0] if len(given) == 1 else sum(given) if given else None

  def losses(state, routing, step_stats):
    merged = {}
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
      found = part.losses(state[i], routing, StepStats(step_stats.whole[i], step_stats.so_far[i]))
      merged |= {name if len(found) == 1 else f"{name}/{key}": value for key, value in found.items()}
    return merged

  def suits(router, num_further):
    for part in parts:
      part.suits(router, num_further)

  return Balancer(
    init=lambda num_experts: tuple(part.init(num_experts) for part in parts),
    bias=bias,
    losses=losses,
    observe=lambda state, routing: tuple(p.observe(s, routing) for p, s in zip(parts, state, strict=True)),
    update=lambda state, stats: tuple(p.update(s, o) for p, s, o in zip(parts, state, stats, strict=True)),
    needs_whole_step=any(part.needs_whole_step for part in parts),
    needs_sequences=any(part.needs_sequences for part in parts),
    suits=suits,
  )


def normalized_scores(routing: BatchRouting) -> Array:
  """[B, L, E], scores divided by their sum over E: from logarithms, with no epsilon that a router could
  escape to by shrinking all its scores."""
  return jax.nn.softmax(routing.log_scores_BLE, axis=-1)


def token_mean(values_BL: Array, routing: BatchRouting) -> Array:
  """The mean over valid tokens; 0 without any. Padding may hold anything, also infinity."""
  total = jnp.sum(jnp.where(routing.mask_BL, values_BL, 0))
  return total / jnp.maximum(routing.mask_BL.sum(), 1)
