"""What is particular to balancing by a bias: it follows the load of whole steps and balances without a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import stats
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.routing import make_router, to_batch
from moe_jax.types import StepStats
from tests.ops.balancer_laws import logits_of, run
from tests.ops.balancer_rows import ROWS, B, E, K, L
from tests.reference.moe_layer import kept_entries

update_by_a_quarter = jax.jit(make_balancer("loss_free_bias:0.25").update)


def updated(bias_E, counts_E):
  (state,) = update_by_a_quarter((bias_E,), (np.asarray(counts_E, np.float32),))
  return np.asarray(state)


def test_bias_follows_the_sign_of_the_deviation():
  start_E = np.array([0.5, -0.5, 0.0, 1.0], np.float32)
  change_E = updated(start_E, [9, 1, 5, 5]) - start_E  # overloaded, underloaded, at the mean twice
  np.testing.assert_array_equal(change_E, [-0.25, 0.25, 0, 0])
  np.testing.assert_array_equal(updated(start_E, [5000, 1, 0, 0]) - start_E, [-0.25, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("num_experts", [1, 7, 60])
def test_bias_rests_at_balance_and_without_tokens(num_experts):
  bias_E = np.linspace(-1, 1, num_experts).astype(np.float32)
  for count in (0, 1, 999, 123_457):
    np.testing.assert_array_equal(updated(bias_E, [count] * num_experts), bias_E)


def test_bias_takes_one_step_from_the_summed_counts():
  """Not the sum of one sign per micro-batch, which grows with accumulation and here points elsewhere."""
  micro_batches = np.array([[6, 0, 0], [0, 2, 4]])
  zero_E = np.zeros(3, np.float32)
  np.testing.assert_array_equal(updated(zero_E, micro_batches.sum(axis=0)), [-0.25, 0.25, 0])
  by_parts_E = sum(updated(zero_E, counts) for counts in micro_batches)
  np.testing.assert_array_equal(by_parts_E, [0, 0.25, 0])


def route_batch(router, logits_BLE, mask_BL, bias_E=None):
  """The routing as the layer makes it, one group per sequence."""
  one = lambda logits, mask: make_router(router, logits_BLE.shape[-1], K)(logits, bias_E=bias_E, mask_T=mask)
  return to_batch(jax.vmap(one)(logits_BLE, mask_BL), *mask_BL.shape, K)


@functools.cache
def skewed_run(rate, num_steps=400):
  """A skewed router balanced by its bias alone: MaxVio [steps] and bias [steps, E]. Weights never move."""
  noise_BLE = np.random.default_rng(0).normal(size=(4, 32, 8)).astype(np.float32)
  logits_BLE = noise_BLE + np.linspace(2, -2, 8).astype(np.float32)
  mask_BL = np.ones((4, 32), bool)
  balancer = make_balancer(f"loss_free_bias:{rate}")

  def step(state, _):
    routing = route_batch("sigmoid_topk", logits_BLE, mask_BL, balancer.bias(state))
    observed = balancer.observe(state, routing)
    return balancer.update(state, observed), (stats.max_vio(observed[0]), balancer.bias(state))

  run = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps)[1])
  return jax.tree.map(np.asarray, run(balancer.init(8)))


def test_bias_balances_a_skewed_router():
  max_vio, bias = skewed_run(0.005)
  assert max_vio[0] > 1 and max_vio[-50:].max() < 0.2
  np.testing.assert_array_equal(bias[0], 0)  # it starts at zero, and acts from the second step on
  step = np.arange(len(bias))[:, None]
  assert (np.abs(bias) <= step * 0.005 * (1 + 1e-5)).all()


def test_without_a_bias_nothing_balances_it():
  max_vio, bias = skewed_run(0.0)
  assert max_vio.min() == max_vio.max() > 1 and not bias.any()


def test_bias_moves_no_loss_and_has_no_gradient():
  """The state reaches the choice only."""
  balancer = make_balancer("loss_free_bias,switch_loss:1:sequence")
  logits_BLE, mask_BL = logits_of(), np.ones((B, L), bool)

  @jax.jit
  @jax.grad
  def gradient(bias_E):
    routing = route_batch("sigmoid_topk", logits_BLE, mask_BL, bias_E)
    observed = balancer.observe((bias_E, ()), routing)
    return (
      sum(balancer.losses((bias_E, ()), routing, StepStats(observed, observed)).values()) + observed[0].sum()
    )

  np.testing.assert_array_equal(gradient(np.linspace(0, 1, E).astype(np.float32)), 0)


def test_load_is_counted_before_capacity():
  """A collapsed router looks collapsed also where capacity keeps the same few tokens of every expert."""
  logits_BLE = logits_of(skew=0.1) + np.array([9, 0, 0, 0], np.float32)
  mask_BL = np.ones((B, L), bool)
  _, (counts_E,), _ = run(ROWS["loss_free_bias"], logits_BLE, mask_BL)
  assert counts_E.sum() == B * L * K and counts_E[0] == B * L
  assignment = jax.jit(jax.vmap(make_router("sigmoid_topk", E, K)))(logits_BLE).assignment
  kept_GA = kept_entries(assignment, capacity=2)
  kept_E = np.bincount(np.asarray(assignment.expert_A)[kept_GA], minlength=E)
  assert kept_E.max() <= 2 * B  # what a count after capacity would have seen
  assert stats.max_vio(jnp.asarray(counts_E)) == 1 > 0.5 > kept_E.max() / kept_E.mean() - 1
