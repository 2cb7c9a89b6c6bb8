"""Calls a choice of experts for one group."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.types import RouterContext, Routing


def route(choice, logits_TE, *more_logits, train=False, **context):
  """The routing, by one program; without a mask there is no padding. `context`: further fields of `RouterContext`."""
  return _route(choice, logits_TE, more_logits, context, train)


@functools.partial(jax.jit, static_argnames=("choice", "train"))
def _route(choice, logits_TE, more_logits, context, train):
  return choose(choice, logits_TE, *more_logits, train=train, **context)


def choose(choice, logits_TE, *more_logits, mask=None, **context):
  """The same by single operations, each of which is compiled, or within another program."""
  mask = jnp.ones(logits_TE.shape[0], bool) if mask is None else mask
  return routing_of(choice.choose(logits_TE, *more_logits, RouterContext(mask, **context)))


def routing_of(chosen):
  """The routing in what a choice returns."""
  return chosen if isinstance(chosen, Routing) else chosen[0]
