"""Runs one row of the routers' laws table. Compiles once; returns values and gradients as numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.routing import make_choice
from tests.ops.choosing import choose, route
from tests.ops.router_row import T
from tests.reference import routing as reference
from tests.reference.moe_layer import kept_entries

MASK_T = np.arange(T) % 5 != 3


def choice_of(row):
  return make_choice(row.spec, row.num_experts, row.k)


def columns_of(row):
  """Columns of the logits."""
  return row.num_experts + row.zero_computation


def logits_of(row, seed=0):
  return np.random.default_rng(seed).normal(size=(T, columns_of(row))).astype(np.float32) * 1.5


def bias_of(row):
  bias_E = np.linspace(0.4, -0.3, columns_of(row)).astype(np.float32)
  return bias_E if row.takes_bias else None


def key_of(row, seed=0):
  return jax.random.key(seed) if row.draw else None


def loop(row, logits_TE, *, bias_E=None, key=None, mask=None, seed=0):
  """The entries that the reference gives for the same arguments."""
  return row.reference(
    logits_TE,
    row.k,
    np.zeros(columns_of(row)) if bias_E is None else bias_E,
    np.ones(T, bool) if mask is None else mask,
    None if key is None else row.draw(key),
    *row.more_logits(seed),
    **row.context(seed),
  )


def route_eagerly(row, logits_TE, seed=0, **context):
  context |= row.context(seed) | {"train": row.train}
  return choose(choice_of(row), jnp.asarray(logits_TE), *row.more_logits(seed), **context)


def route_any(row, logits_TE, seed=0):
  """By one program, for any number of tokens."""
  context = row.context(seed) | {"train": row.train}
  return route(choice_of(row), jnp.asarray(logits_TE), *row.more_logits(seed), **context)


class Step:
  """A choice jitted with the gradients of sum(c * weight); counts how often it is traced."""

  def __init__(self, row):
    self.row, self.traces = row, 0

    def loss(logits_TE, bias_E, c_A, more_logits, context):
      routing = choose(choice_of(row), logits_TE, *more_logits, bias_E=bias_E, train=row.train, **context)
      return jnp.sum(c_A * routing.assignment.weight_A), routing

    def step(*args):
      self.traces += 1
      return jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)

    self.jitted = jax.jit(step)
    self.num_entries = len(loop(row, logits_of(row)))

  def __call__(self, logits_TE, *, bias_E=None, key=None, mask=None, c_A=None, seed=0):
    """Returns the routing, and the gradients with respect to logits and bias. No bias is one of zeros."""
    row = self.row
    if bias_E is None and row.takes_bias:
      bias_E = np.zeros(columns_of(row), np.float32)
    mask = np.ones(T, bool) if mask is None else mask
    c_A = np.zeros(self.num_entries, np.float32) if c_A is None else c_A
    context = row.context(seed) | {"key": key, "mask": mask}
    gradients, routing = self.jitted(logits_TE, bias_E, c_A, row.more_logits(seed), context)
    return jax.tree.map(np.asarray, routing), jax.tree.map(np.asarray, gradients)


step_of = functools.cache(Step)


def route_row(row, logits_TE, **kwargs):
  return step_of(row)(logits_TE, **kwargs)[0]


def entries_of(assignment):
  """The assignment as the reference writes it."""
  a = jax.tree.map(np.asarray, assignment)
  holds_A = a.valid_A if a.holds_slot_A is None else a.holds_slot_A
  return [
    reference.Entry(*fields)
    for fields in zip(a.token_A, a.expert_A, a.weight_A, a.valid_A, holds_A, strict=True)
  ]


def assert_same_entries(got, want):
  """The same tokens, experts and flags in the same order, and close weights. Padding may name any expert."""
  keep = lambda e: (int(e.token), int(e.expert) if e.holds_slot else None, bool(e.valid), bool(e.holds_slot))
  assert [keep(e) for e in got] == [keep(e) for e in want]
  for g, w in zip(got, want):
    if w.valid:
      np.testing.assert_allclose(g.weight, w.weight, rtol=1e-5, err_msg=str(w))


def choices(assignment):
  """{(token, expert): weight} of the valid entries."""
  return {(int(e.token), int(e.expert)): float(e.weight) for e in entries_of(assignment) if e.valid}


def kept(assignment, capacity):
  """The (token, expert) pairs that get a slot; with capacity None, all that are sent."""
  grouped = jax.tree.map(lambda x: np.asarray(x)[None], assignment)
  pairs = zip(assignment.token_A, assignment.expert_A, kept_entries(grouped, capacity)[0])
  return {(int(t), int(e)) for t, e, k in pairs if k}
