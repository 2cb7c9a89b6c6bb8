"""Properties of BASE (2103.16716): the assignment is balanced, and no balanced one has a larger sum of scores."""

import jax
import numpy as np
import pytest

from moe_jax.ops.routing.base_assignment import balanced_assignment
from tests.ops.router_row import T
from tests.reference import batch_routing as reference

assign = jax.jit(balanced_assignment)


def some_scores(kind, tokens, experts, seed):
  rng = np.random.default_rng(seed)
  scores_TE = rng.normal(size=(tokens, experts)).astype(np.float32)
  if kind == "collapsed":  # every token prefers the first experts
    scores_TE += np.linspace(20, 0, experts, dtype=np.float32)
  if kind == "ties":
    scores_TE = np.round(scores_TE)
  if kind == "repeated tokens":
    scores_TE = np.repeat(scores_TE, 3, axis=0)[:tokens]
  if kind == "one wide token":  # the others are scored in finer steps than this one
    scores_TE[0] *= 1000
  if kind == "nearly equal":
    scores_TE = 5 + scores_TE * np.float32(1e-4)
  return scores_TE


@pytest.mark.parametrize(
  "kind", ["plain", "collapsed", "ties", "repeated tokens", "one wide token", "nearly equal"]
)
@pytest.mark.parametrize(("tokens", "experts"), [(128, 8), (25, 7), (5, 7)])
def test_the_assignment_is_balanced_and_its_score_the_largest(kind, tokens, experts):
  for seed in range(4):
    scores_TE = some_scores(kind, tokens, experts, seed)
    mask_T = np.random.default_rng(seed).random(tokens) < (1, 0.8, 0.3, 0)[seed]
    expert_T = np.asarray(assign(scores_TE, mask_T))
    n = mask_T.sum()
    assert (expert_T[~mask_T] == experts).all() and (expert_T[mask_T] < experts).all()
    load_E = np.bincount(expert_T[mask_T], minlength=experts)
    assert load_E.max() <= -(-n // experts) and load_E.min() >= n // experts
    real_TE = scores_TE[mask_T].astype(float)
    total = lambda expert_T, real_TE=real_TE: sum(real_TE[t, e] for t, e in enumerate(expert_T))
    spread = np.ptp(real_TE, axis=1).max(initial=0)
    assert abs(total(expert_T[mask_T]) - total(reference.best_balanced(real_TE))) <= n * spread * 1e-7


def test_room_is_found_over_a_chain_of_moves():
  """Leaving expert 0 for the free expert 2 costs 9; instead expert 1 takes token 0 and passes token 2 on."""
  scores_TE = np.array([[9, 8, 0], [9, 1, 0], [0, 5, 4], [0, 5, 1], [0, 0, 7], [9, 7, 0]], np.float32)
  assert np.bincount(scores_TE.argmax(axis=1)).tolist() == [3, 2, 1]
  np.testing.assert_array_equal(assign(scores_TE, np.ones(6, bool)), [1, 0, 2, 1, 2, 0])


def test_no_scores_of_any_size_hang_it():
  for bad in (1e30, np.nan, np.inf):
    scores_TE = some_scores("collapsed", T, 3, 0)
    scores_TE[0, 0] = bad
    assert np.asarray(assign(scores_TE, np.ones(T, bool))).shape == (T,)
