"""Prints the table of a comparison, and writes its report into its folder."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_jax import disk
from moe_jax.comparison import report, sweep
from moe_jax.comparison.folder import ComparisonFolder, Result
from moe_jax.comparison.report import words
from moe_jax.comparison.results import varying

REPORT_FILE = "report.json"  # title, question, commands, notes, ..., from which joined folders have theirs


def read_texts(folder: pathlib.Path) -> dict[str, Any]:
  """Returns title, question, commands, notes and what varies, as the last report of a folder has them; {} if none."""
  texts = disk.read_object(folder / REPORT_FILE) or {}
  return texts if {"title", "question", "commands", "notes", "varies"} <= texts.keys() else {}


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
  **texts: Any,
) -> None:
  """Prints the table and writes the report of `results` into the folder. The first arm is the baseline."""
  results = sweep.marked(results, swept or {})
  varies = varying(results, varies)
  known = folder.known().get("arms", {})
  arms = {arm: known[arm] for arm in dict.fromkeys(result["arm"] for result in results) if arm in known}
  notes = [*notes, *filter(None, (words.of_field(arms, field) for field in states))]
  report.print_table(report.summarise(results), console)
  report.print_differences(report.paired_differences(results, varies=varies), console, varies)
  paths = report.write_report(
    folder.path, results, varies=varies, command="; ".join(commands), notes=notes, **texts
  )
  console.print(f"report: {paths['html']}", soft_wrap=True, markup=False)
