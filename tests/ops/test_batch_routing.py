"""Properties of routers that choose for a whole group at once. BASE has its own file."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice, selected_experts
from moe_jax.ops.routing.quantile import expert_thresholds
from moe_jax.ops.routing.sinkhorn import column_scale
from tests.ops.choosing import route
from tests.ops.router_laws import (
  MASK_T,
  assert_same_entries,
  choice_of,
  choices,
  columns_of,
  entries_of,
  kept,
  logits_of,
  route_any,
  route_row,
)
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference import batch_routing as reference

FAMILY = (
  "batch_prioritized",
  "expert_choice",
  "base_assignment",
  "sinkhorn",
  "quantile_topk",
  "token_rounding",
)
WHOLE_GROUP = [name for name, row in ROWS.items() if row.spec.split(":")[0] in FAMILY]


def crowded_logits(row, seed=0):
  """Tokens that mostly agree: the first experts are asked for too often."""
  return (logits_of(row, seed) + np.linspace(3, 0, columns_of(row))[None]).astype(np.float32)


def loads_of(choice, logits_TE, **context):
  return np.asarray(selected_experts(route(choice, jnp.asarray(logits_TE), **context))).sum(axis=0)


@pytest.mark.parametrize("name", WHOLE_GROUP)
def test_padding_a_group_changes_nothing(name):
  """Shares and thresholds count valid tokens: seven tokens are routed alike with five of padding around."""
  row, real = ROWS[name], np.array([0, 1, 4, 5, 6, 9, 11])
  logits_TE = crowded_logits(row)
  mask_T = np.isin(np.arange(T), real)
  padded = choices(route_row(row, logits_TE, mask=mask_T).assignment)
  alone = choices(route_any(row, logits_TE[real]).assignment)
  alone = {(int(real[t]), e): weight for (t, e), weight in alone.items()}
  assert padded.keys() == alone.keys()
  np.testing.assert_allclose([padded[pair] for pair in alone], list(alone.values()), rtol=1e-6)


# --- batch-prioritised ---


PRIORITIES = pytest.mark.parametrize("name", ["batch_prioritized", "batch_prioritized_sum"])


@PRIORITIES
def test_batch_prioritized_is_plain_top_k_where_nothing_drops(name):
  row = ROWS[name]
  plain = make_choice("softmax_topk:softmax=before", row.num_experts, row.k)
  logits_TE = crowded_logits(row)
  got, want = (choices(a.assignment) for a in (route_row(row, logits_TE), route(plain, logits_TE)))
  assert got.keys() == want.keys()
  np.testing.assert_allclose([got[pair] for pair in want], list(want.values()), rtol=1e-6)


@PRIORITIES
@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_batch_prioritized_drops_second_choices_first_and_then_the_least_important(name, capacity):
  row = ROWS[name]
  assignment = route_row(row, crowded_logits(row), mask=MASK_T).assignment
  weights, survivors = choices(assignment), kept(assignment, capacity)
  by_token = {t: sorted((w for (u, _), w in weights.items() if u == t), reverse=True) for t, _ in weights}
  importance = {t: w[0] if name == "batch_prioritized" else sum(w) for t, w in by_token.items()}
  rank = {pair: by_token[pair[0]].index(weight) for pair, weight in weights.items()}
  dropped = weights.keys() - survivors
  assert dropped and survivors
  for lost in dropped:
    rivals = [pair for pair in survivors if pair[1] == lost[1]]
    assert len(rivals) == capacity
    for pair in rivals:
      assert (rank[pair], -importance[pair[0]]) < (rank[lost], -importance[lost[0]])


@PRIORITIES
def test_batch_prioritized_gives_equal_tokens_their_slots_in_order(name):
  row = ROWS[name]
  logits_TE = np.tile(logits_of(row)[:1], (T, 1))
  assert {t for t, _ in kept(route_row(row, logits_TE).assignment, 4)} == set(range(4))


def test_the_two_priorities_differ():
  """A token that is sure of one expert goes first by the largest weight, and last by the sum of two."""
  logits_TE = np.log(np.array([[0.5, 0.02, 0.48 / 2, 0.48 / 2], [0.45, 0.45, 0.05, 0.05]], np.float32))
  first = lambda spec: int(route(make_choice(spec, 4, 2), logits_TE).assignment.token_A[0])
  assert (first("batch_prioritized"), first("batch_prioritized:sum")) == (0, 1)


# --- expert choice ---


@pytest.mark.parametrize(("name", "share"), [("expert_choice", 4), ("expert_choice_uneven", 5)])
def test_experts_take_equal_shares_and_tokens_do_not(name, share):
  """The defect to avoid is a token choice under another name: here tokens have from 0 to many experts."""
  row = ROWS[name]
  selected_TE = np.asarray(selected_experts(route_row(row, crowded_logits(row))))
  np.testing.assert_array_equal(selected_TE.sum(axis=0), share)
  per_token_T = selected_TE.sum(axis=1)
  assert per_token_T.min() < row.k < per_token_T.max()
  masked_TE = np.asarray(selected_experts(route_row(row, crowded_logits(row), mask=MASK_T)))
  np.testing.assert_array_equal(masked_TE.sum(axis=0), -(-MASK_T.sum() * row.k // row.num_experts))
  few_T = np.arange(T) < 2
  two_TE = np.asarray(selected_experts(route_row(row, crowded_logits(row), mask=few_T)))
  np.testing.assert_array_equal(two_TE.sum(axis=0), 1)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_expert_choice_below_capacity_1_is_expert_choice_with_a_smaller_share(capacity):
  row = ROWS["expert_choice"]
  routing = route_row(row, crowded_logits(row))
  want = set()
  for e in range(row.num_experts):
    want |= {(int(t), e) for t in np.argsort(-routing.log_scores_TE[:, e])[:capacity]}
  assert kept(routing.assignment, capacity) == want


def test_expert_choice_gives_ties_to_the_lower_token():
  row = ROWS["expert_choice"]
  logits_TE = np.tile(logits_of(row)[:1], (T, 1))
  assert {t for t, _ in choices(route_row(row, logits_TE).assignment)} == set(range(4))


# --- Sinkhorn ---


def plan_of(logits_TE, mask_T, tolerance=1e-4, max_iterations=100):
  """d0 exp(x) d1 of the package, rows normalised as the definition says with its d1 of one step before."""
  log_d1_E = np.asarray(column_scale(jnp.asarray(logits_TE), jnp.asarray(mask_T), tolerance, max_iterations))
  return log_d1_E, np.exp(logits_TE[mask_T].astype(float) + log_d1_E)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("mask_T", [np.ones(T, bool), MASK_T], ids=["no_mask", "mask"])
def test_sinkhorn_marginals_are_within_tolerance(mask_T, tolerance):
  row = ROWS["sinkhorn"]
  logits_TE = crowded_logits(row)
  _, unscaled_TE = plan_of(logits_TE, mask_T, tolerance)
  plan_TE = unscaled_TE / unscaled_TE.sum(axis=1, keepdims=True)  # rows exact
  np.testing.assert_allclose(plan_TE.sum(axis=0), mask_T.sum() / row.num_experts, rtol=2.5 * tolerance)
  want_TE = np.array(reference.sinkhorn_plan(logits_TE[mask_T])) * mask_T.sum()
  np.testing.assert_allclose(plan_TE, want_TE, rtol=30 * tolerance)
  raw_TE = np.exp(logits_TE[mask_T].astype(float))
  raw_TE /= raw_TE.sum(axis=1, keepdims=True)
  assert raw_TE.sum(axis=0).max() > 2 * mask_T.sum() / row.num_experts  # there was something to balance


def test_sinkhorn_stops_at_its_bound():
  row, everyone = ROWS["sinkhorn"], np.ones(T, bool)
  logits_TE = crowded_logits(row)
  one_sweep = plan_of(logits_TE, everyone, tolerance=1e-9, max_iterations=1)[0]
  rows_TE = np.exp(logits_TE.astype(float))
  rows_TE /= rows_TE.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(np.exp(one_sweep), T / row.num_experts / rows_TE.sum(axis=0), rtol=1e-5)
  more = plan_of(logits_TE, everyone, tolerance=1e-9, max_iterations=2)[0]
  assert np.abs(more - one_sweep).max() > 1e-3


def test_sinkhorn_of_large_logits_stays_finite():
  """Megatron exponentiates logits, which overflows past 88."""
  row = ROWS["sinkhorn"]
  log_d1_E = column_scale(jnp.asarray(300 * logits_of(row)), jnp.ones(T, bool), 1e-4, 100)
  assert np.isfinite(log_d1_E).all()


def test_sinkhorn_evens_the_load():
  row = ROWS["sinkhorn"]
  choice, logits_TE = choice_of(row), crowded_logits(row)
  plain, balanced = (loads_of(choice, logits_TE, train=train).max() for train in (False, True))
  assert balanced < plain and balanced <= 6 < 9 <= plain  # T K / E = 4


# --- quantile balancing ---


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_quantile_counts_are_near_their_share(score):
  """After the default rounds within a tenth, in the end within one token; unbalanced, over 2.5 shares."""
  tokens, experts, k = 128, 8, 2
  rng = np.random.default_rng(0)
  logits_TE = (rng.normal(size=(tokens, experts)) + np.linspace(3, 0, experts)).astype(np.float32)
  share = tokens * k / experts
  plain = loads_of(make_choice(f"quantile_topk:{score}:strength=0", experts, k), logits_TE)
  assert plain.max() > 2.5 * share
  partly = loads_of(make_choice(f"quantile_topk:{score}:strength=0.5", experts, k), logits_TE)
  balanced = loads_of(make_choice(f"quantile_topk:{score}", experts, k), logits_TE)
  assert balanced.max() <= 1.1 * share and balanced.min() >= 0.9 * share
  assert balanced.max() < partly.max() < plain.max()
  settled = loads_of(make_choice(f"quantile_topk:{score}:rounds=40", experts, k), logits_TE)
  assert np.abs(settled - share).max() <= 1


def test_quantile_rounds_never_raise_the_dual():
  """Each round minimises sum max(0, s - alpha - beta) + k sum alpha + share sum beta over one side."""
  row = ROWS["quantile_topk"]
  scores_TE = 1 / (1 + np.exp(-crowded_logits(row).astype(float)))
  share = T * row.k / row.num_experts

  def dual(beta_E):
    margin_TE = np.sort(scores_TE - beta_E, axis=1)[:, ::-1]
    return margin_TE[:, : row.k].sum() + share * beta_E.sum()  # alpha at its best: the k largest remain

  thresholds = lambda rounds: expert_thresholds(
    jnp.asarray(scores_TE, jnp.float32), jnp.ones(T, bool), row.k, rounds
  )
  values = [dual(np.zeros(row.num_experts))] + [dual(np.asarray(thresholds(r), float)) for r in range(1, 9)]
  assert all(after <= before + 1e-5 for before, after in itertools.pairwise(values))
  assert values[-1] < values[0] - 0.1


def test_quantile_with_every_expert_and_with_one_token():
  """K = E leaves nothing to choose; a group of one token takes K experts, whichever they are."""
  everyone = loads_of(make_choice("quantile_topk", 3, 3), np.random.default_rng(0).normal(size=(T, 3)))
  np.testing.assert_array_equal(everyone, T)
  assert loads_of(make_choice("quantile_topk", 4, 2), np.zeros((1, 4), np.float32)).sum() == 2


# --- all ---


def test_jit_of_one_group_equals_the_same_group_among_others():
  """Loops that stop by tolerance run on for the slowest group of a batch, and the others must not move."""
  for name in ("sinkhorn", "base_assignment", "quantile_topk"):
    row = ROWS[name]
    hard_TE, easy_TE = crowded_logits(row) * 3, logits_of(row) * 0.01
    both = jax.vmap(lambda logits_TE, row=row: route_any(row, logits_TE))(np.stack([hard_TE, easy_TE]))
    for g, logits_TE in enumerate([hard_TE, easy_TE]):
      of_group = jax.tree.map(lambda x, g=g: np.asarray(x)[g], both)
      assert_same_entries(entries_of(of_group.assignment), entries_of(route_row(row, logits_TE).assignment))


@pytest.mark.parametrize("to", ["nearest", "up", "down"])
@pytest.mark.parametrize("tile", [2, 5, 20])
def test_token_rounding_gives_every_expert_a_multiple_of_the_tile(tile, to):
  """Also with crowded experts, padding, and a tile that is larger than the group."""
  row = ROWS["token_rounding"]
  choice = make_choice(f"token_rounding:tile={tile}:to={to}", 6, 2)
  for mask_T in (np.ones(T, bool), MASK_T):
    logits_TE = crowded_logits(row)
    before_E, after_E = (
      loads_of(c, logits_TE, mask=mask_T) for c in (make_choice("softmax_topk", 6, 2), choice)
    )
    assert np.all(after_E % tile == 0) and after_E.max() <= mask_T.sum()
    moved_E = after_E - before_E
    allowed = {"nearest": (-tile / 2, tile / 2), "up": (0, tile - 1), "down": (1 - tile, 0)}[to]
    can_rise_E = before_E - before_E % tile + tile <= mask_T.sum()  # to the next multiple
    assert np.all(moved_E[can_rise_E] >= allowed[0]) and np.all(moved_E <= allowed[1])
    assert np.all(moved_E[before_E % tile == 0] == 0)


def test_token_rounding_is_top_k_where_counts_are_multiples():
  """Six tokens ask for two experts each, every expert is asked by two: nothing moves, with any rounding."""
  logits_TE = np.zeros((6, 6), np.float32)
  for t in range(6):
    logits_TE[t, [t, (t + 1) % 6]] = 2 + 0.1 * t, 1
  plain = choices(route(make_choice("softmax_topk", 6, 2), logits_TE).assignment)
  for to in ("nearest", "up", "down"):
    rounded = choices(route(make_choice(f"token_rounding:tile=2:to={to}", 6, 2), logits_TE).assignment)
    assert rounded.keys() == plain.keys()
    np.testing.assert_allclose([rounded[pair] for pair in plain], list(plain.values()), rtol=1e-6)


def test_token_rounding_drops_the_smallest_weight_and_adds_the_highest_score():
  """Expert 0 is chosen by 3 of 5 tokens and expert 1 by 2, K = 1 of 2 with a tile of 2."""
  logits_TE = np.array([[2.0, 0], [0.5, 0], [1, 0], [0, 1], [0, 3]], np.float32)
  scores_TE = np.array([reference.softmax(x) for x in logits_TE.astype(float)])
  up, down = (
    choices(route(make_choice(f"token_rounding:tile=2:to={to}", 2, 1), logits_TE).assignment)
    for to in ("up", "down")
  )
  kept = {(0, 0): 1, (1, 0): 1, (3, 1): 1, (4, 1): 1}
  assert {pair: round(weight, 5) for pair, weight in down.items()} == kept  # equal weights: by index
  added = {(2, 0): 1, (3, 0): scores_TE[3, 0]}
  np.testing.assert_allclose([up.pop(pair) for pair in added], list(added.values()), rtol=1e-5)
  assert up.keys() == kept.keys()
