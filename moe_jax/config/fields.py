"""Helpers of the configuration classes: fields that are flags, and checks whose errors name the flag."""

import dataclasses
import math
from typing import Any

from moe_jax.errors import InputError


def flag(default: Any, help: str) -> Any:
  """Returns a dataclass field that is also a flag, with the flag's help text."""
  return dataclasses.field(default=default, metadata={"help": help})


def require(ok: bool, field: str, value: Any, right: str) -> None:
  """Raises `InputError` unless `ok`. `right` says what the value should be."""
  if not ok:
    raise InputError(f"--{field}={value}: {right}")


def representable(part: Any) -> None:
  """Raises `InputError` unless every number of the dataclass is finite, and every integer fits into 32 bits."""
  for field in dataclasses.fields(part):
    value = getattr(part, field.name)
    if isinstance(value, float):
      require(math.isfinite(value), field.name, value, "must be a finite number")
    elif isinstance(value, int):
      require(abs(value) < 1 << 31, field.name, _short(value), "must be below 2^31")


def _short(value: int) -> str:
  text = str(value)
  return text if len(text) < 40 else f"{text[:20]}... ({len(text)} digits)"


def positive(part: Any, *names: str) -> None:
  """Raises `InputError` unless each of these fields is 1 or more."""
  for name in names:
    require(getattr(part, name) >= 1, name, getattr(part, name), "must be positive")


def one_of(part: Any, name: str, *choices: str) -> None:
  """Raises `InputError` unless the field has one of `choices`."""
  right = f"{', '.join(choices[:-1])} or {choices[-1]}"
  require(getattr(part, name) in choices, name, getattr(part, name), right)
