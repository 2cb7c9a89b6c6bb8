"""The leaderboard of attempts at a target: the score of an attempt, and the table of docs/LEADERBOARD.md."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from moe_jax import disk
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.training.compiled import abstract_model, resolve_config
from moe_jax.training.results import count_params

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


def contradiction(entry: Mapping[str, Any]) -> str:
  """Returns what of an entry does not follow from its own numbers and configuration; empty if nothing."""
  for pair in entry["seeds"]:
    for arm in ARMS:
      if wrong := _wrong_in_run(entry, arm, pair[arm]):
        return f"seed {pair['seed']} of the {arm}: {wrong}; run it again"
  stored, expected = entry["score"], score(entry["seeds"])
  if (stored is None) != (expected is None) or any(
    not np.allclose(stored.get(name, np.nan), expected[name], rtol=1e-6, atol=0) for name in expected or ()
  ):
    return "has another score than its seeds say; take the file as it was written"
  bound, active = entry["rules"]["max_active_params"], entry["num_active_params"]
  counted = _active_params(entry["attempt"])
  if active > bound or counted not in (None, active):
    return f"has {counted or active:,} active parameters, and says {active:,}; at most {bound:,} are allowed"
  return ""


def _wrong_in_run(entry: Mapping[str, Any], arm: str, run: Mapping[str, Any]) -> str:
  rules, data, steps = entry["rules"], entry[arm]["data"], entry[arm]["train"]["num_steps"]
  reached = run["bits_per_byte"] <= rules["target_bits_per_byte"] and run["max_vio"] <= rules["max_vio"]
  if reached != run["reached"]:
    return f"says reached={run['reached']}, and its bits per byte and MaxVio do not"
  if not (1 < run["num_steps"] <= steps if reached else run["num_steps"] == steps):
    return f"has {run['num_steps']} of {steps} steps"
  if run["tokens"] != run["num_steps"] * data["batch_size"] * data["sequence_length"]:
    return f"says {run['tokens']} tokens, which are not those of its {run['num_steps']} steps"
  return "" if run["seconds"] > 0 else f"says {run['seconds']} seconds"


def _active_params(attempt: Mapping[str, Any]) -> int | None:
  """Counts the active parameters of a configuration; None where it has a user's code, or the vocabulary is not known."""
  name, _, size = attempt["data"]["tokenizer"].partition(":")
  vocab_size = 264 if name == "bytes" else int(size) if name == "bpe" and size.isdecimal() else 0
  try:
    config = resolve_config(Config.from_dict(attempt))
  except InputError:
    return None
  return count_params(abstract_model(config, -(-vocab_size // 8) * 8))[1] if vocab_size else None


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
    entry = disk.read_object(path)
    if entry is None:
      raise InputError(f"{path}: is no whole JSON object")
    entries.append(entry)
    if wrong := check(entry):
      raise InputError(f"{path}: {wrong}")
  return entries
