"""Differences between arms, paired by seed: intervals, corrected tests, verdicts, and what could have been seen."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import special

from moe_jax.comparison.results import (
  Result,
  broken_protocol,
  check_varies,
  diverged,
  group_by_arm,
  uneven_protocol,
)
from moe_jax.comparison.statistics import Column, columns_of, stat

UNRESOLVED = "no difference resolved"
NOT_JUDGED = "not judged"
NOT_COMPARABLE = "not comparable: "
DIVERGED = "no verdict: diverged: "
MIN_SEEDS_FOR_VERDICT = 3
TOO_FEW_SEEDS = f"no verdict: fewer than {MIN_SEEDS_FOR_VERDICT} shared seeds"
LEVEL = 0.05  # of the errors of a whole table; intervals are of 1 - LEVEL, for one cell each
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Difference:
  """An arm minus the baseline in one quantity, paired by seed.

  interval: where the mean is with 95% confidence, by Student's t, for this cell alone.
  p_value: two-sided, of the paired t test. Like the interval, None with fewer than two seeds, and NaN if a
    seed diverged.
  p_holm: the p-value after Holm's correction over the judged cells of the table; None if this is not one.
  verdict: e.g. "lower (better)", "no difference resolved", "no verdict: fewer than 3 shared seeds", "no verdict:
    diverged: none seed 1", "not comparable: number of steps", "not judged".
  """

  arm: str
  baseline: str
  column: Column
  per_seed: dict[int, float]
  mean: float
  standard_error: float | None  # spread of the differences / sqrt(n); None with fewer than two seeds
  interval: tuple[float, float] | None
  p_value: float | None
  p_holm: float | None
  verdict: str

  @property
  def key(self) -> str:
    return self.column.key

  @property
  def degrees_of_freedom(self) -> int:
    return len(self.per_seed) - 1

  @property
  def resolved(self) -> bool:
    """Whether the verdict names a direction."""
    return self.verdict.startswith(("lower", "higher"))

  @property
  def broken(self) -> str:
    """What the arms do not share and should; empty if they can be compared."""
    return self.verdict.removeprefix(NOT_COMPARABLE) if self.verdict.startswith(NOT_COMPARABLE) else ""

  @property
  def diverged(self) -> str:
    """The diverged seeds of the arm and the baseline; empty if there are none, or the arms cannot be compared anyway."""
    return self.verdict.removeprefix(DIVERGED) if self.verdict.startswith(DIVERGED) else ""


def paired_differences(
  results: Sequence[Result], baseline: str | None = None, varies: Sequence[str] = ()
) -> list[Difference]:
  """Returns arm minus baseline per seed, for every other arm and every quantity that both have.

  Pairing by seed removes what the seeds share (data order, initialisation). A cell is judged if its column is
  (see `columns_of`), if the arms share at least 3 seeds, if their runs share at every seed what `PROTOCOL` lists
  for its quantity, if the seeds of each arm do so among themselves, whatever `varies` says, and if no seed of the two
  diverged: those that are left are not the arm, in any quantity. All judged cells
  are one family: their paired t tests are corrected by Holm's method, and a verdict needs a corrected p below
  0.05. So the chance of one or more wrong verdicts in a table is at most 5%.

  Args:
    results: as from `load_results`.
    baseline: an arm; None: the first.
    varies: keys of `PROTOCOL` that the question varies, so that arms may differ in them.

  Raises:
    ValueError: if `baseline` is no arm, or `varies` has another key.
  """
  check_varies(varies)
  arms = group_by_arm(results)
  if not arms:
    return []
  baseline = next(iter(arms)) if baseline is None else baseline
  if baseline not in arms:
    raise ValueError(f"baseline {baseline!r} is not an arm; arms: {', '.join(arms)}")
  reference = {r["seed"]: r for r in arms[baseline]}
  differences = []
  for arm, of_arm in arms.items():
    if arm == baseline:
      continue
    pairs = [(r, reference[r["seed"]]) for r in of_arm if r["seed"] in reference]
    lost = ", ".join(f"{r['arm']} seed {r['seed']}" for r in (*of_arm, *arms[baseline]) if diverged(r))
    for column in columns_of(results):
      values = {r["seed"]: (column.value(r), column.value(other)) for r, other in pairs}
      per_seed = {seed: a - b for seed, (a, b) in values.items() if a is not None and b is not None}
      if per_seed:
        broken = _broken(arm, baseline, pairs, column.key, varies)
        differences.append(difference_of(arm, baseline, column, per_seed, broken, lost))
  return judged(differences)


def _broken(
  arm: str, baseline: str, pairs: Sequence[tuple[Result, Result]], quantity: str, varies: Sequence[str]
) -> str:
  """Returns what pairs of results do not share and should: between the arms, or between the seeds of one."""
  found = sorted({broken_protocol(*pair, quantity, varies) for pair in pairs} - {""})
  for name, of_arm in zip((arm, baseline), zip(*pairs, strict=True), strict=True):
    if uneven := uneven_protocol(of_arm, quantity):
      found.append(f"{uneven} between seeds of {name}")
  return "; ".join(found)


def difference_of(
  arm: str, baseline: str, column: Column, per_seed: dict[int, float], broken: str, lost: str = ""
) -> Difference:
  """Returns a difference that is not yet tested together with those of its table: see `judged`."""
  of_seeds = stat(list(per_seed.values()))
  error = None if of_seeds.spread is None else of_seeds.spread / math.sqrt(of_seeds.num)
  if broken:
    verdict = f"{NOT_COMPARABLE}{broken}"
  elif lost:
    verdict = f"{DIVERGED}{lost}"
  elif not column.judged:
    verdict = NOT_JUDGED
  else:
    verdict = UNRESOLVED
  interval = p_value = None
  if error is not None:
    interval = _interval(of_seeds.mean, error, of_seeds.num - 1)
    p_value = _p_value(of_seeds.mean, error, of_seeds.num - 1)
  return Difference(arm, baseline, column, per_seed, of_seeds.mean, error, interval, p_value, None, verdict)


def judged(differences: Sequence[Difference]) -> list[Difference]:
  """Returns the differences of one table with corrected p-values and verdicts."""
  too_few = lambda d: d.verdict == UNRESOLVED and len(d.per_seed) < MIN_SEEDS_FOR_VERDICT
  found = [dataclasses.replace(d, verdict=TOO_FEW_SEEDS) if too_few(d) else d for d in differences]
  family = [i for i, d in enumerate(found) if d.verdict == UNRESOLVED]
  for i, p in zip(family, holm([differences[i].p_value for i in family]), strict=True):
    d = differences[i]
    verdict = UNRESOLVED
    if p < LEVEL:  # False for NaN
      verdict = "lower" if d.mean < 0 else "higher"
      if d.column.lower_is_better is not None:
        verdict += " (better)" if (d.mean < 0) == d.column.lower_is_better else " (worse)"
    found[i] = dataclasses.replace(d, p_holm=p, verdict=verdict)
  return found


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values corrected by Holm's step-down method (1979, Scand. J. Statist. 6, 65-70), in their order.

  With m p-values in ascending order, the i-th (from 1) becomes the largest of (m - j + 1) * p_j over j <= i, at
  most 1. Rejecting where the result is below a level keeps the chance of any false rejection below that level,
  whatever the dependence between the tests. NaN stays NaN, and counts as one of the m.
  """
  p = np.asarray(p_values, np.float64)
  if not p.size:
    return []
  order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")
  steps = np.minimum(
    1.0, np.maximum.accumulate((p.size - np.arange(p.size)) * np.nan_to_num(p[order], nan=1.0))
  )
  corrected = np.empty_like(p)
  corrected[order] = np.where(np.isnan(p[order]), np.nan, steps)
  return corrected.tolist()


def _p_value(mean: float, error: float, degrees_of_freedom: int) -> float:
  """Of |t| = |mean| / error or more by chance. Seeds that differ by exactly nothing give 1."""
  if error == 0:
    return 1.0 if mean == 0 else 0.0
  return 2 * float(special.stdtr(degrees_of_freedom, -abs(mean) / error))


def _interval(mean: float, error: float, degrees_of_freedom: int) -> tuple[float, float]:
  half = float(special.stdtrit(degrees_of_freedom, 1 - LEVEL / 2)) * error
  return mean - half, mean + half


def family_of(differences: Sequence[Difference]) -> list[Difference]:
  """Returns the cells that the correction is over."""
  return [d for d in differences if d.p_holm is not None]


def smallest_resolvable(differences: Sequence[Difference], key: str) -> float | None:
  """Returns the smallest true difference in the quantity `key` that the table resolves with 80% power.

  The test is that of Holm's first step, at the level 0.05 / m for m judged cells, so this is what a table with
  one true difference resolves. The standard error is the median over arms, divided by what the median of such
  estimates is to the true one, sqrt(median of chi2_n / n) with n degrees of freedom. The number of seeds is the
  lowest of the quantity's cells. None if no cell of the quantity is judged, or its spread is
  zero or unknown.
  """
  family = family_of(differences)
  errors = [d.standard_error for d in family if d.key == key and math.isfinite(d.standard_error)]
  if not errors or not statistics.median(errors):
    return None
  freedom = min(d.degrees_of_freedom for d in family if d.key == key)
  error = statistics.median(errors) / math.sqrt(float(special.chdtri(freedom, 0.5)) / freedom)
  return error * _noncentrality(freedom, LEVEL / len(family))


def _noncentrality(degrees_of_freedom: int, level: float) -> float:
  """Returns the true mean / standard error at which a two-sided t test has 80% power.

  The chance of a rejection on the wrong side is left out; it is below 1e-4 here.
  """
  critical = float(special.stdtrit(degrees_of_freedom, 1 - level / 2))
  return float(special.nctdtrinc(degrees_of_freedom, 1 - POWER, critical))
