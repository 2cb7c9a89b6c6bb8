"""The adaptive weight: its rule, its measurements, and its update once per optimizer step."""

import jax
import numpy as np
import pytest

from moe_jax.ops.balancing.adaptive import adaptive_loss, over_capacity
from moe_jax.types import StepStats
from tests import tiny
from tests.ops.balancer_laws import MASK_BL, logits_of, routing_of, selected
from tests.ops.balancer_rows import GROUP, E
from tests.reference import deepseek_losses as further


def run_ratios(balancer, ratios):
  """Scale and averaged ratio after each of the steps."""
  state, found = balancer.init(E), []
  update = jax.jit(balancer.update)
  for ratio in ratios:
    state = update(state, {"load": np.zeros(E, np.float32), "over": np.float32(1000 * ratio), "all": 1000.0})
    found.append((np.exp(state["log_scale"]), state["mean_ratio"]))
  return np.array(found).T


@pytest.mark.parametrize("average", [0.05, 0.3, 1.0])
def test_the_rule_equals_the_loop(average):
  rng = np.random.default_rng(0)
  # From far above the range, through it, to below it; there long enough for the slowest average.
  ratios = np.append(np.linspace(0.3, 0, 60), np.zeros(60)) + rng.uniform(0, 0.02, 120)
  balancer = adaptive_loss(max_ratio=0.2, min_ratio=0.06, rate=0.05, average=average)
  scale, _ = run_ratios(balancer, ratios)
  np.testing.assert_allclose(scale, further.adaptive_scales(ratios, 0.2, 0.06, 0.05, average), rtol=1e-5)
  assert scale.max() > 1.5 and scale[-1] < 0.99 * scale.max()
  assert (np.diff(scale) == 0).any()  # some steps are inside the range


def test_up_down_and_stay():
  balancer = adaptive_loss(max_ratio=0.2, min_ratio=0.1, rate=0.5)
  for ratio, want in ((0.3, np.exp(0.5)), (0.15, 1), (0.05, np.exp(-0.5))):
    np.testing.assert_allclose(run_ratios(balancer, [ratio])[0], [want], rtol=1e-6)


def test_the_first_steps_are_averaged_evenly():
  """Weights 1, 1/2, 1/3: no memory of the 0 that the average starts from."""
  _, mean_ratio = run_ratios(adaptive_loss(average=0.01), [0.4, 0.2, 0.6])
  np.testing.assert_allclose(mean_ratio, [0.4, 0.3, 0.4], rtol=1e-6)


def test_the_scale_has_bounds():
  scale, _ = run_ratios(adaptive_loss(rate=1.0, average=0.5, limit=5.0), [0.5] * 3 + [0.0] * 20)
  np.testing.assert_allclose([scale.max(), scale.min()], [5, 1 / 5], rtol=1e-5)


def test_the_scale_multiplies_loss_and_gradient():
  balancer = adaptive_loss(0.5, scope="group")
  state = balancer.init(E)
  chosen = selected("softmax", logits_of(), MASK_BL)

  def loss(x, log_scale):
    routing = routing_of("softmax", x, MASK_BL, chosen)
    stats = balancer.observe(state, routing)
    (value,) = balancer.losses(state | {"log_scale": log_scale}, routing, StepStats(stats, stats)).values()
    return value

  plain, scaled = [jax.value_and_grad(loss)(logits_of(), np.float32(s)) for s in (0, np.log(3))]
  np.testing.assert_allclose(scaled[0], 3 * plain[0], rtol=1e-6)
  np.testing.assert_allclose(scaled[1], 3 * plain[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("factor", "slots"), [(0.5, 1), (1.0, 2), (1.5, 3), (2.0, 3)])
def test_over_capacity_is_what_finds_no_slot(factor, slots):
  """T = 3 tokens of K = 2 choices, 4 experts: 1.5 assignments each, rounded up to whole slots."""
  chosen = selected("softmax", logits_of(skew=3), MASK_BL)
  routing = routing_of("softmax", logits_of(skew=3), MASK_BL, chosen)
  want = further.over_capacity(chosen, GROUP, slots)
  assert over_capacity(routing, factor) == want
  assert (want > 0) == (slots < 3)


def test_a_loop_through_a_plant_settles_in_the_range():
  """A made-up layer whose ratio falls as the weight grows: the weight grows until the ratio is in the range."""
  balancer = adaptive_loss(max_ratio=0.05, min_ratio=0.02, rate=0.1, average=0.5)
  state, update = balancer.init(E), jax.jit(balancer.update)
  for _ in range(60):
    ratio = 0.3 / np.exp(state["log_scale"])
    state = update(state, {"load": np.zeros(E, np.float32), "over": ratio, "all": 1.0})
  assert 0.02 <= ratio <= 0.05 and 0.02 <= state["mean_ratio"] <= 0.05


def test_a_training_step_measures_its_dropped_fraction_and_updates_once():
  spec = "adaptive_loss:0.1:rate=0.5:capacity_factor=1,switch_loss:0.1"  # the tiny model's own factor
  config = tiny.change(tiny.CONFIG, balancers=spec)
  whole = tiny.one_step(config, tiny.make_batch())
  cut = tiny.one_step(tiny.change(config, accumulation=4), tiny.make_batch())
  tiny.assert_same(cut, whole)
  (state,) = jax.tree.leaves(whole["balancer"], is_leaf=lambda x: isinstance(x, dict) and "log_scale" in x)
  dropped_R = whole["metrics"]["dropped_fraction"]
  assert np.all(dropped_R > 0.01)
  np.testing.assert_allclose(state["mean_ratio"], dropped_R, rtol=1e-6)  # one per layer
  np.testing.assert_array_equal(state["num_steps"], 1)
  np.testing.assert_allclose(state["log_scale"], 0.5)  # above the range; it acts from the next step on
  np.testing.assert_allclose(whole["metrics"]["adaptive_loss"], whole["metrics"]["switch_loss"], rtol=1e-6)
