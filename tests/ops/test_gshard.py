"""Properties of GShard's top-2 (2006.16668, Algorithm 1)."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.dispatch.slots import assign_slots
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.types import StepStats
from tests.ops.choosing import route
from tests.ops.router_laws import choice_of, choices, kept, logits_of, route_row
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference import routing as reference


def test_gshard_leaks_the_future_where_capacity_drops():
  """A later token's first choice takes the slot of an earlier token's second choice (Algorithm 1)."""
  row = ROWS["gshard_top2"]
  logits_TE = np.tile(np.array([[3, 2, 0, 0, 0, 0]], np.float32), (T, 1))
  mask_T = np.arange(T) < 2
  logits_TE[1] = [3, 0, 2, 0, 0, 0]
  assert (0, 1) in kept(route_row(row, logits_TE, mask=mask_T).assignment, 1)
  logits_TE[1] = [0, 3, 2, 0, 0, 0]  # only the second token changed, and the first one loses expert 1
  assert (0, 1) not in kept(route_row(row, logits_TE, mask=mask_T).assignment, 1)


@functools.cache
def slots_of(num_experts, capacity):
  return jax.jit(lambda a: assign_slots(a, T, num_experts, capacity))


def gshard_logits(seed=3):
  """Tokens that agree: the first experts overflow, and their queues hold skipped second choices."""
  return (logits_of(ROWS["gshard_top2"], seed) + np.array([2, 1.5, 0, 0, 0, 0])).astype(np.float32)


@pytest.mark.parametrize("capacity", [2, 4, 7])
def test_gshard_equals_algorithm_1(capacity):
  row, num_dropped, num_skipped = ROWS["gshard_top2"], 0, 0
  for seed in range(4):
    logits_TE, key = gshard_logits(seed), jax.random.key(seed)
    assignment = route_row(row, logits_TE, key=key).assignment
    kept_A = np.asarray(slots_of(row.num_experts, capacity)(assignment).kept_A)
    want, _ = reference.gshard_algorithm_1(logits_TE, capacity, row.draw(key))
    got = {
      (int(t), int(e)): float(w)
      for t, e, w, k in zip(assignment.token_A, assignment.expert_A, assignment.weight_A, kept_A)
      if k
    }
    assert got.keys() == want.keys()
    for pair, weight in want.items():
      np.testing.assert_allclose(got[pair], weight, rtol=1e-5)
    num_dropped += (assignment.valid_A & ~kept_A).sum()
    num_skipped += (~assignment.valid_A).sum()
  assert num_dropped > 0 and num_skipped > 0


def test_gshard_skipped_second_choices_leave_their_slots_empty():
  """The counter grows "always", also for a second choice that is not sent; Mesh-TensorFlow fills the gap."""
  row, key, tokens = ROWS["gshard_top2"], jax.random.key(0), 3
  logits_TE = np.full((T, row.num_experts), -30, np.float32)
  logits_TE[0, [0, 1]] = [5, 0]  # a weak second choice of expert 1: not sent
  logits_TE[1, [0, 1]] = [0.01, 0]  # a strong one: sent if there is room
  logits_TE[2, [2, 0]] = [9, 0]
  rnd_T = row.draw(key)
  combine, _ = reference.gshard_algorithm_1(logits_TE[:tokens], 1, rnd_T)
  assert (1, 1) not in combine and (1, 1) in reference.mesh_tensorflow_kept(logits_TE[:tokens], 1, rnd_T)
  assignment = route_row(row, logits_TE, key=key, mask=np.arange(T) < tokens).assignment
  assert kept(assignment, 1) == set(combine)
  # A router that left holds_slot_A out would count as Mesh-TensorFlow does.
  assert (1, 1) in kept(assignment._replace(holds_slot_A=None), 1)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_slots_of_what_is_sent_equal_mesh_tensorflow(threshold):
  row, others = ROWS["gshard_top2"], 0
  pair = [make_choice(f"gshard_top2:{threshold}:{slots}", 6, 2) for slots in ("sent", "all")]
  both = jax.jit(lambda logits, key: [route(choice, logits, key=key).assignment for choice in pair])
  for seed in range(4):
    logits_TE, key = 2 * gshard_logits(seed), jax.random.key(seed)  # weak second choices: many are skipped
    sent, literal = both(logits_TE, key)
    for capacity in (1, 2, 4, 6, 8):
      want = reference.mesh_tensorflow_kept(logits_TE, capacity, row.draw(key), threshold)
      assert kept(sent, capacity) == want
      others += kept(literal, capacity) != want
  assert others > 0  # the two ways of counting are not the same


def test_gshard_weights_are_normalised_before_drops_and_not_after():
  row, capacity = ROWS["gshard_top2"], 3
  assignment = route_row(row, gshard_logits()).assignment
  pairs, weights = kept(assignment, capacity), choices(assignment)
  kept_sums_T = np.array([sum(weights[p] for p in pairs if p[0] == token) for token in range(T)])
  assert ((kept_sums_T > 0) & (kept_sums_T < 0.999)).any()


def test_gshard_loss_is_l_aux_times_e_squared():
  """1/E^2 at balance becomes 1; first choices, counted before capacity (so a capacity of 1 changes nothing)."""
  row, num_groups = ROWS["gshard_top2"], 2
  logits_GTE = np.stack([gshard_logits(seed) for seed in range(num_groups)])
  l_aux_G = [reference.gshard_algorithm_1(logits, 1, np.ones(T))[1] for logits in logits_GTE]
  balancer = make_balancer("gshard_loss:weight=1:scope=group")

  @jax.jit
  def loss(logits_GTE):
    routing = jax.vmap(functools.partial(route, choice_of(row)))(logits_GTE)
    return balancer.losses(((),), to_batch(routing, 1, num_groups * T, 2), StepStats(((),), ((),)))

  (got,) = loss(logits_GTE).values()
  np.testing.assert_allclose(got, np.mean(l_aux_G) * row.num_experts**2, rtol=1e-5)
