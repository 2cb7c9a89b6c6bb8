"""Every statistic against values worked out by hand, and mutual information against a loop.

Cases of one shape are stacked into one call, which is fast and tries the leading axes at the same time.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import stats

LN = math.log


def run(name, *arrays, **options):
  """A statistic of float32 counts, compiled as one program."""
  return jax.jit(lambda *x: getattr(stats, name)(*x, **options))(*[np.asarray(a, np.float32) for a in arrays])


TABLES = {
  # function: [(counts of four experts, value), ...]
  "load": [([1, 3, 0, 0], [0.25, 0.75, 0, 0]), ([2, 2, 2, 2], [0.25] * 4), ([0, 0, 0, 0], [0, 0, 0, 0])],
  "max_vio": [
    ([3, 3, 3, 3], 0),
    ([8, 0, 0, 0], 3),  # K = 1 collapsed: E - 1
    ([4, 4, 0, 0], 1),  # K = 2 collapsed: E/K - 1
    ([2, 3, 1, 2], 0.5),
    # Signed: only the fullest expert counts. The idle one here deviates by -1, three times further.
    ([4, 4, 4, 0], 1 / 3),
    ([0, 0, 0, 0], 0),
  ],
  "load_entropy": [
    ([5, 5, 5, 5], 1),
    ([9, 0, 0, 0], 0),
    ([3, 3, 0, 0], 0.5),  # log K / log E
    ([1, 3, 0, 0], -(0.25 * LN(0.25) + 0.75 * LN(0.75)) / LN(4)),
    ([0, 0, 0, 0], 0),
  ],
  "dead_experts": [
    ([10, 10, 10, 10], 0),
    ([10, 10, 10, 0], 1),
    # The fair share of 4 experts and 1,600 assignments is 400, and 1 % of it is 4.
    ([795, 798, 4, 3], 1),
    ([1600, 0, 0, 0], 3),
  ],
}
OF_ONE_EXPERT = {"load": [1], "max_vio": 0, "load_entropy": 1, "dead_experts": 0}


@pytest.mark.parametrize("name", TABLES)
def test_values_by_hand(name):
  counts, want = [c for c, _ in TABLES[name]], [w for _, w in TABLES[name]]
  got = run(name, [counts, counts[::-1]])
  np.testing.assert_allclose(got, [want, want[::-1]], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(run(name, [6]), OF_ONE_EXPERT[name])


def test_dead_experts_threshold():
  counts_E = [60, 30, 10]  # times the fair share of 1/3: 1.8, 0.9, 0.3
  assert [int(run("dead_experts", counts_E, threshold=t)) for t in (0.2, 0.5, 1.0)] == [0, 1, 2]


def test_dropped_fraction():
  wanted = [[4, 4], [8, 0], [3, 1], [0, 0]]
  kept = [[4, 4], [3, 0], [0, 0], [0, 0]]
  np.testing.assert_allclose(run("dropped_fraction", wanted, kept), [0, 5 / 8, 1, 0])
  np.testing.assert_allclose(run("dropped_fraction", wanted[1], kept[1]), 5 / 8)


def test_entropy():
  probs = [[0.25, 0.75, 0, 0], [1, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 0], [0.25] * 4]  # 0 log 0 = 0
  want = [-0.25 * LN(0.25) - 0.75 * LN(0.75), 0, LN(2), 0, LN(4)]
  np.testing.assert_allclose(run("entropy", probs), want, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(run("entropy", probs[0]), want[0], rtol=1e-6)


def test_what_is_not_a_number_is_no_certainty():
  nan = float("nan")
  assert np.isnan(run("entropy", [0.5, nan, 0.5]))
  assert np.isnan(run("mutual_information", [[1, 2], [nan, 1]]))


def test_independent_domains_have_no_information_below_zero():
  for counts_S in ([128, 384], [1, 2, 4], [3, 7, 11, 13]):
    assert not np.signbit(run("mutual_information", np.outer(counts_S, [3, 1, 5])))


def test_entropy_has_a_finite_gradient_at_zero():
  gradient = jax.jit(jax.grad(lambda p: stats.entropy(p)))(jnp.asarray([0.5, 0.5, 0.0]))
  np.testing.assert_allclose(gradient, [-1 - LN(0.5), -1 - LN(0.5), 0], rtol=1e-6)


def loop_mutual_information(counts_SE):
  """sum p(s, e) log(p(s, e) / (p(s) p(e))) in float64, cell by cell."""
  joint_SE = np.asarray(counts_SE, np.float64)
  joint_SE = joint_SE / joint_SE.sum()
  total = 0.0
  for s in range(joint_SE.shape[0]):
    for e in range(joint_SE.shape[1]):
      if joint_SE[s, e] > 0:
        total += joint_SE[s, e] * LN(joint_SE[s, e] / (joint_SE[s].sum() * joint_SE[:, e].sum()))
  return total


def test_mutual_information_by_hand():
  cases = [
    ([[1, 2, 3, 4], [2, 4, 6, 8], [0, 0, 0, 0]], 0),  # independent
    ([[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]], LN(3)),  # one expert per domain: log S
    ([[4, 4, 0, 0], [0, 0, 4, 4], [0, 0, 0, 0]], LN(2)),  # two experts per domain: still log S
    ([[7, 0, 0, 0], [7, 0, 0, 0], [7, 0, 0, 0]], 0),  # collapsed: the expert says nothing
    ([[3, 9, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]], 0),  # one domain
    ([[0] * 4] * 3, 0),
  ]
  got = run("mutual_information", [counts for counts, _ in cases])
  np.testing.assert_allclose(got, [want for _, want in cases], atol=1e-6)


def test_mutual_information_equals_the_loop(rng):
  counts_RSE = rng.integers(0, 40, (2, 3, 3, 4)) * rng.integers(0, 2, (2, 3, 3, 4))
  want_R = [loop_mutual_information(counts_SE) for counts_SE in counts_RSE.reshape(6, 3, 4)]
  assert min(want_R) > 0.05
  np.testing.assert_allclose(np.ravel(run("mutual_information", counts_RSE)), want_R, atol=2e-6)
  np.testing.assert_allclose(run("mutual_information", counts_RSE[0, 0]), want_R[0], atol=2e-6)


def test_a_ratio_over_the_whole_is_not_the_mean_of_ratios():
  """Two batches, each collapsed on another expert: MaxVio over a batch is 1, over both 0."""
  batches = np.array([[6, 0], [0, 6]])
  assert float(np.mean(run("max_vio", batches))) == 1
  assert float(run("max_vio", batches.sum(axis=0))) == 0
