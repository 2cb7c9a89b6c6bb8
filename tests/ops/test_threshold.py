"""Expert Threshold routing: thresholds are moving quantiles, loads become equal, and each token decides alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.routing import make_choice
from moe_jax.types import BatchRouting, ExpertScale
from tests.ops.choosing import route
from tests.ops.router_laws import choices
from tests.ops.skewed import route_batch, skewed_run

B, L, E, K = 4, 30, 5, 2
BALANCER, BINS = "expert_threshold:ema=0.75:bins=2000", 2000
MASK_BL = np.random.default_rng(9).random((B, L)) < 0.8


def logits_of(seed):
  logits_BLE = np.random.default_rng(seed).normal(size=(B, L, E)) + np.linspace(1.5, -1.5, E)
  return logits_BLE.astype(np.float32)


@functools.cache
def compiled_step():
  def step(state, logits_BLE, mask_BL):
    balancer = make_balancer(BALANCER)
    routing = BatchRouting(logits_BLE, jax.nn.log_sigmoid(logits_BLE), logits_BLE, mask_BL, L, K)
    state = balancer.update(state, balancer.observe(state, routing))
    return state, -balancer.bias(state)

  return jax.jit(step)


def thresholds(batches, mask_BL=MASK_BL):
  """The thresholds after each step."""
  state, found = make_balancer(BALANCER).init(E), []
  for logits_BLE in batches:
    state, threshold_E = compiled_step()(state, logits_BLE, mask_BL)
    found.append(np.asarray(threshold_E))
  return found


def below_the_share(logits_TE):
  """Of each expert's T sorted logits, the largest that is left out where T K / E tokens get in."""
  share = len(logits_TE) * K // E
  return np.array([sorted(column, reverse=True)[share] for column in logits_TE.T.astype(float)])


def test_thresholds_are_a_moving_average_of_the_steps_quantiles():
  """The first step counts in full, and so on: weights 1, (1, 3)/4 * 4/7, ..., by the decay of 3/4."""
  mask_BL = np.arange(B * L).reshape(B, L) < 100  # 40 of 100 tokens each
  batches = [logits_of(seed) for seed in range(3)]
  quantiles = [below_the_share(logits_BLE[mask_BL]) for logits_BLE in batches]
  for n, got_E in enumerate(thresholds(batches, mask_BL), 1):
    weights = np.array([0.75 ** (n - 1 - i) for i in range(n)])
    want_E = np.average(quantiles[:n], axis=0, weights=weights)
    width = (16 + np.ptp(quantiles)) / BINS  # the threshold is above that logit, in its bin
    assert np.all((got_E - want_E > -1e-5) & (got_E - want_E < width))
    assert np.ptp(want_E) > 1


def test_one_step_is_enough_on_the_same_batch():
  """40 of 100 tokens reach the new threshold, up to those of the same bin; before, 0 lets in half and more."""
  logits_BLE = logits_of(0)
  mask_BL = np.arange(B * L).reshape(B, L) < 100
  (threshold_E,) = thresholds([logits_BLE], mask_BL)
  reach = lambda c_E: (logits_BLE[mask_BL] >= c_E).sum(axis=0)
  assert np.abs(reach(threshold_E) - 40).max() <= 2 < np.abs(reach(0) - 40).max()
  routing = route_batch("expert_threshold:most=5", logits_BLE, mask_BL, -threshold_E)
  np.testing.assert_array_equal(routing.selected_BLE.sum(axis=(0, 1)), reach(threshold_E))
  per_token = np.asarray(routing.selected_BLE.sum(axis=-1))[mask_BL]
  assert per_token.min() == 0 and per_token.max() > K  # tokens have as many experts as want them


def test_loads_become_equal_and_k_on_average():
  max_vio, bias = skewed_run("expert_threshold", num_steps=20, router="expert_threshold")
  assert max_vio[0] > 0.9 and max_vio[1:].max() < 0.1
  assert np.ptp(bias[-1]) > 2  # experts that are more popular have a higher threshold


def test_nothing_moves_without_tokens_and_padding_may_hold_anything():
  first, second = logits_of(0), logits_of(1)
  state, threshold_E = compiled_step()(make_balancer(BALANCER).init(E), first, MASK_BL)
  after, same_E = compiled_step()(state, second, MASK_BL & False)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  np.testing.assert_array_equal(same_E, threshold_E)
  for value in (np.nan, np.inf, -np.inf, 1e30):
    (dirty_E,) = thresholds([np.where(MASK_BL[..., None], first, np.float32(value))])
    np.testing.assert_array_equal(dirty_E, threshold_E)


def test_logits_beyond_the_reach_are_found_over_several_steps():
  far_BLE = logits_of(0) + 30
  found = thresholds([far_BLE] * 40)
  assert np.all(np.diff([c_E.max() for c_E in found[:3]]) > 0)
  want_E = below_the_share(far_BLE[MASK_BL])
  assert np.abs(found[0] - want_E).min() > 20 and np.abs(found[-1] - want_E).max() < 0.3


def test_where_too_many_experts_want_a_token_the_largest_margins_get_it():
  logits_TE = np.array([[3.0, 1, 2, 5]], np.float32)
  bias_E = -np.array([2.5, 0.1, 1.5, 4.9], np.float32)  # margins 0.5, 0.9, 0.5 and 0.1
  for most, want in ((1, {1}), (2, {0, 1}), (3, {0, 1, 2}), (4, {0, 1, 2, 3}), (0, {0, 1, 2, 3})):
    choice = make_choice(f"expert_threshold:most={most}", 4, 1)
    found = choices(route(choice, logits_TE, bias_E=bias_E).assignment)
    assert {e for _, e in found} == want
    np.testing.assert_allclose(found[0, 1], 1 / (1 + np.exp(-1)), rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: make_choice("expert_threshold:most=7", 6, 2), "most=7 must be between 1 and num_experts=6"),
    (lambda: make_choice("expert_threshold:most=-1", 6, 2), "most=-1 must be between 1 and"),
    (
      lambda: make_balancer("expert_threshold:ema=1"),
      "balancer expert_threshold: ema must be in [0, 1), got 1.0",
    ),
    (lambda: make_balancer("expert_threshold:bins=0"), "bins must be 1 or more, got 0"),
    (
      lambda: route(make_choice("expert_threshold", 4, 1), jnp.ones((2, 4)), bias_E=ExpertScale(jnp.ones(4))),
      "adds the bias of a balancer, and this one multiplies",
    ),
  ],
)
def test_wrong_settings_are_one_line_errors(make, message):
  with pytest.raises(InputError) as error:
    make()
  assert message in str(error.value) and "\n" not in str(error.value)
