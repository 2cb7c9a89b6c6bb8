"""The table as Markdown, for pages. Results of a run and files of an earlier one take the same path."""

from collections.abc import Sequence

from moe_jax.comparison.report.stored import Stored
from moe_jax.comparison.report.tables import cells_of, format_difference, shown_columns
from moe_jax.comparison.report.words import (
  Judgement,
  caption,
  differences_caption,
  diverged,
  judgements,
  not_comparable,
  other_sizes,
)
from moe_jax.comparison.statistics import Summary
from moe_jax.errors import InputError

_LEFT_OUT = ("nll", "tokens_per_second")  # perplexity says the one, and the caption the other
_VERDICT = ":verdict"


def markdown_table(stored: Stored, columns: Sequence[str] = ()) -> str:
  """Returns the command, the table, sentences (what diverged, other sizes, nothing resolved, not comparable), and the caption.

  Of a sweep, a table of what was tried follows.

  Args:
    stored: the table.
    columns: which columns, in order: the key of a quantity for `mean ± spread`, or, for a judged one,
      `key:verdict` for the difference from the first arm and its verdict. Empty: all.

  Raises:
    InputError: if the table has no such column.
  """
  summary, judged = stored.summary, {j.column.key: j for j in judgements(stored.differences)}
  every = [c.key for c in shown_columns(summary) if c.key not in _LEFT_OUT]
  columns = columns or [*every, *(f"{key}{_VERDICT}" for key in judged)]
  known = {c.key: c for c in summary.columns}
  for name in columns:
    if (name.removesuffix(_VERDICT) not in judged) if name.endswith(_VERDICT) else (name not in known):
      offered = ", ".join([*known, *(f"{key}{_VERDICT}" for key in judged)])
      raise InputError(f"columns={name}: the table has no such column; its columns: {offered}")
  shown = [known[name] for name in columns if name in known]
  asked = [judged[name.removesuffix(_VERDICT)] for name in columns if name not in known]
  kept = [name for name in columns if name in known or not judged[name.removesuffix(_VERDICT)].sentence]
  titles, rows = _with_verdicts(summary, kept, judged)
  lines = [f"`{stored.about['command']}`", "", _line(titles), "|---" * len(titles) + "|", *map(_line, rows)]
  text = caption(summary, shown)
  for said in filter(None, (diverged(summary), other_sizes(summary))):
    lines += ["", said]
  if asked:
    said = [*(j.sentence for j in asked), not_comparable(stored.differences)]
    lines += ["", " ".join(filter(None, said))] if any(said) else []
    text += " " + differences_caption(stored.differences, stored.about.get("varies", ()), asked)
  return "\n".join([*lines, "", text.strip(), *_tried(stored.tried)]) + "\n"


def _tried(lines: Sequence[dict[str, str]]) -> list[str]:
  """Returns the lines that say what a sweep tried for each arm, best first."""
  swept = [line for line in lines if line["value"]]
  if not swept:
    return []
  seeds, goal = swept[0]["seeds"].replace(" ", ", "), swept[0]["goal"]
  steps = ["Steps"] if any(line.get("num_steps") for line in swept) else []  # which older ones do not say
  said = [
    "",
    f"Tried for each arm on the seeds {seeds}, and chosen by `{goal}`:",
    "",
    _line(["Arm", "Values", *steps, "NLL", "MaxVio global", ""]),
    "|---" * (5 + len(steps)) + "|",
  ]
  for arm in dict.fromkeys(line["arm"] for line in swept):
    of_arm = [line for line in swept if line["arm"] == arm]
    number = lambda line, key: f"{float(line[key]):.4f}" if line[key] else ""  # diverged: none
    for line in sorted(of_arm, key=lambda line: float(line["nll"] or "inf")):
      chosen = "chosen" if line["chosen"] == "True" else ""
      notes = ", ".join(filter(None, [chosen, line["note"]]))
      tried = [f"`{arm}`", line["value"], *(line.get("num_steps") or "" for _ in steps)]
      said.append(_line([*tried, number(line, "nll"), number(line, "max_vio"), notes]))
  return said


def _with_verdicts(
  summary: Summary, names: Sequence[str], judged: dict[str, Judgement]
) -> tuple[list[str], list[list[str]]]:
  """Returns (titles, rows) with the named columns in their order."""
  known = {c.key: c for c in summary.columns}
  titles, rows = cells_of(summary, [known[name] for name in names if name in known])
  lead = len(titles) - sum(name in known for name in names)
  rows = [[f"`{row[0]}`" if i < len(summary.rows) else row[0], *row[1:]] for i, row in enumerate(rows)]
  for place, name in enumerate(names, start=lead):
    if name in known:
      continue
    judgement = judged[name.removesuffix(_VERDICT)]
    titles.insert(place, f"{judgement.column.title}: difference")
    of_arm = {d.arm: d for d in judgement.differences}
    for i, row in enumerate(rows):
      if i == 0:
        cell = "baseline"
      elif i >= len(summary.rows) or summary.rows[i].arm not in of_arm:
        cell = ""
      else:
        d = of_arm[summary.rows[i].arm]
        said = f": {d.verdict}" if d.resolved else ""
        cell = f"{format_difference(d)}{said}"
        cell = "not comparable" if d.broken else "diverged" if d.diverged else cell
      row.insert(place, cell)
  return titles, rows


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"
