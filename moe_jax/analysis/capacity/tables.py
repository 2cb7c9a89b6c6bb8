"""The numbers of the capacity study: capacity.csv, and ours beside those of ST-MoE."""

import csv
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import disk
from moe_jax.analysis.capacity.study import NONE, Setting
from moe_jax.comparison.results import Result
from moe_jax.comparison.statistics import number, stat

# ST-MoE (2202.08906), Table 8: negative log perplexity by capacity factor of training and of evaluation.
PUBLISHED = {
  "top-1": {
    ("0.75", "0.75"): -1.428,
    ("0.75", "2"): -1.404,
    ("1", "1"): -1.397,
    ("1", "2"): -1.384,
    ("1.25", "1.25"): -1.378,
    ("1.25", "2"): -1.373,
  },
  "top-2": {
    ("0.75", "0.75"): -1.424,
    ("0.75", "2"): -1.402,
    ("1", "1"): -1.392,
    ("1", "2"): -1.378,
    ("1.25", "1.25"): -1.375,
    ("1.25", "2"): -1.369,
    ("2", "2"): -1.360,
    ("2", "3"): -1.359,
  },
}
PAIRS = tuple(PUBLISHED["top-2"])
REFERENCE = ("1.25", "1.25")  # whose loss the others are compared with


class Cell(NamedTuple):
  """One arm, evaluated at one factor. Quantities are by seed."""

  setting: Setting
  factor: str  # of the evaluation
  group: str  # of the evaluation
  nll: dict[int, float]  # nats per token
  bits: dict[int, float]  # per byte, or per token where the text has no bytes
  dropped: dict[int, float]  # fraction of the assignments, mean over layers
  dropped_in_training: dict[int, float]  # the same in the last part of training
  sees_later_tokens: bool | None  # in this evaluation; None: not known


def cells(results: Sequence[Result], settings: Mapping[str, Setting]) -> list[Cell]:
  """Returns a cell for each arm and evaluation, in the order of the results.

  The first of each arm is its `validation`: at the factor and in the groups of training. Runs that diverged are left
  out: they have none of these numbers. A cell has the seeds that have the evaluation. `left_out` says both in words.
  """
  found = []
  for arm, by_seed in _by_arm(results).items():
    setting = settings[arm]
    own = {
      seed: {**r["validation"], "sees_later_tokens": r["sees_later_tokens"]} for seed, r in by_seed.items()
    }
    found.append(_cell(setting, (setting.factor, setting.group), own, by_seed))
    for at, further in _further(by_seed, setting).items():
      found.append(_cell(setting, at, further, by_seed))
  return found


def _by_arm(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
  """Returns the results that have numbers, by arm and seed."""
  found: dict[str, dict[int, Result]] = {}
  for result in results:
    if "diverged" not in result:
      found.setdefault(result["arm"], {})[result["seed"]] = result
  return found


def _further(by_seed: Mapping[int, Result], setting: Setting) -> dict[tuple[str, str], dict[int, Any]]:
  """Returns the evaluations of one arm other than its own, by (factor, group) and seed."""
  found: dict[tuple[str, str], dict[int, Any]] = {}
  for seed, result in by_seed.items():
    for name, evaluation in result.get("evaluations", {}).items():
      factor, _, group = name.partition(" ")
      if (factor, group) != (setting.factor, setting.group):
        found.setdefault((factor, group), {})[seed] = evaluation
  return found


def left_out(results: Sequence[Result], settings: Mapping[str, Setting]) -> list[str]:
  """Returns a sentence on the runs that diverged, and one on evaluations that not all seeds have, where there are any."""
  diverged = [f"{r['arm']} seed {r['seed']}" for r in results if "diverged" in r]
  fewer = [
    f"{arm} at {' '.join(filter(None, at))} (seeds {', '.join(map(str, sorted(of)))} of {', '.join(map(str, sorted(by_seed)))})"
    for arm, by_seed in _by_arm(results).items()
    for at, of in _further(by_seed, settings[arm]).items()
    if len(of) < len(by_seed)
  ]
  found = [f"Diverged, left out of capacity.csv and capacity.md: {', '.join(diverged)}."] if diverged else []
  return found + ([f"Not all seeds have these evaluations: {', '.join(fewer)}."] if fewer else [])


def _cell(
  setting: Setting, at: tuple[str, str], evaluations: Mapping[int, Any], results: Mapping[int, Result]
) -> Cell:
  return Cell(
    setting,
    *at,
    nll={seed: number(e["nll"]) for seed, e in evaluations.items()},
    bits={seed: _bits(e) for seed, e in evaluations.items()},
    dropped={seed: _mean(e["dropped_fraction"]) for seed, e in evaluations.items()},
    dropped_in_training={seed: _mean(results[seed]["training"]["dropped_fraction"]) for seed in evaluations},
    sees_later_tokens=_any(e["sees_later_tokens"] for e in evaluations.values()),
  )


def _any(values: Iterable[bool | None]) -> bool | None:
  """Returns `any(values)`, or None if one of them is not known and none is True."""
  found = set(values)
  return True if True in found else None if None in found else False


def _bits(evaluation: Mapping[str, Any]) -> float:
  return number(evaluation.get("bits_per_byte", number(evaluation["nll"]) / math.log(2)))


def unit(results: Sequence[Result]) -> str:
  """Returns the unit of `Cell.bits`."""
  known = ["bits_per_byte" in r["validation"] for r in results if "diverged" not in r]
  return "bits per byte" if all(known) else "bits per token"


def _mean(layers: Sequence[Any]) -> float:
  return sum(map(number, layers)) / len(layers)


def write_csv(path: pathlib.Path, found: Sequence[Cell]) -> None:
  """One line per arm and evaluation: means and sample standard deviations over seeds."""
  quantities = ("nll", "bits", "dropped", "dropped_in_training")
  names = ["method", "train_factor", "train_group", "eval_factor", "eval_group", "num_seeds"]
  names += [f"{name}_{part}" for name in quantities for part in ("mean", "std")]
  with disk.whole_text(path) as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "sees_later_tokens"])
    for cell in found:
      line = [*cell.setting, cell.factor, cell.group, len(cell.nll)]
      for name in quantities:
        each = stat(list(getattr(cell, name).values()))
        line += [each.mean, "" if each.spread is None else each.spread]
      writer.writerow([*line, "" if cell.sees_later_tokens is None else cell.sees_later_tokens])


def series(found: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
  """Returns the cells of each method and kind of group. What has no capacity is in all kinds of its method."""
  groups = dict.fromkeys(group for cell in found for group in (cell.setting.group, cell.group) if group)
  keys = {(cell.setting.method, group): [] for cell in found for group in groups or ("",)}
  for (method, group), own in keys.items():
    own += [c for c in found if c.setting.method == method and {c.setting.group, c.group} <= {"", group}]
  return keys


def in_order(factors: Iterable[str]) -> list[str]:
  """Returns the different factors, the one without a capacity last."""
  return sorted({*factors}, key=lambda factor: math.inf if factor == NONE else float(factor))


def write_markdown(
  path: pathlib.Path, found: Sequence[Cell], unit: str, command: str, missing: Sequence[str] = ()
) -> None:
  """Writes the bits by factor of training and evaluation, and ST-MoE's comparison with ours beside it.

  Args:
    path: of the file.
    found: as from `cells`.
    unit: of the bits.
    command: what reproduces it.
    missing: sentences as from `left_out`.
  """
  what = f"{unit.capitalize()} on the validation set: mean ± sample standard deviation over seeds."
  lines = [f"`{command}`", "", " ".join([what, *missing])]
  for (method, group), own in series(found).items():
    by_factors = {(c.setting.factor, c.factor): c for c in own}
    trained, evaluated = (in_order(pair[i] for pair in by_factors) for i in (0, 1))
    lines += ["", f"`{method}`, groups of a {group}:" if group else f"`{method}`:", ""]
    lines += [f"| trained at | {' | '.join(f'evaluated at {f}' for f in evaluated)} |"]
    lines += ["|---" * (len(evaluated) + 1) + "|"]
    for t in trained:
      row = [_text(by_factors[t, e].bits, ".4f") if (t, e) in by_factors else "" for e in evaluated]
      lines.append(f"| {t} | {' | '.join(row)} |")
  lines += ["", *_beside_st_moe(found)]
  disk.write_text(path, "\n".join(lines) + "\n")


def _beside_st_moe(found: Sequence[Cell]) -> list[str]:
  ours = {
    f"`{method}`" + (f", {group}" if group else ""): {(c.setting.factor, c.factor): c.nll for c in own}
    for (method, group), own in series(found).items()
  }
  titles = [f"ST-MoE {name}" for name in PUBLISHED] + list(ours)
  lines = [
    f"Loss minus that of training and evaluation at {REFERENCE[0]}, nats per token, paired by seed; ST-MoE: "
    "2202.08906, Table 8, one run each.",
    "",
    f"| trained at | evaluated at | {' | '.join(titles)} |",
    "|---" * (len(titles) + 2) + "|",
  ]
  for pair in PAIRS:
    row = [
      f"{values[REFERENCE] - values[pair]:+.3f}" if pair in values else "-" for values in PUBLISHED.values()
    ]
    row += [_text(_minus(of.get(pair), of.get(REFERENCE)), "+.3f") for of in ours.values()]
    lines.append(f"| {pair[0]} | {pair[1]} | {' | '.join(row)} |")
  return lines


def st_moe_in_words(found: Sequence[Cell]) -> list[str]:
  """Returns the rows of ST-MoE's table as sentences, with ours beside them, for the notes of a report."""
  _, _, header, _, *rows = _beside_st_moe(found)
  titles = [title.strip().replace("`", "") for title in header.strip("|").split("|")][2:]
  sentences = []
  for row in rows:
    trained, evaluated, *values = (cell.strip() for cell in row.strip("|").split("|"))
    each = "; ".join(f"{title} {value}" for title, value in zip(titles, values, strict=True) if value != "-")
    sentences.append(f"trained at {trained} and evaluated at {evaluated}: {each}.")
  first = (
    f"Loss minus that of training and evaluation at {REFERENCE[0]}, nats per token, beside ST-MoE's Table 8 "
  )
  return [f"{first}(2202.08906): {' '.join(sentences)}"]


def _minus(one: Mapping[int, float] | None, other: Mapping[int, float] | None) -> dict[int, float]:
  if one is None or other is None:
    return {}
  return {seed: one[seed] - other[seed] for seed in one if seed in other}


def _text(by_seed: Mapping[int, float], form: str) -> str:
  each = stat(list(by_seed.values()))
  if each is None:
    return "-"
  return format(each.mean, form) + ("" if each.spread is None else f" ± {each.spread:{form.strip('+')}}")
