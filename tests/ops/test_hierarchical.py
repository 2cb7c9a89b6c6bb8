"""Properties of the two gates of a hierarchical mixture (1701.06538, appendix B)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from moe_jax.types import ExpertScale
from tests.ops.choosing import route
from tests.ops.router_laws import entries_of, key_of, logits_of, loop, route_row
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference.routing import softmax

ROW, QUIET = ROWS["hierarchical_topk"], ROWS["hierarchical_without_noise"]
GROUPS, GROUPS_PER_TOKEN = 3, 2  # of ROW
MORE = ROW.more_logits(0)  # of the parts, of the noise of experts, of the noise of parts


def experts_by_token(assignment):
  found = {t: [] for t in range(T)}
  for e in entries_of(assignment):
    found[e.token].append(int(e.expert))
  return found


def test_a_token_takes_two_groups_and_two_experts_in_each_best_group_first():
  for seed in range(3):
    routing = route_row(ROW, logits_of(ROW, seed), seed=seed)
    logits_TP = ROW.more_logits(seed)[0]
    for t, experts in experts_by_token(routing.assignment).items():
      best, second = np.argsort(-logits_TP[t])[:2]
      assert [e // 3 for e in experts] == [best, best, second, second]
      assert len(set(experts)) == ROW.k


@pytest.mark.parametrize("row", [ROW, QUIET], ids=["noise", "no_noise"])
def test_scores_are_products_of_both_levels_without_noise(row):
  logits_TE, logits_TP = logits_of(row), row.more_logits(0)[0]
  routing = route_row(row, logits_TE, key=key_of(row))
  for t, scores_E in enumerate(np.exp(routing.log_scores_TE)):
    of_groups = softmax(logits_TP[t].astype(float))
    within = [softmax(part) for part in np.split(logits_TE[t].astype(float), len(of_groups))]
    np.testing.assert_allclose(
      scores_E, [g * w for g, part in zip(of_groups, within) for w in part], rtol=1e-5
    )


# --- one group ---


def jitted(spec, num_experts, k):
  return jax.jit(functools.partial(route, make_choice(spec, num_experts, k)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_one_group_without_noise_is_flat_top_k(with_bias):
  flat, one_group = jitted("softmax_topk", 6, 2), jitted("hierarchical_topk:1:1:none", 6, 2)
  logits_TE, bias_E = logits_of(QUIET), jnp.linspace(0.3, -0.3, 6) if with_bias else None
  got, want = one_group(logits_TE, MORE[0][:, :1], bias_E=bias_E), flat(logits_TE, bias_E=bias_E)
  assert got.smooth_load_TE is None
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


def test_one_group_with_noise_is_noisy_top_k():
  """The key is split for the two levels; the second one draws for the experts."""
  flat, one_group = jitted("noisy_topk", 6, 2), jitted("hierarchical_topk:1:1", 6, 2)
  logits_TE, logits_T1, noise_TE, noise_T1 = logits_of(QUIET), MORE[0][:, :1], MORE[1][:, :6], MORE[2][:, :1]
  key = jax.random.key(1)
  want = flat(logits_TE, noise_TE, key=jax.random.split(key)[1])
  got = one_group(logits_TE, logits_T1, noise_TE, noise_T1, key=key)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


# --- bias ---


def test_the_mean_bias_of_a_group_moves_the_choice_of_groups():
  logits_TE = logits_of(ROW)
  for group in range(GROUPS):
    bias_E = np.repeat(np.where(np.arange(GROUPS) == group, 10, 0), 3).astype(np.float32)
    plain = experts_by_token(route_row(ROW, logits_TE).assignment)
    biased = experts_by_token(route_row(ROW, logits_TE, bias_E=bias_E).assignment)
    assert all(experts[0] // 3 == group for experts in biased.values())
    assert not all(experts[0] // 3 == group for experts in plain.values())


def test_within_a_group_the_bias_moves_the_choice_of_experts():
  bias_E = np.array([10, -10, 0] * GROUPS, np.float32)  # the same mean in every group
  logits_TE = logits_of(ROW)
  plain = experts_by_token(route_row(ROW, logits_TE).assignment)
  biased = experts_by_token(route_row(ROW, logits_TE, bias_E=bias_E).assignment)
  for t in range(T):
    assert {e // 3 for e in plain[t]} == {e // 3 for e in biased[t]}
    assert [e % 3 for e in biased[t]] == [0, 2, 0, 2]


def test_a_bias_that_multiplies():
  """A factor of 0.001 for one group sends nobody there; the same factor for all changes nothing."""
  scale, logits_TE = jitted(ROW.spec, 9, ROW.k), logits_of(ROW)
  by = lambda factor_E: experts_by_token(scale(logits_TE, *MORE, bias_E=ExpertScale(factor_E)).assignment)
  plain = experts_by_token(route_row(ROW, logits_TE).assignment)
  scaled = by(jnp.repeat(jnp.array([0.001, 1, 1]), 3))
  assert all({e // 3 for e in experts} == {1, 2} for experts in scaled.values()) and plain != scaled
  assert plain == by(jnp.full(9, 0.5))


# --- settings ---


def test_eight_experts_of_the_defaults():
  """Four groups, two of them per token, one expert each."""
  zeros = [np.zeros((T, width), np.float32) for width in (8, 4, 8, 4)]
  assignment = jitted("hierarchical_topk", 8, 2)(*zeros).assignment
  np.testing.assert_array_equal(assignment.expert_A, [0, 2] * T)


def test_the_loop_can_tell_levels_apart():
  """Group weights, or the bias of groups, left out of the loop would be noticed."""
  logits_TE = logits_of(ROW)
  plain = loop(ROW, logits_TE)
  shifted_TP = MORE[0] + np.eye(GROUPS)[1]
  moved = ROW.reference(logits_TE, ROW.k, np.zeros(9), np.ones(T, bool), None, shifted_TP, *MORE[1:])
  assert [e.expert for e in plain] != [e.expert for e in moved]
