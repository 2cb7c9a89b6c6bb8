"""Verdicts on paired differences: the t test, Holm's correction, the error rate of a table, and its power."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from moe_jax.comparison import differences, report
from moe_jax.comparison.report import tables, words
from tests.comparison.made_results import make_result


def differ(per_seed, key="perplexity"):
  """The one difference in `key` of arm b, whose seeds differ from a's by `per_seed`."""
  of_a = [make_result("a", s, perplexity=2.0) for s in range(len(per_seed))]
  of_b = [make_result("b", s, perplexity=2.0 + d) for s, d in enumerate(per_seed)]
  (difference,) = [d for d in report.paired_differences(of_a + of_b) if d.key == key]
  return difference


def test_difference_is_paired_by_seed():
  difference = differ([1.0, 1.1, 0.9])
  assert difference.mean == pytest.approx(1.0)
  assert difference.standard_error == pytest.approx(0.1 / math.sqrt(3))
  assert difference.per_seed == pytest.approx({0: 1.0, 1: 1.1, 2: 0.9})
  # Seeds that the arms do not share are no pairs.
  both = [make_result("a", s, perplexity=float(s)) for s in (0, 1, 2)] + [
    make_result("b", s, perplexity=5.0) for s in (2, 3)
  ]
  (only,) = [d for d in report.paired_differences(both) if d.key == "perplexity"]
  assert only.per_seed == {2: 3.0} and only.standard_error is None and not only.resolved


@pytest.mark.parametrize(
  ("per_seed", "verdict"),
  [
    ([1.0, 1.1, 0.9], "higher (worse)"),
    ([-1.0, -1.1, -0.9], "lower (better)"),
    ([1.0, 3.0, 2.0], differences.UNRESOLVED),  # 3.5 standard errors, p = 0.07
    ([1.0], "no verdict: fewer than 3 shared seeds"),
    ([1.0, 1.0], "no verdict: fewer than 3 shared seeds"),  # two seeds, however equal
    ([0.0, 0.0, 0.0], differences.UNRESOLVED),
  ],
)
def test_verdict_needs_three_seeds_and_a_resolved_difference(per_seed, verdict):
  assert differ(per_seed).verdict == verdict


@pytest.mark.parametrize("per_seed", [[1.0, 1.1, 0.9], [0.3, -0.1, 0.2, 0.5, 0.0], [1.0, -2.0]])
def test_interval_and_p_value_are_those_of_the_paired_t_test(per_seed):
  difference = differ(per_seed)
  oracle = scipy.stats.ttest_rel(2.0 + np.array(per_seed), np.full(len(per_seed), 2.0))
  assert difference.degrees_of_freedom == len(per_seed) - 1
  assert difference.p_value == pytest.approx(oracle.pvalue, abs=1e-9)
  assert difference.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)))


def test_t_test_at_its_ends():
  low, high = differ([1.0, 1.1, 0.9]).interval
  assert high - 1.0 == pytest.approx(1.0 - low) == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
  assert differ([0.0, 0.0, 0.0]).p_value == 1.0
  assert differ([1.0]).p_value is None and differ([1.0]).interval is None
  assert math.isnan(differ([1.0, math.nan, 1.0]).p_value)


def test_speed_has_no_verdict():
  of_a, of_b = ([make_result(arm, s) for s in range(3)] for arm in "ab")
  for result in of_b:
    result["training"] = result["training"] | {"tokens_per_second": 1.0}
  verdicts = {d.key: d.verdict for d in report.paired_differences(of_a + of_b)}
  assert verdicts["tokens_per_second"] == "not judged"


def test_verdict_knows_which_direction_is_good():
  def verdict(key, **values):
    of_a = [make_result("a", s) for s in range(3)]
    of_b = [make_result("b", s, **values) for s in range(3)]
    return {d.key: d.verdict for d in report.paired_differences(of_a + of_b)}[key]

  assert verdict("max_vio", max_vio=[0.1, 0.1]) == "lower (better)"
  assert verdict("mutual_information", mutual_information=[0.9, 0.9]) == "higher"
  assert verdict("load_entropy", load_entropy=[0.9, 0.9]) == differences.NOT_JUDGED


def test_baseline_is_the_first_arm_or_the_named_one():
  both = [make_result("a", 0, perplexity=1.0), make_result("b", 0, perplexity=3.0)]
  assert [(d.arm, d.mean) for d in report.paired_differences(both) if d.key == "perplexity"] == [("b", 2.0)]
  assert [(d.arm, d.mean) for d in report.paired_differences(both, "b") if d.key == "perplexity"] == [
    ("a", -2.0)
  ]
  with pytest.raises(ValueError, match="'c' is not an arm"):
    report.paired_differences(both, "c")


@pytest.mark.parametrize("diverged", [math.nan, "NaN", math.inf, "Infinity"])
def test_a_diverged_seed_shows_and_resolves_nothing(diverged):
  of_a = [make_result("a", s) for s in range(3)]
  of_b = [make_result("b", s, max_vio=[1.0, 1.0], perplexity=diverged if s == 1 else 2.0) for s in range(3)]
  cell = report.summarise(of_b).rows[0].cells["perplexity"]
  assert not math.isfinite(cell.mean)
  assert tables.format_stat(cell, report.columns_of([])[0], 3) == tables.NOT_FINITE
  found = report.paired_differences(of_a + of_b)
  assert {d.diverged for d in found} == {"b seed 1"} and not any(d.resolved for d in found)


def plain(arm, seed, **validation):
  return {"arm": arm, "seed": seed, "validation": validation}


def closed_testing(p_values):
  """Marcus, Peritz and Gabriel (1976) with Bonferroni's test of every intersection, of which Holm is a shortcut."""
  n = len(p_values)
  subsets = [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]
  of = lambda subset: min(1.0, len(subset) * min(p_values[i] for i in subset))
  return [max(of(subset) for subset in subsets if i in subset) for i in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_of_bonferroni(seed):
  rng = np.random.default_rng(seed)
  p_values = (rng.uniform(size=rng.integers(1, 7)) ** rng.integers(1, 5)).tolist()
  p_values += p_values[:1]  # a tie
  assert differences.holm(p_values) == pytest.approx(closed_testing(p_values), rel=1e-12)


def test_holm_at_its_ends():
  assert differences.holm([]) == [] and differences.holm([0.04]) == [0.04]
  one, nan, three = differences.holm([0.01, math.nan, 0.02])
  assert math.isnan(nan) and (one, three) == pytest.approx((0.03, 0.04))  # NaN counts as a cell


def test_the_family_is_every_judged_cell_that_can_have_a_verdict():
  """Not: quantities that are not judged, arms with another protocol, cells with fewer than three seeds."""
  rng = np.random.default_rng(0)
  results = []
  for arm in ("a", "b", "c", "other", "short"):
    for s in range(2 if arm == "short" else 4):
      noise = {
        "perplexity": 5 + rng.normal(),
        "max_vio": [rng.normal()],
        "mutual_information": [rng.normal()],
      }
      results.append(
        make_result(arm, s, **noise) | {"slots": "dropless" if arm == "other" else "capacity 1/1"}
      )
  found = report.paired_differences(results)
  family = [(d.arm, d.key) for d in found if d.p_holm is not None]
  assert family == [(arm, key) for arm in "bc" for key in ("perplexity", "max_vio", "mutual_information")]
  tested = [d for d in found if (d.arm, d.key) in family]
  assert [d.p_holm for d in tested] == pytest.approx(closed_testing([d.p_value for d in tested]))
  varied = report.paired_differences(results, varies=("slots",))
  assert {d.arm for d in differences.family_of(varied)} == {"b", "c", "other"}
  with pytest.raises(ValueError, match=r"'slot' is no key of the protocol; its keys: objective, .*slots"):
    report.paired_differences(results, varies=("slot",))


def test_a_table_without_differences_has_a_verdict_in_at_most_5_percent():
  """All arms share the baseline, so their cells are dependent, and noise is shared by seed."""
  rng = np.random.default_rng(1)
  tables_, seeds, arms, wrong = 400, 4, 5, 0
  for _ in range(tables_):
    noise = rng.normal(size=(arms, seeds)) + 3 * rng.normal(size=seeds)
    found = report.paired_differences(
      [plain(str(a), s, perplexity=noise[a, s]) for a in range(arms) for s in range(seeds)]
    )
    wrong += any(d.resolved for d in found)
  assert scipy.stats.binomtest(wrong, tables_, 0.05, alternative="greater").pvalue > 0.01
  assert wrong > 0  # it is a test


def differences_with(errors, freedom):
  """Differences in perplexity, with made standard errors, all in the family."""
  (column,) = [c for c in report.columns_of([]) if c.judged]
  made = lambda i, error: report.Difference(
    str(i), "none", column, dict.fromkeys(range(freedom + 1), 0.0), 0.0, error, (0.0, 0.0), 1.0, 1.0, ""
  )
  return [made(i, error) for i, error in enumerate(errors)]


@pytest.mark.parametrize(("freedom", "num_cells"), [(2, 1), (4, 12), (9, 3)])
def test_power_is_that_of_simulated_tables(freedom, num_cells):
  """Tables of true spread 1: their median least difference is resolved in 80% of t tests at the first step's level."""
  rng = np.random.default_rng(freedom)
  n = freedom + 1
  spreads = np.sqrt(rng.chisquare(freedom, (2000, num_cells)) / freedom)
  found = [
    differences.smallest_resolvable(differences_with(row / math.sqrt(n), freedom), "perplexity")
    for row in spreads
  ]
  samples = np.median(found) + rng.normal(size=(40_000, n))
  p = scipy.stats.ttest_1samp(samples, 0.0, axis=1).pvalue
  assert np.mean(p < 0.05 / num_cells) == pytest.approx(0.8, abs=0.025)


def test_power_has_no_figure_where_nothing_is_judged():
  assert differences.smallest_resolvable([], "perplexity") is None
  assert differences.smallest_resolvable(differences_with([0.0, 0.0], 3), "perplexity") is None


def table_of(*arms, seeds=5):
  """Results of arms (name, perplexity, fields) beside `none` at 8; differences have a spread of 0.1 over seeds."""
  noise = [0.1, -0.1, 0.0, 0.12, -0.12]
  results = [plain("none", s, perplexity=8.0) for s in range(seeds)]
  for name, mean, fields in arms:
    results += [plain(name, s, perplexity=mean + noise[s]) | fields for s in range(seeds)]
  return report.paired_differences(results)


def test_one_sentence_where_nothing_is_resolved():
  (judgement,) = words.judgements(table_of(("b", 8.01, {}), ("c", 7.99, {})))
  least = words.two_digits(
    differences.smallest_resolvable(table_of(("b", 8.01, {}), ("c", 7.99, {})), "perplexity")
  )
  assert judgement.differences == () and judgement.sentence == (
    f"No difference in perplexity is resolved (2 arms against none, 5 seeds; a true difference of "
    f"{least} would be, with 80% power)."
  )
  (judgement,) = words.judgements(table_of(("b", 9.0, {}), ("c", 7.99, {})))
  assert judgement.sentence == "" and [d.arm for d in judgement.differences] == ["b", "c"]
  (judgement,) = words.judgements(table_of(("b", 9.0, {}), seeds=2))
  assert "an arm needs at least 3 seeds" in judgement.sentence


@pytest.mark.parametrize(
  ("x", "text"), [(0.02134, "0.021"), (0.3, "0.3"), (12.7, "13"), (1234.0, "1200"), (3e-5, "0.00003")]
)
def test_two_digits(x, text):
  assert words.two_digits(x) == text
