"""What the configuration classes share: fields that are flags, and checks that name them."""

import dataclasses
from typing import Any

from moe_jax.errors import InputError


def flag(default: Any, help: str) -> Any:
  """A field that is a flag, with the flag's help."""
  return dataclasses.field(default=default, metadata={"help": help})


def require(ok: bool, field: str, value: Any, right: str) -> None:
  if not ok:
    raise InputError(f"--{field}={value}: {right}")


def positive(part: Any, *names: str) -> None:
  for name in names:
    require(getattr(part, name) >= 1, name, getattr(part, name), "must be positive")


def one_of(part: Any, name: str, *choices: str) -> None:
  right = f"{', '.join(choices[:-1])} or {choices[-1]}"
  require(getattr(part, name) in choices, name, getattr(part, name), right)
