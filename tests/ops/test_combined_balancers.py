"""Combinations of several balancers, and invalid settings."""

import jax
import numpy as np
import pytest

from moe_jax.ops.balancing import Balancer, combine, make_balancer
from moe_jax.types import StepStats
from tests.ops.balancer_laws import MASK_BL, logits_of, loss_of, routing_of, selected
from tests.ops.balancer_rows import E


def test_combined_losses_stand_side_by_side():
  names = [
    "switch_loss:0.5:sequence",
    "z_loss:0.25",
    "switch_loss:2:group",
    "gshard_loss:1:group",
    "switch_loss",
  ]
  balancer = make_balancer(",".join(names))
  routing = routing_of("softmax", logits_of(), MASK_BL, selected("softmax", logits_of(), MASK_BL))
  state, observed = balancer.init(E), balancer.observe(balancer.init(E), routing)
  found = balancer.losses(state, routing, StepStats(observed, observed))
  assert list(found) == ["switch_loss", "z_loss", "switch_loss#2", "gshard_loss", "switch_loss#3"]
  for spec, value in zip(names, found.values(), strict=True):
    np.testing.assert_allclose(value, loss_of(spec, routing), rtol=1e-6)


def test_combined_biases_add_and_states_stay_apart():
  balancer = make_balancer("loss_free_bias:0.5 + z_loss + loss_free_bias:0.125")
  counts_E = np.array([4, 0, 2], np.float32)
  start = balancer.init(3)
  state = jax.jit(balancer.update)(start, (counts_E, (), counts_E[::-1]))
  np.testing.assert_array_equal(state[0], [-0.5, 0.5, 0])
  np.testing.assert_array_equal(state[2], [0, 0.125, -0.125])
  np.testing.assert_array_equal(balancer.bias(state), [-0.5, 0.625, -0.125])
  np.testing.assert_array_equal(balancer.bias(start), 0)


def test_combination_without_a_bias_has_none():
  for spec in ("none", "z_loss,switch_loss", ""):
    balancer = make_balancer(spec)
    assert balancer.bias(balancer.init(4)) is None


@pytest.mark.parametrize(
  ("spec", "needs"),
  [
    ("switch_loss", True),
    ("gshard_loss", True),
    ("z_loss,switch_loss:0.1:global_batch", True),
    (
      "switch_loss:0.1:sequence,gshard_loss:0.1:group,switch_loss:0.1:micro_batch,switch_loss:1:buffer",
      False,
    ),
    ("loss_free_bias,z_loss", False),  # its counts are for the update, not for a loss
    ("none", False),
  ],
)
def test_only_global_losses_need_a_first_pass(spec, needs):
  assert make_balancer(spec).needs_whole_step == needs


def test_a_part_with_several_losses_names_each():
  two = Balancer(losses=lambda state, routing, step_stats: {"a": 1.0, "b": 2.0})
  one = Balancer(losses=lambda state, routing, step_stats: {"c": 3.0})
  found = combine({"two": two, "one": one}).losses(((), ()), None, StepStats(((), ()), ((), ())))
  assert found == {"two/a": 1.0, "two/b": 2.0, "one": 3.0}
