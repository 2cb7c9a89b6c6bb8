"""The interface of balancers, and a function that combines several into one.

A balancer resembles an optax transformation: pure functions with explicit state. Its statistics are sums of
`observe` over everything that one optimizer step sees: all micro-batches and all devices.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.types import Array, BatchRouting, ExpertScale, PyTree, StepStats


class Balancer(NamedTuple):
  """A balancing method. Every field has a default that does nothing, so a method sets only what it needs.

  init: number of experts -> state of one layer. Raises InputError if the method does not support that number.
  bias: state -> bias_E that changes the choice of experts (or an `ExpertScale`), or None.
  losses: (state, routing, step_stats) -> name -> scalar, including the weight. Each is a mean over the valid
    tokens of `routing`, so the train step can weight micro-batches by their number of tokens.
    `routing` is a `moe_jax.types.BatchRouting`, with `logits_BLE`, `scores_BLE`, `selected_BLE`, `weights_BLE` and `mask_BL`.
  observe: (state, routing) -> stats that can be added over micro-batches and devices. Has no gradient.
  update: (state, stats of the whole step) -> state, with the structure, shapes and types of `init`. Called once per
    optimizer step, never in evaluation.
  needs_whole_step: `losses` reads `step_stats.whole`. With several micro-batches per step, the train step
    then runs a first pass that only observes.
  needs_sequences: `losses` or `observe` treats each sequence separately, so it cannot use a flat list of tokens.
  suits: raises InputError if the method does not support a router. It gets anything with the attributes of
    `moe_jax.nn.routers.Router`, and the number of experts that the router scores beyond those with a network.
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
  """Returns a balancer that applies all of `balancers`: it merges losses, adds biases, and keeps separate states."""
  names = tuple(balancers)
  parts = tuple(balancers.values())

  def bias(state):
    given = [b for b in (part.bias(s) for part, s in zip(parts, state, strict=True)) if b is not None]
    if len(given) > 1 and any(isinstance(b, ExpertScale) for b in given):
      raise InputError(
        f"balancers {', '.join(names)}: a multiplicative bias cannot be combined with another bias"
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
  """Returns scores divided by their sum over E, [B, L, E].

  They are computed from logarithms. An epsilon in the division would let a router lower a loss by shrinking all
  its scores.
  """
  return jax.nn.softmax(routing.log_scores_BLE, axis=-1)


def token_mean(values_BL: Array, routing: BatchRouting) -> Array:
  """Returns the mean over valid tokens, or 0 if there are none. Padding may hold any value, including infinity."""
  total = jnp.sum(jnp.where(routing.mask_BL, values_BL, 0))
  return total / jnp.maximum(routing.mask_BL.sum(), 1)
