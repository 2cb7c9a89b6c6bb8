"""Properties of routers whose tokens use varying numbers of experts, or share a choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.zero_computation import zero_computation_kinds
from moe_jax.types import BatchRouting, RouterContext
from tests.ops.balancer_laws import loss_of
from tests.ops.choosing import route
from tests.ops.router_laws import MASK_T, choice_of, choices, logits_of, route_row
from tests.ops.router_row import T, four_sequences
from tests.ops.router_rows import ROWS
from tests.reference import variable_routing as reference

# --- ST-MoE and GShard ---


def test_st_moe_with_two_experts_is_mesh_tensorflow():
  pair = [make_choice(spec, 6, 2) for spec in ("st_moe_topn", "gshard_top2:threshold=0.2:slots=sent")]
  both = jax.jit(lambda logits, key, mask: [route(x, logits, key=key, mask=mask).assignment for x in pair])
  skipped = 0
  for seed in range(4):
    st_moe, mesh = both(2 * logits_of(ROWS["gshard_top2"], seed), jax.random.key(seed), MASK_T)
    # Weights are quotients of sums that two programs write down; tokens, experts and flags stay exact.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=4 * 2.0**-23), st_moe, mesh)
    skipped += int(2 * MASK_T.sum() - st_moe.valid_A.sum())
  assert skipped > 0


@pytest.mark.parametrize(
  ("name", "k", "threshold"), [("st_moe_topn", 3, 0.3), *(("gshard_top2", 2, p) for p in (0.5, 0.2))]
)
def test_further_experts_are_sent_with_probability_weight_over_threshold(name, k, threshold):
  choice, logits_TE, n = make_choice(f"{name}:{threshold}", 6, k), 2 * logits_of(ROWS[name]), 4000
  sent = jax.vmap(lambda key: route(choice, logits_TE, key=key).assignment.valid_A)
  sent_A = np.asarray(jax.jit(lambda keys: sent(keys).mean(axis=0))(jax.random.split(jax.random.key(1), n)))
  entries = ROWS[name].reference(logits_TE, k, np.zeros(6), np.ones(T, bool))
  want_A = np.array([min(1, e.weight / threshold) for e in entries])
  want_A[:T] = 1  # the first choices, of all tokens
  np.testing.assert_allclose(sent_A, want_A, atol=4.5 * 0.5 / np.sqrt(n))
  np.testing.assert_array_equal(sent_A[want_A == 1], 1)
  last_T = np.array([e.weight for e in entries[-T:]])
  assert last_T.min() < 0.1 and last_T.max() > 0.3 * threshold  # else the test would see little


# --- top-p ---


def experts_taken(probs_TE, spec, k):
  logits_TE = np.log(np.asarray(probs_TE, np.float32))
  choice = make_choice(spec, logits_TE.shape[1], k)
  assignment = jax.jit(functools.partial(route, choice))(logits_TE).assignment
  return np.asarray(assignment.valid_A).reshape(len(logits_TE), k).sum(axis=1).tolist()


def test_uncertain_tokens_take_more_experts():
  probs_TE = [[0.9, 0.05, 0.03, 0.02], [0.4, 0.3, 0.2, 0.1], [0.26, 0.25, 0.25, 0.24]]
  assert experts_taken(probs_TE, "top_p:0.5", 4) == [1, 2, 2]
  assert experts_taken(probs_TE, "top_p:0.8", 4) == [1, 3, 4]
  assert experts_taken(probs_TE, "top_p:0.8", 2) == [1, 2, 2]  # K is the limit


def test_the_sum_must_pass_p_and_not_only_reach_it():
  assert experts_taken([[0.25] * 4], "top_p:0.5", 4) == [3]


# --- by task and by sequence ---


def test_all_tokens_of_a_sequence_get_the_same_experts():
  row = ROWS["sequence_level"]
  sequence_T = four_sequences(0)["sequence"]
  routing = route_row(row, logits_of(row), mask=MASK_T)
  found = choices(routing.assignment)
  of_token = {t: {(e, round(w, 6)) for (u, e), w in found.items() if u == t} for t in np.flatnonzero(MASK_T)}
  of_sequence = [{frozenset(of_token[t]) for t in of_token if sequence_T[t] == s} for s in range(4)]
  assert [len(different) for different in of_sequence] == [1] * 4
  assert len(set.union(*of_sequence)) > 1  # sequences differ
  want_TE = reference.sequence_mean(logits_of(row), MASK_T, sequence_T)
  np.testing.assert_allclose(routing.logits_TE, want_TE, atol=1e-6)
  assert np.isfinite(routing.log_scores_TE).all()


# --- MoE++ ---


def test_the_weights_of_zero_computation_experts_are_given_apart():
  for name, normalize, zeros in (("moe_plus_plus", False, 1), ("moe_plus_plus_normalized", True, 2)):
    row = ROWS[name]
    _, weight_TZ = choice_of(row).choose(logits_of(row), RouterContext(MASK_T))
    want_TZ = np.zeros((T, 4))
    entries = reference.moe_plus_plus(4, zeros, normalize)(logits_of(row), 3, np.zeros(8), MASK_T)
    for e in entries:
      if e.valid and e.expert >= 4:
        want_TZ[e.token, e.expert - 4] += e.weight
    np.testing.assert_allclose(weight_TZ, want_TZ, rtol=1e-5)
    assert (want_TZ.sum(axis=0) > 0).any() and (weight_TZ[~MASK_T] == 0).all()


def test_kinds_of_zero_computation_experts():
  assert zero_computation_kinds(1, 1, 2) == ("zero", "copy", "constant", "constant")
  assert zero_computation_kinds(0, 1, 0) == ("copy",)


def test_a_token_of_nothing_but_zero_experts_has_weights_and_gradients_of_zero():
  choice = make_choice("moe_plus_plus:zeros=3:normalize=true", 4, 2)
  logits_TE = jnp.zeros((2, 10)).at[0, 4:7].set(5.0)
  weights = lambda logits_TE: route(choice, logits_TE).assignment.weight_A
  np.testing.assert_array_equal(jax.jit(weights)(logits_TE)[:2], 0)
  gradient_TE = jax.jit(jax.grad(lambda x: jnp.sum(weights(x) * jnp.arange(4.0))))(logits_TE)
  np.testing.assert_array_equal(gradient_TE[0], 0)
  assert np.isfinite(gradient_TE).all() and np.abs(gradient_TE[1]).max() > 0


# --- their losses ---


def losses_of(spec, logits_BLE, selected_BLE):
  mask_BL = jnp.ones(logits_BLE.shape[:2], bool)
  routing = BatchRouting(logits_BLE, jax.nn.log_softmax(logits_BLE), selected_BLE, mask_BL, 1, 1)
  return float(loss_of(spec, routing))


@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0])
def test_heterogeneous_loss_is_1_at_the_shares_that_it_wants(tau):
  """12 experts, 4 of them zero-computation: the loads of eq. 8, and a router whose mean scores equal them."""
  share_E = np.array([tau] * 8 + [1.0] * 4) / (8 * tau + 4)
  logits_BLE = jnp.log(jnp.asarray(share_E, jnp.float32))[None, None]
  spec = f"heterogeneous_loss:1:tau={tau}"
  np.testing.assert_allclose(losses_of(spec, logits_BLE, jnp.asarray(share_E)[None, None]), 1, rtol=1e-5)
  # There, a move of load between any two experts changes nothing: the paper's equilibrium.
  moved_E = share_E + 0.01 * (np.eye(12)[0] - np.eye(12)[11])
  np.testing.assert_allclose(losses_of(spec, logits_BLE, jnp.asarray(moved_E)[None, None]), 1, rtol=1e-5)


def test_heterogeneous_loss_with_tau_1_is_the_switch_loss():
  logits_BLE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
  selected_BLE = jax.nn.one_hot(jnp.argmax(logits_BLE, axis=-1), 8)
  want = losses_of("switch_loss:1", logits_BLE, selected_BLE)
  got = losses_of("heterogeneous_loss:1:tau=1", logits_BLE, selected_BLE)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_entropy_loss_is_that_of_uniform_scores_at_most():
  selected_BLE = jnp.zeros((1, 1, 8))
  uniform = losses_of("entropy_loss:1", jnp.zeros((1, 1, 8)), selected_BLE)
  np.testing.assert_allclose(uniform, np.log(8), rtol=1e-6)
  peaked = losses_of("entropy_loss:1", 1e4 * jnp.eye(8)[None, :1], selected_BLE)
  assert peaked == 0  # and no NaN where a probability is 0
