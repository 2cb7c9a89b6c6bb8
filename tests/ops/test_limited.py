"""Properties of group-limited routers and of the sqrt-softplus score."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.topk import log_sqrt_softplus
from tests.ops.choosing import route
from tests.ops.router_laws import assert_same_entries, entries_of
from tests.reference import limited_routing as reference

T = 9


def logits_of(num_experts, seed=0):
  return np.random.default_rng(seed).normal(size=(T, num_experts)).astype(np.float32) * 1.5


def groups_of(assignment, per_group):
  """[T, K] group of every chosen expert."""
  return np.asarray(assignment.expert_A).reshape(T, -1) // per_group


V2 = {"groups": 8, "groups_per_token": 3, "group_top": 1, "score": "softmax", "scale": 16.0}
V3 = {"groups": 8, "groups_per_token": 4, "group_top": 2, "score": "sigmoid", "normalize": True, "scale": 2.5}


@pytest.mark.parametrize(
  ("name", "num_experts", "k", "options"),
  [("device_limited_topk", 160, 6, V2), ("node_limited_topk", 256, 8, V3)],
  ids=["deepseek_v2", "deepseek_v3"],
)
def test_defaults_are_the_released_models(name, num_experts, k, options):
  """And `group_limited_topk` with the same options is the same method."""
  logits_TE, bias_E = logits_of(num_experts), np.linspace(0.02, -0.02, num_experts, dtype=np.float32)
  want = reference.group_limited(logits_TE, k, bias_E, np.ones(T, bool), **options)
  spec = ":".join(f"{key}={str(value).lower()}" for key, value in ({"normalize": False} | options).items())
  for router in (name, f"group_limited_topk:{spec}"):
    choice = make_choice(router, num_experts, k)
    assert_same_entries(entries_of(route(choice, logits_TE, bias_E=bias_E).assignment), want)


def test_an_excluded_group_stays_out_where_biased_scores_are_negative():
  """With a mask of 0.0, as in Hugging Face and vLLM, the excluded experts would be the best ones."""
  logits_TE = np.zeros((1, 4), np.float32)  # sigmoid 0.5
  bias_E = np.array([-0.6, -0.7, -0.8, -0.9], np.float32)
  options = {"groups": 2, "groups_per_token": 1, "group_top": 2, "score": "sigmoid", "normalize": True}
  chosen = lambda entries: [e.expert for e in entries]
  want = reference.group_limited(logits_TE, 2, bias_E, [True], **options)
  zero_masked = reference.group_limited(logits_TE, 2, bias_E, [True], **options, masked=0.0)
  assert chosen(want) == [0, 1] and chosen(zero_masked) == [2, 3]
  choice = make_choice("node_limited_topk:groups=2:groups_per_token=1", 4, 2)
  assert chosen(entries_of(route(choice, logits_TE, bias_E=bias_E).assignment)) == [0, 1]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_with_all_groups_allowed_it_is_plain_top_k(score, groups):
  plain_spec = {
    "softmax": "softmax_topk",
    "sigmoid": "sigmoid_topk:normalize=true",
    "sqrt_softplus": "sqrt_softplus_topk",
  }[score]
  plain = make_choice(plain_spec, 6, 3)
  limited = make_choice(f"group_limited_topk:{groups}:{groups}:score={score}", 6, 3)
  logits_TE, bias_E = jnp.asarray(logits_of(6)), np.linspace(0.3, -0.3, 6, dtype=np.float32)
  got, want = (entries_of(route(x, logits_TE, bias_E=bias_E).assignment) for x in (limited, plain))
  assert_same_entries(got, want)


@pytest.mark.parametrize("groups_per_token", [1, 2, 3])
def test_a_token_uses_at_most_its_number_of_groups(groups_per_token):
  logits_TE, most = jnp.asarray(logits_of(12, seed=1)), lambda a: max(len(set(g)) for g in groups_of(a, 3))
  limited, plain = (
    make_choice(x, 12, 3) for x in (f"group_limited_topk:4:{groups_per_token}", "sigmoid_topk")
  )
  assert most(route(limited, logits_TE).assignment) == groups_per_token
  assert most(route(plain, logits_TE).assignment) == 3  # else this shows nothing


@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_every_group_gets_equally_many_experts_of_each_token(groups):
  """Also where all logits and the bias favour one group. Without groups, these tokens would not."""
  bias_E = np.where(np.arange(16) < 4, 2.0, 0.0).astype(np.float32)
  of_groups = lambda spec, p: [
    np.bincount(of_token, minlength=p).tolist()
    for of_token in groups_of(
      route(make_choice(spec, 16, 4), logits_of(16), bias_E=bias_E).assignment, 16 // p
    )
  ]
  p = groups or 4
  assert of_groups(f"grouped_topk:groups={groups}", p) == [[4 // p] * p] * T
  assert of_groups("softmax_topk", 4) == [[4, 0, 0, 0]] * T


def test_the_group_score_decides_between_one_very_good_and_two_good_experts():
  logits_TE = jnp.array([[3.0, -3.0, 1.0, 1.0]])
  for group_top, group in [(1, 0), (2, 1)]:
    choice = make_choice(f"group_limited_topk:groups=2:groups_per_token=1:group_top={group_top}", 4, 2)
    assert {int(e) // 2 for e in route(choice, logits_TE).assignment.expert_A} == {group}


def test_log_sqrt_softplus_is_exact_from_very_negative_to_very_large_logits():
  x = np.array([-1e30, -300, -80, -15.1, -15, -14.9, -1, 0, 1, 20, 300, 1e30], np.float32)
  softplus = lambda x: math.exp(x) if x < -30 else max(x, 0) + math.log1p(math.exp(-abs(x)))
  want = [0.5 * (x if x < -30 else math.log(softplus(x))) for x in x.astype(float)]
  np.testing.assert_allclose(log_sqrt_softplus(x), want, rtol=1e-6, atol=1e-7)
  slope = [0.5 if x < -30 else 0.5 / (1 + math.exp(-x)) / softplus(x) for x in x.astype(float)]
  np.testing.assert_allclose(jax.vmap(jax.grad(log_sqrt_softplus))(x), slope, rtol=1e-6)


def test_sqrt_softplus_weights_keep_their_ratio_where_the_scores_underflow():
  """exp(-110) is 0 in float32; the ratio of the two scores still is exp(1)."""
  logits_TE = jnp.array([[-220.0, -222.0]])
  routing = route(make_choice("sqrt_softplus_topk", 2, 2), logits_TE)
  np.testing.assert_array_equal(routing.scores_TE, 0)
  np.testing.assert_allclose(
    routing.assignment.weight_A, [math.e / (1 + math.e), 1 / (1 + math.e)], rtol=1e-5
  )
