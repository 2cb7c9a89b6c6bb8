"""Prints the table of a comparison, and writes its report into its folder."""

import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_jax import disk
from moe_jax.comparison import report, sweep
from moe_jax.comparison.folder import ComparisonFolder, Result
from moe_jax.comparison.report import words
from moe_jax.comparison.results import group_by_arm, uneven_protocol, varying
from moe_jax.comparison.tried import TRIED, read_tried, tried_in_words
from moe_jax.errors import InputError

REPORT_FILE = "report.json"  # title, question, commands, notes, ..., from which joined folders have theirs


# What older reports kept among their notes, though it is of what results there were.
_OF_RESULTS = re.compile(
  r".*: chosen by \S+ on the selection seeds .*|.* has none of the options of the sweep, and is trained as it is\.|"
  r"Nothing is dropped .*|This is a tour: .*|Loss minus that of training and evaluation at .*|"
  r"Not all seeds have these evaluations: .*|Diverged, left out of capacity\.csv .*"
)


def read_texts(folder: pathlib.Path) -> dict[str, Any]:
  """Returns title, question, commands, notes and what varies, as the last report of a folder has them; {} if none."""
  texts = disk.read_object(folder / REPORT_FILE) or {}
  if not {"title", "question", "commands", "notes", "varies"} <= texts.keys():
    return {}
  return texts | {"notes": [note for note in texts["notes"] if not _OF_RESULTS.fullmatch(str(note))]}


def merged_texts(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the texts of a report on the results of several: of the last, with what the others say of their arms.

  Args:
    each: the texts of one or more reports, as `read_texts` returns them, in one configuration. An older one lacks `states`.
  """
  merged = dict(each[-1]) | {"commands": joined_commands([texts["commands"] for texts in each])}
  for name in ("notes", "varies", "states"):
    merged[name] = list(dict.fromkeys(entry for texts in each for entry in texts.get(name, ())))
  swept = [texts["swept"] for texts in each if "swept" in texts]
  if swept:  # the same fields, goal and seeds
    merged["swept"] = swept[-1] | {
      "protocols": {k: v for of in swept for k, v in of.get("protocols", {}).items()}
    }
  return merged


def joined_commands(each: Sequence[Sequence[str]]) -> list[str]:
  """Returns the different commands of several reports. One without --shard stands for its shards."""
  commands = list(dict.fromkeys(command for commands in each for command in commands))
  whole = {command for command in commands if _unsharded(command) == command}
  return [command for command in commands if command in whole or _unsharded(command) not in whole]


def _unsharded(command: str) -> str:
  """Returns a command without --shard, in whichever way the flag is written."""
  try:
    words, kept = shlex.split(command), []
  except ValueError:  # a quotation mark alone, in a text of a script of one's own
    return command
  while words:
    word = words.pop(0)
    name, equals, _ = word.partition("=")
    if name.lstrip("-") != "shard" or not name.startswith("-"):
      kept.append(word)
    elif not equals and words:
      words.pop(0)
  return shlex.join(kept)


def write_report(
  folder: ComparisonFolder,
  results: list[Result],
  console: Console,
  varies: Sequence[str] = (),
  swept: Mapping[str, Any] | None = None,
  states: Sequence[str] = (),
  *,
  commands: Sequence[str],
  notes: Sequence[str],
  of_results: Sequence[str] = (),
  **texts: Any,
) -> None:
  """Prints the table and writes the report of `results` into the folder. The first arm is the baseline.

  The notes are followed by what depends on the results, which no report keeps: `of_results`, what a sweep tried, what was
  dropped, and the fields of arms.

  Raises:
    InputError: if there are no results.
  """
  if not results:
    raise InputError(f"{folder.path}: there are no results to report, because the comparison has no arms")
  path = folder.path / TRIED
  tried = read_tried(path) if swept and path.exists() else []
  results = sweep.marked(results, swept or {}, tried)
  varies = varying(results, varies)
  known = folder.known().get("arms", {})
  arms = {arm: known[arm] for arm in dict.fromkeys(result["arm"] for result in results) if arm in known}
  summary = report.summarise(results)
  notes = [*notes, *of_results, *tried_in_words(tried), words.drops(summary, results)]
  notes = [*filter(None, notes), *filter(None, (words.of_field(arms, field) for field in states))]
  report.print_table(summary, console)
  for arm, of_arm in group_by_arm(results).items():
    if uneven := uneven_protocol(of_arm, "nll"):
      said = f"The mean of {arm} is over seeds that are not of one setting: they differ in {uneven}."
      console.print(said, soft_wrap=True, highlight=False, markup=False)
  report.print_differences(report.paired_differences(results, varies=varies), console, varies)
  paths = report.write_report(
    folder.path, results, varies=varies, command="; ".join(commands), notes=notes, **texts
  )
  console.print(f"report: {paths['html']}", soft_wrap=True, markup=False)
