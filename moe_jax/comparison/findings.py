"""Published claims, re-tested: each is one difference between two arms of a stored table, with a verdict.

docs/findings.toml has the claims. All of them are one family for Holm's correction, beside that of their tables.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence

from moe_jax.comparison.differences import Difference, difference_of, judged
from moe_jax.comparison.report import Stored
from moe_jax.errors import InputError

DIRECTIONS = ("lower", "higher")


@dataclasses.dataclass(frozen=True)
class Finding:
  """A claim about two arms.

  claim: a sentence.
  source: arXiv id and place.
  published: its figures.
  table: a folder in docs/results/.
  arm, against: two arms of the table.
  quantity: the key of a column.
  expected: whether the claim says that the quantity of `arm` is "lower" or "higher" than that of `against`.
  varies: what the claim is about, so that the arms may differ in it, e.g. ["active width"].
  """

  claim: str
  source: str
  published: str
  table: str
  arm: str
  against: str
  quantity: str
  expected: str
  varies: Sequence[str] = ()


def read_findings(path: str | os.PathLike[str]) -> list[Finding]:
  """Returns the claims of a TOML file.

  Raises:
    InputError: if an entry lacks a field, has another one, or expects no direction.
  """
  with open(path, "rb") as file:
    entries = tomllib.load(file)["finding"]
  found = []
  for i, entry in enumerate(entries):
    try:
      finding = Finding(**entry)
    except TypeError as error:
      raise InputError(f"{path}: finding {i + 1}: {str(error).rpartition('__init__() ')[2]}") from None
    if finding.expected not in DIRECTIONS:
      raise InputError(f"{path}: finding {i + 1}: expected={finding.expected!r} must be lower or higher")
    found.append(finding)
  return found


def tested(findings: Sequence[Finding], tables: Mapping[str, Stored]) -> list[Difference]:
  """Returns `arm` minus `against` of every claim, paired by seed and judged together.

  Raises:
    InputError: if a table has no such arm or quantity.
  """
  return judged([_difference(finding, tables[finding.table]) for finding in findings])


def _difference(finding: Finding, stored: Stored) -> Difference:
  baseline = stored.summary.rows[0]
  of_quantity = {d.arm: d for d in stored.differences if d.key == finding.quantity}
  missing = [a for a in (finding.arm, finding.against) if a not in of_quantity and a != baseline.arm]
  if missing or not of_quantity:
    raise InputError(
      f"table {finding.table}: has no {finding.quantity} of {', '.join(missing) or 'two arms'}"
    )
  column = next(iter(of_quantity.values())).column
  zero = dict.fromkeys(baseline.seeds, 0.0)
  one, other = (
    of_quantity[arm].per_seed if arm in of_quantity else zero for arm in (finding.arm, finding.against)
  )
  per_seed = {seed: one[seed] - other[seed] for seed in one if seed in other}
  reasons = {of_quantity[arm].broken for arm in (finding.arm, finding.against) if arm in of_quantity}
  lost = {d.diverged for d in (of_quantity.get(arm) for arm in (finding.arm, finding.against)) if d} - {""}
  broken = {reason for text in reasons if text for reason in text.split(", ")} - {*finding.varies}
  return difference_of(
    finding.arm,
    finding.against,
    dataclasses.replace(column, judged=True),
    per_seed,
    ", ".join(sorted(broken)),
    "; ".join(sorted(lost)),
  )


def verdict(finding: Finding, difference: Difference) -> str:
  """Returns what the difference says of the claim."""
  if difference.broken:
    return f"not comparable: {difference.broken}"
  if difference.diverged:
    return f"no verdict: diverged: {difference.diverged}"
  if not difference.resolved:
    return "not resolved"
  return "**reproduced**" if difference.verdict.startswith(finding.expected) else "**contradicted**"


def markdown(findings: Sequence[Finding], tables: Mapping[str, Stored]) -> str:
  """Returns a table with a line per claim."""
  lines = ["| claim | published | measured here | verdict |", "|---|---|---|---|"]
  for finding, d in zip(findings, tested(findings, tables), strict=True):
    low, high = (format(x, f"+{d.column.format}") for x in d.interval or (float("nan"),) * 2)
    unit = f" {d.column.unit}" if d.column.unit else ""
    lines.append(
      f"| {finding.claim} | {finding.published} ({finding.source}) | {d.column.title}, `{d.arm}` minus `{d.baseline}`: "
      f"{d.mean:+{d.column.format}} [{low}, {high}]{unit}, {len(d.per_seed)} seeds (`{finding.table}`) | "
      f"{verdict(finding, d)} |"
    )
  return "\n".join(lines)
