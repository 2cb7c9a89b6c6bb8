"""Properties of routers with a fixed table: the tables, ids outside them, and the learned parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.hashing import balanced_table, random_table, table_topk
from tests.ops.choosing import route
from tests.reference import table_routing as reference

IDS_T = jnp.array([3, 0, 3, 7, 5, 3], jnp.int32)


def experts_of(choice, token_id_T, seed=0):
  logits_TE = jax.random.normal(jax.random.key(seed), (len(token_id_T), 6))
  expert_A = route(choice, logits_TE, token_id=token_id_T).assignment.expert_A
  return np.asarray(expert_A).reshape(len(token_id_T), -1)


@pytest.mark.parametrize("num_experts", [1, 5, 8])
def test_random_table_equals_taking_experts_out_of_a_list(num_experts):
  for k in range(1, num_experts + 1):
    table_VK = random_table(40, num_experts, k, seed=2)
    assert table_VK.tolist() == reference.random_table(40, num_experts, k, seed=2)
    assert all(len(set(row)) == k for row in table_VK.tolist())


def test_a_seed_means_the_same_table_for_ever():
  """A checkpoint is worth nothing with another table. These numbers must not change."""
  assert random_table(5, 8, 2, seed=0).tolist() == [[4, 3], [7, 3], [5, 1], [0, 4], [3, 6]]
  counts_V = [5, 5, 1, 0, 3]
  assert balanced_table(counts_V, 4, 2, seed=0).tolist() == [[3, 0], [2, 1], [2, 0], [0, 2], [1, 3]]
  assert random_table(5, 8, 2, seed=1).tolist() != random_table(5, 8, 2, seed=0).tolist()


def test_random_table_draws_every_set_of_experts_equally_often():
  n, sets = 20_000, list(itertools.permutations(range(4), 2))
  rows = [tuple(row) for row in random_table(n, 4, 2, seed=0).tolist()]
  counts = np.array([rows.count(s) for s in sets])
  np.testing.assert_allclose(counts, n / len(sets), atol=5 * np.sqrt(n / len(sets)))


def loads(table_VK, counts_V, num_experts):
  return np.array([counts_V[(table_VK == e).any(axis=1)].sum() for e in range(num_experts)])


def zipf(vocab_size):
  return np.random.default_rng(0).permutation(100_000 // np.arange(20, vocab_size + 20))


def test_balanced_table_gives_the_most_frequent_id_to_the_emptiest_experts():
  counts_V, num_experts, k = zipf(60), 6, 2
  table_VK = balanced_table(counts_V, num_experts, k, seed=0)
  load_E = np.zeros(num_experts)
  for v in sorted(range(60), key=lambda v: -counts_V[v]):
    others = [e for e in range(num_experts) if e not in table_VK[v]]
    assert len(set(table_VK[v])) == k
    assert load_E[table_VK[v]].max() <= load_E[others].min()
    load_E[table_VK[v]] += counts_V[v]


def test_balanced_table_balances_what_a_random_one_does_not():
  counts_V, spread = zipf(400), lambda load_E: load_E.max() / load_E.mean() - 1
  balanced, random = balanced_table(counts_V, 8, 2, 0), random_table(400, 8, 2, 0)
  assert spread(loads(balanced, counts_V, 8)) < 0.01 < 0.05 < spread(loads(random, counts_V, 8))
  again, other = balanced_table(counts_V, 8, 2, 0), balanced_table(counts_V, 8, 2, 1)
  assert (again == balanced).all() and (other != balanced).any()


def test_ids_that_a_text_does_not_have_are_spread_too():
  """All at the emptiest expert, they would meet there in the first text that has them."""
  counts_V = np.concatenate([[5, 3, 1], np.zeros(60, int)])
  num_ids_E = loads(balanced_table(counts_V, 4, 1, 0), np.ones(63), 4)
  assert num_ids_E.max() - num_ids_E.min() <= 1


def test_even_kind_gives_every_expert_equally_many_ids():
  choice = make_choice("hash_topk:kind=even:vocab_size=31", 6, 2)
  experts_VK = experts_of(choice, jnp.arange(31, dtype=jnp.int32))
  num_ids_E = np.bincount(experts_VK.reshape(-1), minlength=6)
  assert num_ids_E.max() - num_ids_E.min() <= 1
  assert (
    len({tuple(sorted(row)) for row in experts_VK.tolist()}) > 10
  )  # of 15 pairs: not always the same ones


@pytest.mark.parametrize("name", ["hash_topk", "frozen_table_topk"])
def test_the_vocabulary_id_alone_chooses(name):
  choice = make_choice(f"{name}:vocab_size=16", 6, 2)
  experts_TK = experts_of(choice, IDS_T, seed=0)
  np.testing.assert_array_equal(experts_TK, experts_of(choice, IDS_T, seed=1))
  assert (experts_TK[0] == experts_TK[2]).all() and (experts_TK[0] == experts_TK[5]).all()


@pytest.mark.parametrize("token_id", [16, 35, 2**31 - 1, -1, -(2**31)])
def test_ids_outside_the_vocabulary_take_the_row_of_their_remainder(token_id):
  choice = make_choice("hash_topk:vocab_size=16", 6, 2)
  got, want = (experts_of(choice, jnp.array([i], jnp.int32)) for i in (token_id, token_id % 16))
  np.testing.assert_array_equal(got, want)


def test_hash_layers_learn_nothing_about_routing():
  choice = make_choice("hash_topk", 6, 3)
  weights = lambda logits_TE: route(choice, logits_TE, token_id=IDS_T).assignment.weight_A
  logits_TE = jax.random.normal(jax.random.key(0), (6, 6)) * 9
  np.testing.assert_allclose(weights(logits_TE), 1 / 3, rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(lambda x: (weights(x) ** 2).sum())(logits_TE), 0)


def test_a_table_of_ones_own():
  table_VK = np.array([[0, 1], [2, 3], [4, 5]])
  choice = table_topk(table_VK, 6, jax.nn.log_sigmoid, normalize=False, scale=2.0)
  logits_TE = jax.random.normal(jax.random.key(0), (3, 6))
  assigned = lambda: route(choice, logits_TE, token_id=jnp.array([2, 0, 1])).assignment
  a = assigned()
  assert a.expert_A.tolist() == [4, 5, 0, 1, 2, 3]
  want = 2 / (1 + np.exp(-np.asarray(logits_TE, np.float64)))
  np.testing.assert_allclose(a.weight_A, want[a.token_A, a.expert_A], rtol=1e-6)
  table_VK[:] = 0  # it has its own copy
  assert assigned().expert_A.tolist() == [4, 5, 0, 1, 2, 3]


@pytest.mark.parametrize(
  ("table", "message"),
  [
    ([0, 1], "must have one row of K experts per vocabulary id, got (2,)"),
    ([[0, 1], [2, 6]], "experts must be in [0, 6), got 0 to 6"),
    ([[0, 1], [-1, 2]], "experts must be in [0, 6), got -1 to 2"),
    ([[0, 1], [3, 3]], "row 1 names an expert twice: [3, 3]"),
  ],
)
def test_wrong_tables_are_one_line_errors(table, message):
  with pytest.raises(InputError) as error:
    table_topk(np.array(table), 6, jax.nn.log_softmax)
  assert message in str(error.value)
