"""Properties of balancing with a bias: it follows the load of whole steps and balances without a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops import stats
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.balancing.bias import MIN_FACTOR
from moe_jax.ops.routing import make_choice
from moe_jax.types import ExpertScale, StepStats
from tests.ops.balancer_laws import logits_of, run
from tests.ops.balancer_rows import ROWS, B, E, K, L
from tests.ops.choosing import route
from tests.ops.skewed import route_batch, skewed_run
from tests.reference import bias as reference
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


RULES = ["sign", "proportional", "rms"]


@pytest.mark.parametrize("rule", RULES)
def test_moves_equal_the_loop(rule):
  update = jax.jit(make_balancer(f"loss_free_bias:0.25:rule={rule}").update)
  start_E = np.linspace(-1, 1, 5).astype(np.float32)
  for seed in range(3):
    drawn_E = np.random.default_rng(seed).integers(0, 3 * 10**seed, size=5)
    for counts_E in (drawn_E, 0 * drawn_E, 0 * drawn_E + 7):
      (state,) = update((start_E,), (counts_E.astype(np.float32),))
      want_E = start_E + 0.25 * np.array(reference.moves(counts_E, rule))
      np.testing.assert_allclose(state, want_E, rtol=1e-6, atol=1e-6)


def moved_by(rule, counts_E):
  """The change of a bias with rate 1."""
  (state,) = make_balancer(f"loss_free_bias:1:rule={rule}").update(
    (np.zeros(len(counts_E), np.float32),), (np.asarray(counts_E, np.float32),)
  )
  return np.asarray(state)


@pytest.mark.parametrize("rule", RULES)
def test_moves_do_not_depend_on_the_number_of_tokens(rule):
  counts_E = np.array([9, 1, 0, 6, 5])
  np.testing.assert_allclose(moved_by(rule, 1000 * counts_E), moved_by(rule, counts_E), rtol=1e-6, atol=1e-7)


def test_scale_of_each_rule():
  """An expert without tokens moves by one rate, or as in the mean over experts by one rate."""
  np.testing.assert_allclose(moved_by("proportional", [8, 8, 0, 16]), [0, 0, 1, -1], atol=1e-7)
  np.testing.assert_allclose(np.mean(moved_by("rms", [9, 1, 0, 6, 5]) ** 2), 1, rtol=1e-6)


@pytest.mark.parametrize(
  "schedule", ["stop:steps=3", "linear:steps=4", "cosine:steps=4", "cosine:steps=1", "constant"]
)
def test_scheduled_rate(schedule):
  """The rate of each optimizer step, and none after the last; layers are stacked as in the train step."""
  balancer = make_balancer(f"loss_free_bias:0.25:schedule={schedule}")
  name, _, steps = schedule.partition(":steps=")
  update = jax.jit(jax.vmap(balancer.update))
  state = jax.tree.map(lambda x: jnp.stack([x, x]), balancer.init(2))
  bias_E = np.zeros(2)
  for step in range(6):
    state = update(state, (np.array([[3, 1], [1, 3]], np.float32),))
    bias_E += 0.25 * reference.share_of_rate(name, int(steps or 0), step) * np.array([-1, 1])
    np.testing.assert_allclose(jax.vmap(balancer.bias)(state), [bias_E, -bias_E], atol=1e-6)


def test_centring_changes_no_difference_between_biases():
  plain, centred = make_balancer("loss_free_bias:0.1"), make_balancer("loss_free_bias:0.1:centre=true")
  states = plain.init(4), centred.init(4)
  for seed in range(20):
    counts_E = np.random.default_rng(seed).integers(0, 9, size=4) * np.array([1, 1, 1, 9])
    states = [b.update(s, (counts_E.astype(np.float32),)) for b, s in zip((plain, centred), states)]
  (plain_E,), (centred_E,) = states
  np.testing.assert_allclose(centred_E, plain_E - plain_E.mean(), atol=1e-6)
  assert abs(plain_E.mean()) > 0.5 and abs(centred_E.mean()) < 1e-6


# --- a skewed router ---


def test_bias_balances_a_skewed_router():
  max_vio, bias = skewed_run("loss_free_bias:0.005")
  assert max_vio[0] > 1 and max_vio[-50:].max() < 0.2
  np.testing.assert_array_equal(bias[0], 0)  # it starts at zero, and acts from the second step on
  step = np.arange(len(bias))[:, None]
  assert (np.abs(bias) <= step * 0.005 * (1 + 1e-5)).all()


def test_without_a_bias_nothing_balances_it():
  max_vio, bias = skewed_run("loss_free_bias:0")
  assert max_vio.min() == max_vio.max() > 1 and not bias.any()


def test_proportional_moves_come_to_rest():
  """Moves by the sign go on at full length around balance."""
  proportional, _ = skewed_run("loss_free_bias:0.02:rule=proportional")
  sign, _ = skewed_run("loss_free_bias:0.02")
  assert proportional[-50:].max() < 0.1 < 0.2 < sign[-50:].max()


def test_rms_moves_are_sooner_at_balance():
  """The fullest expert moves most."""
  steps_to_balance = lambda spec: np.argmax(skewed_run(spec)[0] < 0.3)
  assert 0 < steps_to_balance("loss_free_bias:0.02:rule=rms") < steps_to_balance("loss_free_bias:0.02")


def test_a_stopped_bias_stays():
  _, bias = skewed_run("loss_free_bias:0.005:schedule=stop:steps=50")
  np.testing.assert_array_equal(bias[50:], np.broadcast_to(bias[50], bias[50:].shape))
  assert (bias[49] != bias[50]).any()


# --- a bias that multiplies ---


def test_multiplicative_bias_balances_a_skewed_router():
  max_vio, scale = skewed_run("multiplicative_bias:0.01")
  assert max_vio[0] > 1 and max_vio[-50:].max() < 0.4 < max_vio[:30].min()
  np.testing.assert_array_equal(scale.factor_E[0], 1)
  np.testing.assert_allclose(np.diff(scale.factor_E[:20], axis=0)[:, 0], -0.01, rtol=1e-4)


def test_multiplicative_bias_stays_above_zero():
  balancer = make_balancer("multiplicative_bias:0.4")
  state = balancer.init(2)
  for _ in range(5):
    state = balancer.update(state, (np.array([9, 1], np.float32),))
  np.testing.assert_allclose(balancer.bias(state).factor_E, [MIN_FACTOR, 3], rtol=1e-6)
  state = balancer.update(state, (np.array([0, 9], np.float32),))  # and comes back from there
  np.testing.assert_allclose(balancer.bias(state).factor_E, [MIN_FACTOR + 0.4, 2.6], rtol=1e-6)


def test_multiplicative_bias_moves_the_choice_and_no_weight():
  logits_BLE, factor_E = logits_of(), np.array([0.3, 2, 1, 0.9], np.float32)
  one = lambda logits: route(make_choice("sigmoid_topk", E, K), logits, bias_E=ExpertScale(factor_E))
  chosen = jax.jit(jax.vmap(one))(logits_BLE).assignment
  scores_BLE = 1 / (1 + np.exp(-logits_BLE.astype(float)))
  want_BLK = np.argsort(-scores_BLE * factor_E, axis=-1)[..., :K]
  np.testing.assert_array_equal(chosen.expert_A.reshape(want_BLK.shape), want_BLK)
  assert (want_BLK != np.argsort(-scores_BLE, axis=-1)[..., :K]).any()
  weights_BLK = np.take_along_axis(scores_BLE, want_BLK, axis=-1)
  np.testing.assert_allclose(chosen.weight_A.reshape(want_BLK.shape), weights_BLK, rtol=1e-5)


def test_multiplicative_bias_stands_alone():
  balancer = make_balancer("multiplicative_bias,loss_free_bias")
  with pytest.raises(InputError, match="a multiplicative bias cannot be combined with another bias"):
    balancer.bias(balancer.init(4))


# --- what no bias does ---


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
  assignment = jax.jit(jax.vmap(functools.partial(route, make_choice("sigmoid_topk", E, K))))(
    logits_BLE
  ).assignment
  kept_GA = kept_entries(assignment, capacity=2)
  kept_E = np.bincount(np.asarray(assignment.expert_A)[kept_GA], minlength=E)
  assert kept_E.max() <= 2 * B  # what a count after capacity would have seen
  assert stats.max_vio(jnp.asarray(counts_E)) == 1 > 0.5 > kept_E.max() / kept_E.mean() - 1
