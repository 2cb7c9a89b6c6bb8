"""What a table says in words: its caption, its verdicts, and sentences where there is nothing to show."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.comparison.differences import (
  LEVEL,
  MIN_SEEDS_FOR_VERDICT,
  POWER,
  TOO_FEW_SEEDS,
  UNRESOLVED,
  Difference,
  family_of,
  smallest_resolvable,
)
from moe_jax.comparison.facts import facts_sentence, short
from moe_jax.comparison.results import PROTOCOL
from moe_jax.comparison.statistics import Column, Summary

# What columns mean, for those whose titles do not say it.
_MEANINGS = {
  "bits_per_byte": "Bits per byte: of the validation text.",
  "max_vio": "MaxVio = max(load)/mean(load) - 1 over the experts of a layer, mean over layers; 0 = balanced, E/K - 1 = "
  "every token goes to the same K of E experts. Global: load counted over the whole validation set.",
  "max_vio_training": "MaxVio batch: per training batch, mean over the tail of training.",
  "dropped_fraction": "Dropped: share of (token, expert) assignments over capacity.",
  "load_entropy": "Load entropy: 1 = balanced.",
  "mutual_information": "Mutual information: between expert and domain.",
}


def caption(summary: Summary, columns: Sequence[Column]) -> str:
  """Returns what was run, what ± is, and what the columns mean."""
  counts = sorted({len(row.seeds) for row in summary.rows})
  if counts == [1]:
    spread = "One seed per arm, so there is no spread: differences may be chance."
  else:
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = f"Mean ± sample standard deviation over {n} seeds."
  but = ", ".join(summary.facts.get("not_chosen", ()))
  but = f", except {but}, which an earlier command chose" if but else ""
  swept = [f"Each arm is at its best of {chosen}{but}." for chosen in summary.facts.get("swept", ())]
  sentences = [facts_sentence(summary.facts), *swept, spread]
  meanings = [_MEANINGS[column.key] for column in columns if column.key in _MEANINGS]
  if "eval_batches" in summary.facts:
    limits = " or ".join(str(n) for n in summary.facts["eval_batches"])
    meanings = [
      text.replace("over the whole validation set", "over all evaluated tokens").replace(
        "of the validation text", f"of {limits} batches of the validation text"
      )
      for text in meanings
    ]
  sentences += meanings
  if shown_yardsticks(summary, columns):
    names = ", ".join(summary.yardsticks)
    sentences.append(f"Byte {names}: smoothed models counted on the training text.")
  return " ".join(sentence for sentence in sentences if sentence)


def other_sizes(summary: Summary) -> str:
  """Returns a line that names the arms whose parameters are over 10% more or fewer than the first arm's, or ""."""
  base = summary.rows[0]
  known = [row for row in summary.rows if base.num_params and row.num_params]
  more = [row for row in known if row.num_params > 1.1 * base.num_params]
  fewer = [row for row in known if row.num_params < 0.9 * base.num_params]
  found = []
  for word, rows in (("More", more), ("Fewer", fewer)):
    arms = ", ".join(f"{row.arm} ({short(row.num_params)})" for row in rows)
    found += [f"{word} parameters than {base.arm} ({short(base.num_params)}): {arms}."] if rows else []
  return " ".join(found)


def diverged(summary: Summary) -> str:
  """Returns the seeds that diverged, why, and what that means for their arms; "" if there are none."""
  lost = [f"{arm} seed {seed} ({reason})" for arm, seed, reason in summary.facts.get("diverged", ())]
  if not lost:
    return ""
  text = (
    f"Diverged: {', '.join(lost)}. Such an arm has no verdict, and its numbers are those of its other seeds."
  )
  if summary.rows[0].arm in summary.diverged:
    text += f" No other arm has one either, because {summary.rows[0].arm} is the baseline."
  return text


def drops(summary: Summary, results: Sequence[Mapping[str, Any]]) -> str:
  """Returns whether tokens are dropped, and the least and the largest share of an arm; "" if results do not say it.

  Args:
    summary: of the results.
    results: as runs write them. Those that diverged do not count.
  """
  slots = {result.get("slots") for result in results if "diverged" not in result}
  if slots == {"dropless"}:
    return "Nothing is dropped, so a difference in quality is not one of dropped tokens."
  parts = []
  for key, where in (("dropped_fraction_training", "training"), ("dropped_fraction", "validation")):
    of_arm = {row.arm: row.cells[key].mean for row in summary.rows if row.cells.get(key)}
    ends = dict.fromkeys((min(of_arm, key=of_arm.get), max(of_arm, key=of_arm.get))) if of_arm else ()
    parts += [f"{' to '.join(f'{of_arm[arm]:.3g} ({arm})' for arm in ends)} in {where}"] if ends else []
  if None in slots or not parts:
    return ""
  return f"Dropped of the (token, expert) assignments: {', '.join(parts)}. A difference in quality may be one of dropped tokens."


def byte_models(summary: Summary) -> dict[str, float]:
  """Returns the yardsticks under the names that rows and lines have."""
  return {f"byte {name}": bits for name, bits in summary.yardsticks.items()}


def shown_yardsticks(summary: Summary, columns: Sequence[Column]) -> dict[str, float]:
  """Returns the yardsticks by name if their column is among `columns`."""
  return byte_models(summary) if any(column.key == "bits_per_byte" for column in columns) else {}


@dataclasses.dataclass(frozen=True)
class Judgement:
  """What the table says about one judged quantity: cells, or one sentence where nothing is resolved."""

  column: Column
  differences: tuple[Difference, ...]  # one per arm; empty where the sentence says all
  sentence: str


def judgements(differences: Sequence[Difference]) -> list[Judgement]:
  """Returns one per judged quantity that the arms and the baseline have."""
  columns = {d.key: d.column for d in differences if d.column.judged}
  return [_judgement(differences, column) for column in columns.values()]


def _judgement(differences: Sequence[Difference], column: Column) -> Judgement:
  cells = tuple(d for d in differences if d.key == column.key)
  if any(d.resolved for d in cells):
    return Judgement(column, cells, "")
  quantity, tested = in_sentence(column), family_of(cells)
  if tested:
    least = smallest_resolvable(differences, column.key)
    seeds = min(len(d.per_seed) for d in tested)
    arms = f"{len(tested)} arm{'s' if len(tested) > 1 else ''} against {tested[0].baseline}"
    could = "" if least is None else f"; a true difference of {two_digits(least)} would be, with 80% power"
    return Judgement(column, (), f"No difference in {quantity} is resolved ({arms}, {seeds} seeds{could}).")
  comparable = [d for d in cells if not d.broken]
  if not comparable:
    why = "no arm is comparable with the baseline"
  elif all(d.diverged for d in comparable):
    why = f"a seed diverged ({'; '.join(dict.fromkeys(d.diverged for d in comparable))})"
  else:
    why = f"an arm needs at least {MIN_SEEDS_FOR_VERDICT} seeds that the baseline has"
  return Judgement(column, (), f"Differences in {quantity} have no verdict: {why}.")


def not_comparable(differences: Sequence[Difference]) -> str:
  """Returns what arms have no verdict, in any quantity or in one, with the reasons; empty if there are none."""
  comparable = {d.arm for d in differences if not d.broken}
  reasons = {d.arm: d.broken for d in differences if d.arm not in comparable}
  found = [(f"Not comparable with {differences[0].baseline}", reasons)] if reasons else []
  for column in {d.key: d.column for d in differences if d.column.judged}.values():
    cells = [d for d in differences if d.key == column.key and d.broken and d.arm in comparable]
    if cells:
      title = f"Not comparable with {cells[0].baseline} in {in_sentence(column)}"
      found.append((title, {d.arm: d.broken for d in cells}))
  each = ((title, ", ".join(f"{a} ({reason})" for a, reason in of.items())) for title, of in found)
  return " ".join(f"{title}, so without a verdict: {arms}." for title, arms in each)


def differences_caption(
  differences: Sequence[Difference], varies: Sequence[str] = (), shown: Sequence[Judgement] | None = None
) -> str:
  """Returns how to read the differences, and what this table could have resolved.

  Args:
    differences: those of the table.
    varies: what arms may differ in.
    shown: the judgements whose cells are shown; None: all.
  """
  if not differences:
    return ""
  text = (
    f"Differences: arm minus {differences[0].baseline}, paired by seed, with the {1 - LEVEL:.0%} interval of "
  )
  text += "each cell alone by Student's t."
  family = family_of(differences)
  if family:
    text += (
      f" A verdict needs p < {LEVEL:g} in the paired t test after Holm's correction over the {len(family)} "
    )
    text += f"judged cell{'s' if len(family) > 1 else ''}."
  shown = judgements(differences) if shown is None else shown
  if any(d.verdict in (UNRESOLVED, TOO_FEW_SEEDS) for judgement in shown for d in judgement.differences):
    text += " Differences without a verdict are not resolved."
  columns = {d.key: d.column for d in family}
  least = {key: smallest_resolvable(differences, key) for key in columns}
  could = [f"{two_digits(x)} in {in_sentence(columns[key])}" for key, x in least.items() if x is not None]
  if could:
    text += f" True differences that it would resolve with {POWER:.0%} power: {', '.join(could)}."
  if varies:
    text += f" By design, arms differ in: {', '.join(PROTOCOL[key] for key in varies)}."
  return text


def in_sentence(column: Column) -> str:
  """Returns the title as it is written within a sentence."""
  return re.sub(r"^[A-Z](?=[a-z]+\b)", lambda first: first[0].lower(), column.title)


def two_digits(x: float) -> str:
  """Returns a positive number with two significant digits, without an exponent."""
  return np.format_float_positional(x, precision=2, fractional=False, trim="-")


def of_field(arms: Mapping[str, Mapping[str, Any]], field: str) -> str:
  """Returns a sentence on a field of arms: what most have, and what the others have; "" if there are no arms.

  Args:
    arms: their fields, as a config.json has them.
    field: which one, e.g. "balancers".
  """
  if not arms:
    return ""
  values = {name: str(arm.get(field, "that of the configuration")) for name, arm in arms.items()}
  ((most, _),) = collections.Counter(values.values()).most_common(1)
  own = [f"{name} has {value}" for name, value in values.items() if value != most]
  return f"Arms have {field}={most}" + (f", except that {', '.join(own)}." if own else ".")
