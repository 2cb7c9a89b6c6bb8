"""Properties of the two gates of a hierarchical mixture (1701.06538, appendix B)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from moe_jax.types import ExpertScale
from tests.ops.choosing import route
from tests.ops.router_laws import MASK_T, choice_of, entries_of, key_of, logits_of, loop, route_row
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference import noisy_routing as reference
from tests.reference.routing import finite_differences, softmax

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


# --- smooth load and gradients ---


@pytest.mark.parametrize("with_key", [False, True], ids=["no_key", "key"])
def test_smooth_load_is_the_product_of_both_levels(with_key):
  for seed in range(2):
    logits_TE, key = logits_of(ROW, seed), key_of(ROW, seed) if with_key else None
    got_TE = route_row(ROW, logits_TE, key=key, seed=seed).smooth_load_TE
    want_TE = reference.hierarchical_topk_load(
      logits_TE, ROW.k, ROW.draw(key) if with_key else None, *ROW.more_logits(seed), GROUPS_PER_TOKEN
    )
    np.testing.assert_allclose(got_TE, want_TE, rtol=1e-4, atol=1e-6)


@functools.cache
def gradients():
  def total(all_logits, key, mask, c_TE, c_A):
    routing = route(choice_of(ROW), *all_logits, key=key, mask=mask)
    a = routing.assignment
    return jnp.sum(c_TE * jnp.where(mask[:, None], routing.smooth_load_TE, 0)) + jnp.sum(
      c_A * jnp.where(a.valid_A, a.weight_A, 0)
    )

  return jax.jit(jax.grad(total))


@pytest.mark.parametrize("which", range(3), ids=["parts", "noise_of_experts", "noise_of_parts"])
def test_gradients_in_the_further_logits_equal_finite_differences(which):
  """Of weights and smooth load."""
  logits_TE, key, everyone = logits_of(ROW), key_of(ROW), np.ones(T, bool)
  rng = np.random.default_rng(1)
  c_TE, c_A = (rng.normal(size=shape).astype(np.float32) for shape in ((T, 9), T * ROW.k))

  def loss(logits_TX):
    more = [*MORE[:which], logits_TX, *MORE[which + 1 :]]
    load_TE = reference.hierarchical_topk_load(logits_TE, ROW.k, ROW.draw(key), *more, GROUPS_PER_TOKEN)
    entries = ROW.reference(logits_TE, ROW.k, np.zeros(9), everyone, ROW.draw(key), *more)
    return np.sum(c_TE * load_TE) + sum(float(c) * e.weight for c, e in zip(c_A, entries, strict=True))

  got_TX = gradients()((logits_TE, *MORE), key, everyone, c_TE, c_A)[1 + which]
  np.testing.assert_allclose(got_TX, finite_differences(loss, MORE[which]), atol=2e-5)
  assert np.abs(got_TX).max() > 0.05


@pytest.mark.parametrize("huge", [1e30, -1e30, np.nan])
def test_padding_gives_no_gradient_that_is_no_number(huge):
  hide = lambda x: np.where(MASK_T[:, None], x, np.float32(huge))
  ones = np.ones((T, 9), np.float32), np.ones(T * ROW.k, np.float32)
  hidden = [hide(x) for x in (logits_of(ROW), *MORE)]
  for gradient_TX in gradients()(hidden, key_of(ROW), MASK_T, *ones):
    assert np.isfinite(gradient_TX).all()
    np.testing.assert_array_equal(gradient_TX[~MASK_T], 0)


def test_zero_logits_load_all_experts_alike():
  choice, n, zeros = choice_of(ROW), 2000, [jnp.zeros((1, width)) for width in (9, 3, 9, 3)]

  def one(key):
    routing = route(choice, *zeros, key=key)
    return jnp.zeros(9).at[routing.assignment.expert_A].add(1), routing.smooth_load_TE[0]

  chosen, smooth = jax.jit(lambda keys: jax.vmap(one)(keys))(jax.random.split(jax.random.key(3), n))
  np.testing.assert_allclose(np.mean(chosen, axis=0), 4 / 9, atol=4.5 * 0.5 / np.sqrt(n))
  np.testing.assert_allclose(np.mean(smooth, axis=0), 4 / 9, atol=4.5 * 0.5 / np.sqrt(n))


# --- settings ---


def test_projections_start_at_zero_only_with_noise():
  assert choice_of(ROW).zero_init and not choice_of(QUIET).zero_init


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
