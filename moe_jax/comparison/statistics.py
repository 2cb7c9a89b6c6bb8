"""Means and spreads over seeds, and differences that seeds resolve."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from moe_jax.comparison.results import Result, broken_protocol, group_by_arm, lookup


@dataclasses.dataclass(frozen=True)
class Stat:
  """A quantity over seeds."""

  mean: float
  spread: float | None  # sample standard deviation (ddof=1); None with fewer than two seeds
  num: int  # seeds that have the quantity


@dataclasses.dataclass(frozen=True)
class Column:
  """A quantity of one result. `lower_is_better` is None where neither direction is a virtue by itself."""

  key: str
  title: str
  unit: str
  format: str
  value: Callable[[Result], float | None]
  lower_is_better: bool | None = True
  judged: bool = True  # False: depends on what else the machine does, so no difference has a verdict


@dataclasses.dataclass(frozen=True)
class Row:
  """One arm over its seeds."""

  arm: str
  seeds: tuple[int, ...]
  columns: tuple[Column, ...]  # of the whole table
  cells: dict[str, Stat | None]  # by Column.key; None: no seed has the quantity
  max_vio_layers: list[Stat]  # R, MaxVio over the validation set of each layer; empty if unknown

  @property
  def max_vio_range(self) -> tuple[float, float] | None:
    """(lowest, highest) over layers of the mean over seeds."""
    means = [s.mean for s in self.max_vio_layers]
    return (min(means), max(means)) if means else None


@dataclasses.dataclass(frozen=True)
class Difference:
  """An arm minus the baseline in one quantity, paired by seed."""

  arm: str
  column: Column
  per_seed: dict[int, float]
  mean: float
  standard_error: float | None  # spread of the differences / sqrt(n); None with fewer than two seeds
  degrees_of_freedom: int  # n - 1
  p_value: (
    float | None
  )  # two-sided, of the paired t test; None with fewer than two seeds, NaN if a seed diverged
  interval: (
    tuple[float, float] | None
  )  # where the mean is with 95% confidence, by Student's t; None, NaN likewise
  verdict: str  # e.g. "lower (better)", "no difference resolved", "not comparable: number of steps"
  resolved: bool  # the verdict names a direction

  @property
  def key(self) -> str:
    return self.column.key


UNRESOLVED = "no difference resolved"
MIN_SEEDS_FOR_VERDICT = 3
CONFIDENCE = 0.95


def number(value: Any) -> float | None:
  """A float from JSON, where "NaN" and "Infinity" may be strings; None for anything else."""
  if value is None or isinstance(value, bool):
    return None
  try:
    return float(value)
  except (TypeError, ValueError):
    return None


def _mean_over_layers(value: Any) -> float | None:
  """[R] or a scalar -> float; None if a layer is missing."""
  layers = [number(x) for x in value] if isinstance(value, (list, tuple)) else [number(value)]
  if not layers or None in layers:
    return None
  return float(np.mean(layers))


def _at(*path: str) -> Callable[[Result], float | None]:
  return lambda result: _mean_over_layers(lookup(result, *path))


def _excess(result: Result) -> float | None:
  """Validation nll above what a perfect model would reach on the same tokens, nats/token.

  The floor measured on the validation tokens is preferred to the entropy rate, from which it differs by
  sampling noise that all arms share.
  """
  nll = number(lookup(result, "validation", "nll"))
  floor = number(result.get("validation_floor"))
  floor = number(result.get("entropy_rate")) if floor is None else floor
  return None if nll is None or floor is None else nll - floor


_FIRST = (
  Column("perplexity", "Perplexity", "", ".3f", _at("validation", "perplexity")),
  Column("nll", "NLL", "nats/token", ".4f", _at("validation", "nll")),
  Column("excess_nll", "Excess NLL", "nats/token", ".4f", _excess),
)
_LAST = (
  Column("tokens_per_second", "Tokens/s", "", ",.0f", _at("training", "tokens_per_second"), False, False),
)


def columns_of(results: Sequence[Result]) -> tuple[Column, ...]:
  """The columns of a table: those of every run, and between them the metrics that the results declare."""
  declared = {}
  for result in results:
    for entry in result.get("columns", ()):
      declared.setdefault(entry["key"], entry)
  metrics = tuple(
    Column(e["key"], e["title"], e["unit"], e["format"], _at(e["part"], e["name"]), e["lower_is_better"])
    for e in declared.values()
  )
  return (*_FIRST, *metrics, *_LAST)


def stat(values: Sequence[float | None]) -> Stat | None:
  """Mean and sample standard deviation of the values that are there. NaN stays NaN: a diverged seed shows."""
  present = np.array([x for x in values if x is not None], np.float64)
  if not present.size:
    return None
  with np.errstate(invalid="ignore"):  # inf - inf in the spread of a diverged arm
    spread = float(np.std(present, ddof=1)) if present.size > 1 else None
  return Stat(float(np.mean(present)), spread, present.size)


def summarise(results: Sequence[Result]) -> list[Row]:
  """One row per arm, in the order of the results.

  Values per layer are averaged over layers first, so a spread is one between seeds, not between layers.
  """
  rows, columns = [], columns_of(results)
  for arm, of_arm in group_by_arm(results).items():
    cells = {column.key: stat([column.value(r) for r in of_arm]) for column in columns}
    layers = [lookup(r, "validation", "max_vio") for r in of_arm]
    layers = [[number(x) for x in each] for each in layers if isinstance(each, (list, tuple))]
    by_layer = [stat(layer) for layer in zip(*layers, strict=False)]
    seeds = tuple(r["seed"] for r in of_arm)
    rows.append(Row(arm, seeds, columns, cells, [s for s in by_layer if s is not None]))
  return rows


def paired_differences(results: Sequence[Result], baseline: str | None = None) -> list[Difference]:
  """Arm minus baseline per seed, for every other arm and every quantity that both have.

  Pairing by seed removes what the seeds share (data order, initialisation). A verdict is given only with at
  least 3 shared seeds, |mean| > 2 standard errors, and, at every seed, runs that share steps, tokens, schedule
  and text; `chance_of_verdict` says how often chance alone does it. p-values are not corrected for how many
  differences there are.

  Args:
    results: as from `load_results`.
    baseline: an arm; None: the first.
  """
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
    for column in columns_of(results):
      pairs = {
        r["seed"]: (column.value(r), column.value(reference[r["seed"]]))
        for r in of_arm
        if r["seed"] in reference
      }
      per_seed = {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}
      if per_seed:
        broken = {broken_protocol(r, reference[r["seed"]]) for r in of_arm if r["seed"] in reference} - {""}
        differences.append(_difference(arm, column, per_seed, "; ".join(sorted(broken))))
  return differences


def _difference(arm: str, column: Column, per_seed: dict[int, float], broken: str) -> Difference:
  of_seeds = stat(list(per_seed.values()))
  error = None if of_seeds.spread is None else of_seeds.spread / math.sqrt(of_seeds.num)
  verdict, resolved = UNRESOLVED, False
  if broken:
    verdict = f"not comparable: {broken}"
  elif not column.judged:
    verdict = "not judged"
  # A comparison with NaN is False: a diverged seed resolves nothing.
  elif of_seeds.num >= MIN_SEEDS_FOR_VERDICT and abs(of_seeds.mean) > 2 * error:
    resolved = True
    lower = of_seeds.mean < 0
    verdict = "lower" if lower else "higher"
    if column.lower_is_better is not None:
      verdict += " (better)" if lower == column.lower_is_better else " (worse)"
  return Difference(
    arm=arm,
    column=column,
    per_seed=per_seed,
    mean=of_seeds.mean,
    standard_error=error,
    degrees_of_freedom=of_seeds.num - 1,
    p_value=None if error is None else _p_value(of_seeds.mean, error, of_seeds.num - 1),
    interval=None if error is None else _interval(of_seeds.mean, error, of_seeds.num - 1),
    verdict=verdict,
    resolved=resolved,
  )


def _p_value(mean: float, error: float, degrees_of_freedom: int) -> float:
  """Of |t| = |mean| / error or more by chance. Seeds that differ by exactly nothing give 1."""
  if error == 0:
    return 1.0 if mean == 0 else 0.0
  return 2 * float(special.stdtr(degrees_of_freedom, -abs(mean) / error))


def _interval(mean: float, error: float, degrees_of_freedom: int) -> tuple[float, float]:
  half = float(special.stdtrit(degrees_of_freedom, 0.5 + CONFIDENCE / 2)) * error
  return mean - half, mean + half


def chance_of_verdict(num_seeds: int) -> float:
  """How often |mean| > 2 standard errors happens by chance: P(|t| > 2), Student's t with n - 1 degrees of freedom."""
  return _p_value(2.0, 1.0, num_seeds - 1)
