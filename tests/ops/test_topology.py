"""Properties of FasterMoE's topology-aware router: which tokens leave the node, and which stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from tests.ops.choosing import route
from tests.ops.router_laws import assert_same_entries, entries_of
from tests.reference import limited_routing as reference

E, K = 6, 2


def logits_of(tokens, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, E)).astype(np.float32) * 2)


def experts_of(spec, logits_TE, k=K, **kwargs):
  a = route(make_choice(spec, E, k), logits_TE, **kwargs).assignment
  return np.asarray(a.expert_A).reshape(len(logits_TE), k)


def is_remote(expert_TK, nodes):
  """[T, K]: the expert is on another node than the token."""
  tokens = len(expert_TK)
  return expert_TK * nodes // E != (np.arange(tokens) * nodes // tokens)[:, None]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.34, 0.5])
@pytest.mark.parametrize(("tokens", "nodes"), [(12, 2), (12, 3), (11, 2), (13, 3)])
def test_at_most_the_fraction_of_each_nodes_tokens_leaves(tokens, nodes, fraction):
  """For any number of choices, also where the nodes have unequally many tokens."""
  spec = f"topology_aware_topk:nodes={nodes}:max_remote_fraction={fraction}"
  node_T = np.arange(tokens) * nodes // tokens
  for seed in range(3):
    logits_TE = logits_of(tokens, seed)
    leaves_T = is_remote(experts_of(spec, logits_TE), nodes).any(axis=1)
    wants_T = is_remote(experts_of("softmax_topk", logits_TE), nodes).any(axis=1)
    for node in range(nodes):
      here = node_T == node
      assert leaves_T[here].sum() == min(int(fraction * here.sum()), wants_T[here].sum())


@pytest.mark.parametrize("tokens", [12, 11])
def test_it_equals_the_loop_for_unequal_nodes_and_many_choices(tokens):
  logits_TE = logits_of(tokens)
  want = reference.topology_aware(logits_TE, 3, np.zeros(E), np.arange(tokens) != 2, nodes=2, fraction=0.4)
  got = route(make_choice("topology_aware_topk:2:0.4", E, 3), logits_TE, mask=jnp.arange(tokens) != 2)
  assert_same_entries(entries_of(got.assignment), want)


@pytest.mark.parametrize("spec", ["topology_aware_topk:3:1", "topology_aware_topk:1:0"])
def test_where_all_may_leave_or_nobody_can_it_is_plain_top_k_and_leaks_nothing(spec):
  choice, plain, logits_TE = make_choice(spec, E, K), make_choice("softmax_topk", E, K), logits_of(12)
  assert choice.leaks == "" and make_choice("topology_aware_topk", E, K).leaks == "always"
  got, want = (entries_of(route(x, logits_TE).assignment) for x in (choice, plain))
  assert_same_entries(got, want)


def test_the_tokens_of_the_highest_remote_logit_leave_and_the_others_find_their_best_at_home():
  """The paper's rule for one expert per token: experts 0-2 are at home, and one of four tokens may leave."""
  logits_TE = jnp.array(
    [
      [0.0, 1.0, 0.0, 4.0, 0.0, 0.0],  # wants 3, stays: its logit is second
      [0.0, 0.0, 2.0, 0.0, 5.0, 0.0],  # wants 4 and leaves
      [9.0, 0.0, 0.0, 8.0, 0.0, 0.0],  # is at home: its remote logit does not count
      [1.0, 0.0, 0.0, 0.0, 0.0, 3.0],  # wants 5, stays
    ]
    + [[0.0, 0.0, 0.0, 7.0, 0.0, 0.0]] * 4  # the other node's tokens, all at home
  )
  expert_T = experts_of("topology_aware_topk:2:0.25", logits_TE, k=1)[:, 0]
  assert expert_T.tolist() == [1, 4, 0, 0, 3, 3, 3, 3]


def test_padding_takes_nobodys_place():
  logits_TE, spec = logits_of(12), "topology_aware_topk:2:0.17"  # one token of each node
  leaves = lambda **kwargs: is_remote(experts_of(spec, logits_TE, **kwargs), 2).any(axis=1)
  first = np.flatnonzero(leaves())[0]
  others = np.flatnonzero(leaves(mask=jnp.arange(12) != first))
  assert len(others) == 2 and first not in others


def test_a_bias_moves_the_choice_and_not_who_ranks_first():
  """A bias towards expert 3 makes all of node 0 want it; the highest logit still decides who gets it."""
  logits_TE = logits_of(12)
  bias_E = np.array([0, 0, 0, 10, 0, 0], np.float32)
  expert_T = experts_of("topology_aware_topk:2:0.34", logits_TE, k=1, bias_E=bias_E)[:6, 0]
  best = np.argsort(-np.asarray(logits_TE)[:6, 3])[:2]
  assert set(np.flatnonzero(expert_T == 3)) == set(best)


def test_remote_experts_stay_out_where_biased_scores_are_negative():
  expert_TK = experts_of("topology_aware_topk:2:0", logits_of(12), bias_E=np.full(E, -5, np.float32))
  assert not is_remote(expert_TK, 2).any()
