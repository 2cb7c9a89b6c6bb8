"""The result.json of a run: written with a digest of itself, and taken for damaged where digest or types are wrong."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax import disk

Result = dict[str, Any]
RESULT_FILE = "result.json"
_NON_FINITE = ("NaN", "Infinity", "-Infinity")  # JSON has no literal for them
_MAX_COUNT = 2**63


def write_result(path: str | os.PathLike[str], result: Result) -> None:
  """Writes a result and its digest in one rename."""
  disk.write_json(path, disk.with_digest(result))


def read_result(path: str | os.PathLike[str]) -> Result:
  """Returns the result in a file, without its digest; {} if the file is absent or damaged."""
  result = disk.read_object(path)
  return {k: v for k, v in result.items() if k != disk.DIGEST} if result and is_result(result) else {}


def steps_asked(result: Mapping[str, Any]) -> int | None:
  """Returns the `num_steps` that the run of a result was asked for; None if it does not say.

  The run has fewer if its `stop` ended it.
  """
  train = result.get("config", {}).get("train")
  steps = train.get("num_steps") if isinstance(train, Mapping) else None
  return steps if type(steps) is int else None


def is_result(value: Mapping[str, Any]) -> bool:
  """Returns whether a JSON object is the result of a run, as it was written.

  One without a digest, of an earlier version or another program, is a result if its types are right.
  """
  return disk.has_its_digest(value) and all(
    check(value[name]) if name in value else name not in _NEEDED for name, check in _CHECKS.items()
  )


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
  """Whether `value` is a number, or the text that stands for one that is not finite."""
  if isinstance(value, str):
    return value in _NON_FINITE
  return isinstance(value, float) or (type(value) is int and abs(value) < _MAX_COUNT)


def _is_number_or_none(value: Any) -> bool:
  return value is None or _is_number(value)


def _shape(value: Any) -> tuple[int, ...] | None:
  """Returns the shape of nested lists of numbers; None if they are ragged or hold something else."""
  if not isinstance(value, list):
    return () if _is_number_or_none(value) else None
  shapes = {_shape(x) for x in value} or {()}
  inner = shapes.pop()
  return None if shapes or inner is None else (len(value), *inner)


def _is_numbers(value: Any) -> bool:
  """Whether `value` has arrays of numbers by name. A yes or no may be among them."""
  return isinstance(value, dict) and all(
    _shape(x) is not None for x in value.values() if not isinstance(x, bool)
  )


def _is_validation(value: Any) -> bool:
  if not _is_numbers(value) or not _is_number(value.get("nll")):
    return False
  dims = {"max_vio": 1, "mutual_information": 1, "load": 2, "load_by_domain": 3}
  return all(len(_shape(value[name])) == n for name, n in dims.items() if name in value)


def _is_column(value: Any) -> bool:
  if not isinstance(value, dict):
    return False
  if not all(_is_text(value.get(name)) for name in ("key", "title", "unit", "format", "part", "name")):
    return False
  try:
    format(1.0, value["format"])
  except ValueError:
    return False
  flags = [value.get("lower_is_better"), value.get("judged", True), value.get("of_experts", True)]
  return flags[0] in (True, False, None) and all(isinstance(flag, bool) for flag in flags[1:])


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, list) and all(map(check, value))


def _dict_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_NEEDED = ("arm", "seed", "validation")
_CHECKS: dict[str, Callable[[Any], bool]] = {
  **dict.fromkeys(("arm", "fingerprint", "dataset", "objective", "device", "diverged"), _is_text),
  **dict.fromkeys(
    ("seed", "num_steps", "metric_lines", "tokens_per_step", "num_params", "num_active_params"), _is_count
  ),
  **dict.fromkeys(
    ("entropy_rate", "validation_floor", "bytes_per_token", "padded_fraction"), _is_number_or_none
  ),
  "config": lambda value: isinstance(value, dict),
  "validation": _is_validation,
  "training": _is_numbers,
  "model": _is_numbers,
  "evaluations": _dict_of(_is_numbers),
  "yardsticks": _dict_of(_is_number),
  "versions": _dict_of(_is_text),
  "init_from": _dict_of(_is_text),
  "domains": _list_of(_is_text),
  "columns": _list_of(_is_column),
}
