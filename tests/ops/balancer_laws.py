"""Runs rows of the balancers' laws table. Compiles once for all rows; returns values and gradients as numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.balancing import make_balancer
from moe_jax.types import BatchRouting, StepStats
from tests.ops.balancer_rows import GROUP, ROWS, B, E, K, L
from tests.reference import balancing as reference

MASK_BL = np.random.default_rng(1).random((B, L)) < 0.8
MASK_BL[1] = False  # an empty sequence
MASK_BL[2, :GROUP] = False  # an empty group
LOG_SCORES = {"softmax": jax.nn.log_softmax, "sigmoid": jax.nn.log_sigmoid}


def logits_of(seed=0, skew=1.0):
  """Experts differ in popularity, so that no loss is at its balanced value."""
  noise_BLE = np.random.default_rng(seed).normal(size=(B, L, E))
  return (noise_BLE + skew * np.linspace(1, -1, E)).astype(np.float32)


def routing_of(score, logits_BLE, mask_BL, selected_BLE, **fields):
  """What the layer hands to a balancer, with the choice of experts made by the reference."""
  return BatchRouting(logits_BLE, LOG_SCORES[score](logits_BLE), selected_BLE, mask_BL, GROUP, K, **fields)


def selected(score, logits_BLE, mask_BL, k=K):
  return reference.selected(logits_BLE, mask_BL, k, score).astype(np.float32)


def loss_of(spec, routing, step=None):
  """The loss `spec` of one batch. `step`: what was observed in the whole step, if that is more than this batch."""
  balancer = make_balancer(spec)
  state = balancer.init(routing.logits_BLE.shape[-1])
  observed = balancer.observe(state, routing) if step is None else step
  (loss,) = balancer.losses(state, routing, StepStats(observed, observed)).values()
  return loss


def add(a, b):
  return jax.tree.map(lambda x, y: x + y, a, b)


def total_loss(row, logits_BLE, selected_BLE, mask_BL, others):
  """Returns loss and observed statistics. `others`: what the step's other micro-batches observed."""
  balancer = make_balancer(row.spec)
  state = balancer.init(E)
  routing = routing_of(row.score, logits_BLE, mask_BL, selected_BLE, **row.fields(logits_BLE))
  observed = balancer.observe(state, routing)
  whole = add(observed, others)
  found = balancer.losses(state, routing, StepStats(whole, whole))
  return sum(found.values(), jnp.zeros(())), observed


@jax.jit
def evaluate_every_row(logits_BLE, selected_BLE, mask_BL, others):
  """((loss, observed), gradient) of every row, as one program: that compiles in half the time of a program per row."""
  evaluate = lambda row, others: jax.value_and_grad(functools.partial(total_loss, row), has_aux=True)(
    logits_BLE, selected_BLE[row.score], mask_BL, others
  )
  return {name: evaluate(row, others[name]) for name, row in ROWS.items()}


@functools.cache
def shapes_observed(spec):
  """The tree of what a balancer observes, as shapes."""
  row = next(row for row in ROWS.values() if row.spec == spec)
  args = (logits_of(), np.zeros((B, L, E), np.float32), MASK_BL)
  observe = lambda logits, selected_BLE, mask: make_balancer(spec).observe(
    make_balancer(spec).init(E), routing_of(row.score, logits, mask, selected_BLE, **row.fields(logits))
  )
  return jax.eval_shape(observe, *args)


def nothing_observed(row):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes_observed(row.spec))


def run(row, logits_BLE, mask_BL=MASK_BL, others=None):
  """Loss, observed statistics and gradient, compiled; the same program for all tests of one shape."""
  name = next(name for name in ROWS if ROWS[name] == row)
  others_of = {name: nothing_observed(row) for name, row in ROWS.items()}
  if others is not None:
    others_of[name] = others
  selected_BLE = {score: selected(score, logits_BLE, mask_BL) for score in LOG_SCORES}
  (loss, observed), gradient = evaluate_every_row(logits_BLE, selected_BLE, mask_BL, others_of)[name]
  return float(loss), jax.tree.map(np.asarray, observed), np.asarray(gradient)


def with_huge_padding(logits_BLE):
  return np.where(MASK_BL[..., None], logits_BLE, np.float32(1e30) * np.sign(logits_BLE))


def in_micro_batches(row, logits_BLE, mask_BL):
  """The token-weighted mean of loss and gradient over two micro-batches, as the train step takes it.

  A micro-batch is the batch with the other sequences masked, which spares a second compilation.
  """
  first_BL = np.arange(B)[:, None] < B // 2
  masks = [mask_BL & first_BL, mask_BL & ~first_BL]
  observed = [run(row, logits_BLE, mask)[1] for mask in masks]
  loss, gradient_BLE = 0.0, 0.0
  for mask, others in zip(masks, observed[::-1]):
    share = mask.sum() / mask_BL.sum()
    part_loss, _, part_gradient_BLE = run(row, logits_BLE, mask, others)
    loss, gradient_BLE = loss + share * part_loss, gradient_BLE + share * part_gradient_BLE
  return loss, add(*observed), gradient_BLE
