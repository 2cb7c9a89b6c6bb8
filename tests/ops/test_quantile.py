"""Properties of quantile balancing: the bias is solved for up to one bin, and histograms add up."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.ops.balancing import make_balancer
from moe_jax.types import BatchRouting
from tests.ops.balancer_laws import LOG_SCORES
from tests.ops.skewed import skewed_run
from tests.reference import bias as reference
from tests.reference.balancing import SCORES

BIAS_E = np.array([0.3, -0.2, 0.0, -0.35, 0.25], np.float32)
B, L, E = 4, 30, 5


def batch(seed=0, num_experts=E):
  """Logits of a skewed router and a mask."""
  rng = np.random.default_rng(seed)
  logits_BLE = rng.normal(size=(B, L, num_experts)) + np.linspace(1.5, -1.5, num_experts)
  return logits_BLE.astype(np.float32), rng.random((B, L)) < 0.8


def routing_of(log_scores_BLE, mask_BL, k):
  """Quantile balancing reads neither logits nor choices."""
  return BatchRouting(log_scores_BLE, log_scores_BLE, log_scores_BLE, mask_BL, L, k)


@functools.cache
def compiled_step(spec, k):
  def step(bias_E, log_scores_BLE, mask_BL):
    balancer = make_balancer(spec)
    observed = balancer.observe((bias_E,), routing_of(log_scores_BLE, mask_BL, k))
    return balancer.update((bias_E,), observed)[0], observed[0]

  return jax.jit(step)


def solved(spec, log_scores_BLE, mask_BL, k, bias_E):
  """The bias after one step, and what the step observed."""
  arguments = [np.asarray(x, np.float32) for x in (bias_E, log_scores_BLE)]
  return jax.tree.map(np.asarray, compiled_step(spec, k)(*arguments, mask_BL))


def required_of(score, logits_BLE, mask_BL, k, bias_E, cutoff="next"):
  """[T, E] of valid tokens, by the reference."""
  scores_TE = [SCORES[score](logits_E) for logits_E in logits_BLE[mask_BL].astype(float)]
  return reference.required_biases(scores_TE, bias_E, k, cutoff)


@pytest.mark.parametrize(
  ("score", "cutoff", "k", "bins"),
  [
    ("sigmoid", "next", 2, 1000),
    ("sigmoid", "next", 1, 20),
    ("sigmoid", "next", 5, 100),  # K = E
    ("sigmoid", "quantile", 4, 1000),
    ("softmax", "next", 4, 1000),
    ("softmax", "quantile", 5, 30),
  ],
)
def test_bias_is_within_a_bin_of_the_exact_quantile(score, cutoff, k, bins):
  spec = f"quantile_balancing:bins={bins}:cutoff={cutoff}:centre=false"
  for seed, bias_E in enumerate((BIAS_E, 0 * BIAS_E)):
    logits_BLE, mask_BL = batch(seed)
    new_E, observed = solved(spec, LOG_SCORES[score](logits_BLE), mask_BL, k, bias_E)
    required_TE = required_of(score, logits_BLE, mask_BL, k, bias_E, cutoff)
    width = (np.ptp(bias_E) + 2) / bins
    error_E = np.abs(new_E - reference.balancing_biases(required_TE, k))
    assert error_E.max() < width * (1 + 1e-4) and np.ptp(new_E) > 0.01
    np.testing.assert_array_equal(observed.count_EQ.sum(axis=-1), mask_BL.sum())  # no token lies outside
    assert observed.num_choices == k * mask_BL.sum()


def test_quantile_is_linear_within_its_bin():
  """Rank 4 * K / E = 2 of three tokens in one bin is two thirds of the way through it."""
  scores = np.full((1, 4, 2), 0.5)
  scores[..., 1] = [0.31, 0.32, 0.33, 0.44]
  new_E, _ = solved(
    "quantile_balancing:bins=20:centre=false", np.log(scores), np.ones((1, 4), bool), 1, np.zeros(2)
  )
  # Bins have width 0.1. The cutoff is the second score: expert 0 requires -0.19, -0.18, -0.17 and -0.06,
  # expert 1 four times 0.
  np.testing.assert_allclose(new_E, [-0.2 + 0.1 * 2 / 3, 0.05], atol=1e-6)


def test_eight_tokens_come_to_perfect_balance():
  """K = 1 of 4 experts, loads (4, 3, 1, 0) at first and (2, 2, 2, 2) in the end."""
  scores_TE = np.full((8, 4), 0.1)
  for t, (first, second) in enumerate([(0, 3), (0, 3), (0, 1), (0, 1), (1, 2), (1, 0), (1, 0), (2, 0)]):
    scores_TE[t, first], scores_TE[t, second] = 0.6 + 0.03 * t, 0.5 - 0.02 * t
  loads = lambda bias_E: np.bincount(np.argmax(scores_TE + bias_E, axis=-1), minlength=4)
  np.testing.assert_array_equal(loads(np.zeros(4)), [4, 3, 1, 0])
  bias_E, history = np.zeros(4), []
  for _ in range(6):
    bias_E, _ = solved("quantile_balancing", np.log(scores_TE[None]), np.ones((1, 8), bool), 1, bias_E)
    history.append(loads(bias_E).max())
  np.testing.assert_array_equal(loads(bias_E), [2, 2, 2, 2])
  assert history[0] < 4


def test_observations_add_up_exactly_with_a_bias():
  logits_BLE, mask_BL = batch()
  log_scores_BLE = LOG_SCORES["sigmoid"](logits_BLE)
  whole = solved("quantile_balancing", log_scores_BLE, mask_BL, 2, BIAS_E)[1]
  first_BL = np.arange(B)[:, None] < 1
  parts = [
    solved("quantile_balancing", log_scores_BLE, mask_BL & part_BL, 2, BIAS_E)[1]
    for part_BL in (first_BL, ~first_BL)
  ]
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.add, *parts), whole)
  assert (whole.count_EQ != parts[0].count_EQ).any()


def test_memory_and_centre():
  logits_BLE, mask_BL = batch()
  log_scores_BLE = LOG_SCORES["sigmoid"](logits_BLE)
  run = lambda options: solved(f"quantile_balancing{options}", log_scores_BLE, mask_BL, 2, BIAS_E)[0]
  exact_E, centred_E = run(":centre=false"), run("")
  np.testing.assert_allclose(centred_E, exact_E - exact_E.mean(), atol=1e-6)
  assert abs(exact_E.mean()) > 0.01
  np.testing.assert_allclose(run(":ema=0.75:centre=false"), 0.75 * BIAS_E + 0.25 * exact_E, atol=1e-6)


def test_nothing_moves_without_tokens_or_preferences():
  logits_BLE, mask_BL = batch()
  new_E, _ = solved("quantile_balancing", LOG_SCORES["sigmoid"](logits_BLE), mask_BL & False, 2, BIAS_E)
  np.testing.assert_array_equal(new_E, BIAS_E)
  equal_BLE = np.full((B, L, E), -0.7)  # as with a router that starts at zero: all scores tie
  new_E, _ = solved("quantile_balancing", equal_BLE, mask_BL, 2, np.zeros(E))
  np.testing.assert_allclose(new_E, 0, atol=1e-6)


def test_padding_may_hold_anything():
  logits_BLE, mask_BL = batch()
  log_scores_BLE = np.asarray(LOG_SCORES["sigmoid"](logits_BLE))
  clean = solved("quantile_balancing", log_scores_BLE, mask_BL, 2, BIAS_E)
  for value in (np.nan, np.inf, -np.inf, 1e30):
    dirty_BLE = np.where(mask_BL[..., None], log_scores_BLE, np.float32(value))
    dirty = solved("quantile_balancing", dirty_BLE, mask_BL, 2, BIAS_E)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize(("reach", "scale"), [(1, 10), (0.05, 1)])
def test_scores_beyond_the_reach_take_more_steps(reach, scale):
  """Scores up to 9, as sqrt(softplus) gives, or a short reach: the end bins count what lies outside."""
  offset_E = scale * np.array([0.6, 0.4, 0.2, 0, 0])
  scores_BLE = np.random.default_rng(0).uniform(0.1, 0.3 * scale, (B, L, E)) + offset_E
  mask_BL, bias_E, spread = np.ones((B, L), bool), np.zeros(E), []
  for _ in range(40):
    chosen_BLK = np.argsort(-(scores_BLE + bias_E), axis=-1)[..., :2]
    spread.append(np.ptp(np.bincount(chosen_BLK.ravel(), minlength=E)))
    new_E, observed = solved(f"quantile_balancing:reach={reach}", np.log(scores_BLE), mask_BL, 2, bias_E)
    assert np.ptp(new_E) <= np.ptp(bias_E) + 2 * reach + 1e-5
    np.testing.assert_array_equal(observed.count_EQ.sum(axis=-1), B * L)
    bias_E = new_E
  assert min(spread[:2]) > 60 and max(spread[-10:]) <= 6


def test_balances_in_a_few_steps_where_the_sign_takes_many():
  max_vio, bias = skewed_run("quantile_balancing")
  by_sign, _ = skewed_run("loss_free_bias:0.005")
  # The same counts; two programs may divide by their mean or multiply by its inverse.
  assert max_vio[0] == pytest.approx(by_sign[0], rel=4 * 2.0**-23) and by_sign[0] > 2
  assert max_vio[2] < 0.3 and max_vio[5:].max() < 0.1
  assert by_sign[:40].min() > 1
  np.testing.assert_allclose(bias.mean(axis=-1), 0, atol=1e-6)


@pytest.mark.parametrize("options", [":cutoff=quantile:centre=false", ":ema=0.5:reach=0.1"])
def test_every_form_balances(options):
  max_vio, _ = skewed_run(f"quantile_balancing{options}")
  assert max_vio[0] > 2 and max_vio[20:].max() < 0.1


def test_over_devices_only_sums_travel():
  """The histogram of each device's tokens is added up; no token is gathered."""
  layout = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
  balancer = make_balancer("quantile_balancing:bins=24")
  observe = lambda bias_E, *routing: balancer.observe((bias_E,), routing_of(*routing, 2))
  arguments = jax.ShapeDtypeStruct((B, L, E), jnp.float32), jax.ShapeDtypeStruct((B, L), bool)
  jitted = jax.jit(observe, in_shardings=(None, layout, layout))
  program = jitted.lower(jax.ShapeDtypeStruct((E,), jnp.float32), *arguments).compile().as_text()
  found = re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", program)
  assert {name for _, name in found} == {"all-reduce"}
  assert any(f"f32[{E * 24}]" in shape or f"f32[{E},24]" in shape for shape, _ in found)
