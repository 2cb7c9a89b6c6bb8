"""The leaderboard of attempts at a target: the score of an attempt, and the table of docs/LEADERBOARD.md."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from moe_jax.errors import InputError

MEASURED = ("seconds", "tokens", "bytes")
ARMS = ("reference", "attempt")  # in the order in which they run
CONFIDENCE = 0.95


def score(pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]] | None:
  """Returns for seconds, tokens and bytes the ratio attempt / reference: [mean, low, high].

  The mean is geometric, over seeds, and the interval is Student's t interval of the mean of the logarithms, at 95%.
  None with fewer than two seeds, or if a run did not reach the target: the ratio of a run that was cut off says nothing.
  """
  if len(pairs) < 2 or not all(pair[arm]["reached"] for pair in pairs for arm in ARMS):
    return None
  quantile = float(special.stdtrit(len(pairs) - 1, 0.5 + CONFIDENCE / 2))
  found = {}
  for name in MEASURED:
    logs = np.log([pair["attempt"][name] / pair["reference"][name] for pair in pairs])
    half = quantile * float(np.std(logs, ddof=1)) / math.sqrt(len(pairs))
    found[name] = [math.exp(x) for x in (logs.mean(), logs.mean() - half, logs.mean() + half)]
  return found


HEADER = (
  "| attempt | seconds / reference | tokens / reference | bytes / reference | seconds | reference seconds | steps | active parameters "
  "| bits per byte | MaxVio | seeds at the target | versions | commit |"
)


def row(entry: Mapping[str, Any]) -> str:
  """Returns the line of an entry in the table."""
  of = lambda arm, name: [pair[arm][name] for pair in entry["seeds"]]
  mean = lambda arm, name: float(np.mean(of(arm, name)))
  ratio = lambda name: (
    "{:.3f} [{:.3f}, {:.3f}]".format(*entry["score"][name]) if entry["score"] else "no score"
  )
  reached = [f"{sum(of(arm, 'reached'))} of {len(entry['seeds'])}" for arm in ("attempt", "reference")]
  short = "" if all(of("reference", "reached")) else f" (reference: {reached[1]})"
  cells = [
    entry["name"],
    *map(ratio, MEASURED),
    f"{mean('attempt', 'seconds'):.1f}",
    f"{mean('reference', 'seconds'):.1f}",
    f"{mean('attempt', 'num_steps'):.0f} of {entry['attempt']['train']['num_steps']}",
    f"{entry['num_active_params']:,}",
    f"{mean('attempt', 'bits_per_byte'):.3f}",
    f"{mean('attempt', 'max_vio'):.2f}",
    reached[0] + short,
    "; ".join(dict.fromkeys(_versions(pair["versions"]) for pair in entry["seeds"])),
    f"`{entry['commit'][:12]}`",
  ]
  return f"| {' | '.join(cells)} |"


def _versions(of: Mapping[str, str]) -> str:
  return f"Python {of['python']}, JAX {of['jax']}"


def table(entries: Sequence[Mapping[str, Any]]) -> str:
  """Returns the table: the lowest ratio of seconds first, and attempts without a score at the end."""
  rank = lambda entry: (
    entry["score"] is None,
    entry["score"]["seconds"][0] if entry["score"] else 0,
    entry["name"],
  )
  return "\n".join([HEADER, "|---" * (HEADER.count("|") - 1) + "|", *map(row, sorted(entries, key=rank))])


def read_entries(folder: pathlib.Path, check: Callable[[Mapping[str, Any]], str]) -> list[dict[str, Any]]:
  """Returns the entries in a folder of JSON files.

  Args:
    folder: of the leaderboard.
    check: returns what is wrong with an entry; empty: nothing.

  Raises:
    InputError: if something is wrong with an entry.
  """
  entries = []
  for path in sorted(folder.glob("*.json")):
    entries.append(json.loads(path.read_text()))
    if wrong := check(entries[-1]):
      raise InputError(f"{path}: {wrong}")
  return entries
