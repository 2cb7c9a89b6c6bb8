"""Reading the result files of a run folder, and what makes a comparison unfair."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from moe_jax import disk
from moe_jax.errors import InputError
from moe_jax.training import metric_writer
from moe_jax.training.result_file import Result, read_result

# What two runs must share for their difference to have a verdict, and what it is called (docs/fair_comparison.md).
PROTOCOL = {
  "objective": "objective",
  "num_steps": "number of steps",
  "tokens_per_step": "tokens per step",
  "sequence_length": "sequence length",
  "schedule": "optimizer and schedule",
  "dataset": "data set",
  "fingerprint": "data fingerprint",
  "sees_later_tokens": "view of later tokens",
  "active_width": "active width",
  "ffn_work": "feed-forward work",
  "num_layers": "number of layers",
  "model_dim": "width of the model",
  "slots": "expert capacity",
  "inputs": "router input",
  "tail_steps": "tail window",
  "eval_sequences": "sequences of an evaluation",
  "max_vio_range": "range of MaxVio (E/K)",
  "init_from": "content of --init_from",  # of one folder; arms may start from different ones
}
# The quantities that a key of the protocol is about. The other keys are about all.
OF_QUANTITIES = {"max_vio_range": ("max_vio", "max_vio_training")}
# Where one of these differs, so does the key, which then says nothing more: a question that varies one of them varies the key, too.
_FOLLOWS = {"ffn_work": ("active_width", "num_layers", "model_dim")}
# Here null is what a run has found, "could not be measured" or counted, and no run is like one of which it is known.
_MAY_BE_UNKNOWN = ("sees_later_tokens", "ffn_work")
# The report also warns where these differ.
_SHARED = PROTOCOL | {
  "num_params": "number of parameters",
  "num_active_params": "number of active parameters",
  "device": "device",
  "versions": "versions",
}


def load_results(run_dir: str | os.PathLike[str]) -> list[Result]:
  """The results of a run folder's finished arms, in order: arm, then seed.

  Arms come in the order of config.json's "arms" where there is one, so the first stays the baseline; others
  follow by name, "none" before all. A seed folder without a whole result.json is skipped.
  """
  paths = sorted(pathlib.Path(run_dir).glob("arms/*/seed_*/result.json"))
  results = [result for result in map(read_result, paths) if result]
  order = {str(arm): i for i, arm in enumerate(_configured_arms(run_dir))}

  def rank(result: Result) -> tuple[Any, ...]:
    arm = str(result["arm"])
    return order.get(arm, len(order)), arm != "none", arm, result["seed"]

  return sorted(results, key=rank)


def load_metrics(run_dir: str | os.PathLike[str]) -> dict[tuple[str, int], list[dict[str, Any]]]:
  """(arm, seed) -> the lines of the metrics.jsonl beside its result.json, for finished arms."""
  metrics = {}
  for path in sorted(pathlib.Path(run_dir).glob("arms/*/seed_*/result.json")):
    result, lines = read_result(path), path.with_name("metrics.jsonl")
    if result and lines.exists():
      metrics[result["arm"], result["seed"]] = metric_writer.read_jsonl(lines, skip_damaged=True)
  return metrics


def load_config(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
  """config.json of the run folder, or {}."""
  return disk.read_object(pathlib.Path(run_dir) / "config.json") or {}


def group_by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
  """arm -> its results by seed; arms in the order in which they first come."""
  arms: dict[str, list[Result]] = {}
  for result in results:
    arms.setdefault(str(result["arm"]), []).append(result)
  for arm, of_arm in arms.items():
    of_arm.sort(key=lambda r: r["seed"])
    seeds = [r["seed"] for r in of_arm]
    if len(set(seeds)) < len(seeds):
      raise InputError(f"arm {arm} has two results of one seed: {seeds}")
  return arms


def lookup(result: Result, *path: str) -> Any:
  """result[path[0]][path[1]]..., or None where a key is missing."""
  value: Any = result
  for key in path:
    if not isinstance(value, dict) or key not in value:
      return None
    value = value[key]
  return value


def diverged(result: Result) -> str:
  """Returns why a run has no quality: what a comparison wrote of it, or a loss that is not finite; "" if it has one."""
  if "diverged" in result:
    return result["diverged"]
  values = {name: lookup(result, "validation", name) for name in ("nll", "perplexity", "bits_per_byte")}
  wrong = [name for name, x in values.items() if x is not None and not math.isfinite(float(x))]
  return f"validation {wrong[0]} {values[wrong[0]]}" if wrong else ""


def check_varies(varies: Sequence[str]) -> None:
  """Raises `ValueError` if `varies` has a key that is not of `PROTOCOL`."""
  for key in varies:
    if key not in PROTOCOL:
      raise ValueError(f"varies: {key!r} is no key of the protocol; its keys: {', '.join(PROTOCOL)}")


def varying(results: Sequence[Result], varies: Sequence[str]) -> list[str]:
  """Returns those of `varies` in which results differ, or which none records: what a report may say that they vary.

  Raises:
    ValueError: if one is no key of `PROTOCOL`.
  """
  check_varies(varies)
  compared = [_compared(result) for result in results]
  values = {key: [r[key] for r in compared if r.get(key) is not None] for key in varies}
  return [key for key, of_key in values.items() if not of_key or _differ(key, of_key)]


def broken_protocol(one: Result, other: Result, quantity: str, varies: Sequence[str] = ()) -> str:
  """Returns what two results do not share and should, in words; empty if they can be compared in the quantity.

  Keys in `varies` may differ, and what a sweep chose. A key that one of the two does not record is no contradiction.
  """
  return ", ".join(PROTOCOL[key] for key in _differing([one, other], quantity) if key not in varies)


def uneven_protocol(results: Sequence[Result], quantity: str) -> str:
  """Returns what the results of one arm do not share and should, in words; empty if they are seeds of one setting.

  An arm is one setting, also where a question varies keys between arms.
  """
  return ", ".join(PROTOCOL[key] for key in _differing(results, quantity))


def _differing(results: Sequence[Result], quantity: str) -> list[str]:
  """Returns the keys of the protocol, of those about a quantity, in which results differ that record them."""
  compared = [_compared(result) for result in results]
  asked = [key for key in PROTOCOL if quantity in OF_QUANTITIES.get(key, (quantity,))]
  return _causes([key for key in asked if _known_differs(key, compared)])


def _known_differs(key: str, compared: Sequence[Result]) -> bool:
  known = [r for r in compared if key in r and (r[key] is not None or key in _MAY_BE_UNKNOWN)]
  return _differ(key, [r[key] for r in known])


def _causes(keys: Sequence[str]) -> list[str]:
  """Returns the keys without those that differ because another of them does."""
  return [key for key in keys if not {*_FOLLOWS.get(key, ())} & {*keys}]


def _differ(key: str, values: Sequence[Any]) -> bool:
  """Returns whether values of a key contradict each other: for starts, one folder with several digests."""
  if key == "init_from":  # older code wrote no digest
    starts = {(start.get("folder"), start["digest"]) for start in values if start and start.get("digest")}
    return len(starts) > len({folder for folder, _ in starts})
  return any(value != values[0] for value in values)


def starts_of(results: Iterable[Result]) -> dict[str, str]:
  """Returns the digest of the parameters that each folder of `init_from` had when a run started from it, the first one of several."""
  starts = [result.get("init_from") or {} for result in results]
  return {start["folder"]: start["digest"] for start in reversed(starts) if start.get("digest")}


def _compared(result: Result) -> Result:
  """Returns a result with the protocol by which it is compared.

  That of a sweep's arm has the first values that were tried in place of the chosen ones, where a value changes the
  protocol. So arms may differ in what the sweep changed, and in nothing else. What bounds a quantity stays as it is:
  nothing is said of different ranges.
  """
  tail = lookup(result, "training", "tail_steps")
  own = result if tail is None else result | {"tail_steps": tail}
  return own | (lookup(result, "swept", "protocol") or {})


def warnings(
  run_dir: str | os.PathLike[str], results: Sequence[Result], varies: Sequence[str] = ()
) -> list[str]:
  """One sentence per reason why these results may not be comparable; empty if none is found.

  Keys of `PROTOCOL` in `varies` may differ.
  """
  found, compared = [], [_compared(result) for result in results]
  # Results without the key are of an experiment that does not record it, which is no contradiction.
  values = {key: [r[key] for r in compared if key in r] for key in _SHARED}
  causes = _causes([key for key in PROTOCOL if _known_differs(key, compared)])
  for key in _SHARED:
    if _differ(key, values[key]) and (key in causes or key not in _FOLLOWS) and key not in varies:
      each = sorted({json.dumps(value, sort_keys=True) for value in values[key]})
      found.append(f"The {_SHARED[key]} differs between results: {', '.join(each)}.")
  seeds = {arm: tuple(r["seed"] for r in of_arm) for arm, of_arm in group_by_arm(results).items()}
  if len(set(seeds.values())) > 1:
    each = "; ".join(f"{arm}: {', '.join(map(str, s))}" for arm, s in seeds.items())
    found.append(f"The arms have different seeds ({each}). Paired differences use the shared seeds only.")
  absent = [str(arm) for arm in _configured_arms(run_dir) if str(arm) not in seeds]
  if absent:
    found.append(f"Arms of this folder that are not in this report: {', '.join(absent)}.")
  run_dir = pathlib.Path(run_dir)
  torn = [p for p in sorted(run_dir.glob("arms/*/seed_*")) if not read_result(p / "result.json")]
  if torn:
    found.append(
      f"Unfinished or damaged, left out: {', '.join(p.relative_to(run_dir / 'arms').as_posix() for p in torn)}."
    )
  return found


def _configured_arms(run_dir: str | os.PathLike[str]) -> list[Any]:
  arms = load_config(run_dir).get("arms")
  if isinstance(arms, str):
    # Flags keep their text. Commas also join the balancers of one arm, so only a real list tells the arms.
    return []
  return list(arms) if isinstance(arms, (list, tuple, dict)) else []
