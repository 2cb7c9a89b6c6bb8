"""Helpers of the configuration classes: fields that are flags, and checks whose errors name the flag."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import InputError


def flag(default: Any, help: str) -> Any:
  """Returns a dataclass field that is also a flag, with the flag's help text."""
  return dataclasses.field(default=default, metadata={"help": help})


def require(ok: bool, field: str, value: Any, right: str) -> None:
  """Raises `InputError` unless `ok`. `right` says what the value should be."""
  if not ok:
    raise InputError(f"--{field}={value}: {right}")


_TYPES = {  # of a default -> (what the value may be, in words)
  bool: (bool, "true or false"),
  int: (numbers.Integral, "an integer"),
  float: (numbers.Real, "a number"),
}


def representable(part: Any, any_size: Sequence[str] = ()) -> None:
  """Raises `InputError` unless every value has the type of its default, numbers are finite, integers fit into 32 bits.

  Args:
    part: of a configuration.
    any_size: names of integers that need not fit.
  """
  for field in dataclasses.fields(part):
    value = getattr(part, field.name)
    _check_type(field, value)
    if isinstance(value, float):
      require(math.isfinite(value), field.name, value, "must be a finite number")
    elif isinstance(value, int) and field.name not in any_size:
      require(abs(value) < 1 << 31, field.name, _short(value), "must be below 2^31")


def _check_type(field: dataclasses.Field, value: Any) -> None:
  """A config.json, or a call, may hold anything."""
  kind = type(field.default)
  if kind in _TYPES:
    allowed, words = _TYPES[kind]
    is_bool = isinstance(value, bool)
    require(
      isinstance(value, allowed) and is_bool == (kind is bool),
      field.name,
      _short(repr(value)),
      f"must be {words}",
    )
  elif kind is str:  # a text, or a part: a method, a function, or several of them
    wrong = value is None or isinstance(value, numbers.Number | dict)
    parts = value if isinstance(value, list | tuple) else ()
    wrong = wrong or any(part is None or isinstance(part, numbers.Number | dict | list) for part in parts)
    require(not wrong, field.name, _short(repr(value)), "must be a text or a part")


def _short(value: int | str) -> str:
  text = str(value)
  return text if len(text) < 40 else f"{text[:20]}... ({len(text)} characters)"


def positive(part: Any, *names: str) -> None:
  """Raises `InputError` unless each of these fields is 1 or more."""
  for name in names:
    require(getattr(part, name) >= 1, name, getattr(part, name), "must be positive")


def one_of(part: Any, name: str, *choices: str) -> None:
  """Raises `InputError` unless the field has one of `choices`."""
  right = f"{', '.join(choices[:-1])} or {choices[-1]}"
  require(getattr(part, name) in choices, name, getattr(part, name), right)
