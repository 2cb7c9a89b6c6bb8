"""Means and spreads over seeds: what the tables of a comparison consist of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.comparison.facts import facts_of
from moe_jax.comparison.results import Result, diverged, group_by_arm, lookup


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
  lower_is_better: bool | None = True
  judged: bool = False  # whether differences in it are tested and get verdicts
  value: Callable[[Result], float | None] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Row:
  """One arm over its seeds."""

  arm: str
  seeds: tuple[int, ...]
  cells: dict[str, Stat | None]  # by Column.key; None: no seed has the quantity
  # R, MaxVio over the validation set of each layer; empty if unknown
  max_vio_layers: list[Stat] = dataclasses.field(default_factory=list, compare=False)
  num_params: int | None = None  # the most of its seeds; None if no result says it

  @property
  def max_vio_range(self) -> tuple[float, float] | None:
    """(lowest, highest) over layers of the mean over seeds."""
    means = [s.mean for s in self.max_vio_layers]
    return (min(means), max(means)) if means else None


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a table shows.

  columns: its quantities.
  rows: its arms; the first is the baseline.
  yardsticks: name -> bits per byte of byte models that were counted on the training text.
  facts: what its caption says, as from `facts_of`.
  """

  columns: tuple[Column, ...]
  rows: tuple[Row, ...]
  yardsticks: dict[str, float]
  facts: dict[str, Any]

  @property
  def diverged(self) -> list[str]:
    """The arms with a diverged seed."""
    return list(dict.fromkeys(arm for arm, _, _ in self.facts.get("diverged", ())))


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


def _of_experts(*path: str) -> Callable[[Result], float | None]:
  """Like `_at`, but nothing for a dense model, which has no load to be even or uneven."""
  at = _at(*path)
  return lambda result: None if lookup(result, "model", "num_experts") in ([], [1]) else at(result)


def _excess(result: Result) -> float | None:
  """Validation nll above what a perfect model would reach on the same tokens, nats/token.

  The floor measured on the validation tokens is preferred to the entropy rate, from which it differs by
  sampling noise that all arms share.
  """
  nll = number(lookup(result, "validation", "nll"))
  floor = number(result.get("validation_floor"))
  floor = number(result.get("entropy_rate")) if floor is None else floor
  return None if nll is None or floor is None else nll - floor


_PERPLEXITY = Column("perplexity", "Perplexity", "", ".3f", value=_at("validation", "perplexity"))
_BITS_PER_BYTE = Column("bits_per_byte", "Bits per byte", "", ".4f", value=_at("validation", "bits_per_byte"))
_REST = (
  Column("nll", "NLL", "nats/token", ".4f", value=_at("validation", "nll")),
  Column("excess_nll", "Excess NLL", "nats/token", ".4f", value=_excess),
)
_LAST = Column("tokens_per_second", "Tokens/s", "", ",.0f", False, value=_at("training", "tokens_per_second"))


def columns_of(results: Sequence[Result]) -> tuple[Column, ...]:
  """Returns the columns of a table: those of every run, and between them the metrics that the results declare.

  Three of them are judged: quality (bits per byte where every result has it, otherwise perplexity), balance
  (MaxVio over the validation set) and specialisation (mutual information of expert and domain, where there are several domains). These are what
  comparisons of routers and balancers ask about. The other columns restate one of the three (NLL and excess are
  functions of quality, load entropy and dead experts of the load) or depend on what else the machine does
  (tokens per second). Judging them as well would tell nothing new, and each further cell makes the correction
  for many cells stricter for all.

  An experiment that asks about a quantity of its own declares it beside the metrics, with `of_experts: False` if dense models have
  it, too, and `judged: True` if its question is about that one.
  """
  # Besides quality. With one domain, mutual information is zero by definition.
  several = any(len(result.get("domains") or ()) > 1 for result in results)
  judged = ("max_vio", "mutual_information") if several else ("max_vio",)
  declared = {}
  for result in results:
    for entry in result.get("columns", ()):
      declared.setdefault(entry["key"], entry)
  metrics = tuple(
    Column(
      e["key"],
      e["title"],
      e["unit"],
      e["format"],
      e["lower_is_better"],
      e.get("judged", e["key"] in judged),
      (_of_experts if e.get("of_experts", True) else _at)(e["part"], e["name"]),
    )
    for e in declared.values()
  )
  # What diverged says nothing of its text.
  known = [_BITS_PER_BYTE.value(r) is not None for r in [r for r in results if not diverged(r)] or results]
  in_bytes = bool(known) and all(known)
  first = (dataclasses.replace(_BITS_PER_BYTE, judged=in_bytes),) if any(known) else ()
  return (*first, dataclasses.replace(_PERPLEXITY, judged=not in_bytes), *_REST, *metrics, _LAST)


def stat(values: Sequence[float | None]) -> Stat | None:
  """Mean and sample standard deviation of the values that are there. NaN stays NaN: a diverged seed shows."""
  present = np.array([x for x in values if x is not None], np.float64)
  if not present.size:
    return None
  with np.errstate(invalid="ignore"):  # inf - inf in the spread of a diverged arm
    spread = float(np.std(present, ddof=1)) if present.size > 1 else None
  return Stat(float(np.mean(present)), spread, present.size)


def summarise(results: Sequence[Result]) -> Summary:
  """Returns one row per arm, in the order of the results, with what a table must say besides.

  Values per layer are averaged over layers first, so a spread is one between seeds, not between layers.
  """
  rows, columns = [], columns_of(results)
  for arm, of_arm in group_by_arm(results).items():
    cells = {column.key: stat([column.value(r) for r in of_arm]) for column in columns}
    layers = [lookup(r, "validation", "max_vio") for r in of_arm]
    layers = [[number(x) for x in each] for each in layers if isinstance(each, (list, tuple))]
    by_layer = [stat(layer) for layer in zip(*layers, strict=False)]
    seeds = tuple(r["seed"] for r in of_arm)
    num_params = max((r["num_params"] for r in of_arm if r.get("num_params")), default=None)
    rows.append(Row(arm, seeds, cells, [s for s in by_layer if s is not None], num_params))
  yardsticks = next((r["yardsticks"] for r in results if r.get("yardsticks")), {})
  return Summary(columns, tuple(rows), dict(yardsticks), facts_of(results))
