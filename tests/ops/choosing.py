"""Calls a choice of experts for one group."""

import jax.numpy as jnp

from moe_jax.types import RouterContext, Routing


def route(choice, logits_TE, *more_logits, mask=None, **context):
  """The routing; without a mask there is no padding. `context`: further fields of `RouterContext`."""
  mask = jnp.ones(logits_TE.shape[0], bool) if mask is None else mask
  return routing_of(choice.choose(logits_TE, *more_logits, RouterContext(mask, **context)))


def routing_of(chosen):
  """The routing in what a choice returns."""
  return chosen if isinstance(chosen, Routing) else chosen[0]
