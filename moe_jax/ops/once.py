"""Pure functions that are made once, so that what holds them is equal."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from moe_jax.registry import Method


def made_once(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
  """Returns `make(*args, **options)`: for equal arguments the same object, unless they cannot be hashed.

  It is for parts that are pure functions. Models of one configuration are then equal to `jax.jit`, which compiles
  one program for all of them. What a user's code makes is made anew each time, because it may read what has changed.
  """
  if not _is_ours(make):
    return make(*args, **options)
  try:
    return _made_once(make, args, tuple(options.items()))
  except TypeError as error:
    if "unhashable" not in str(error):
      raise
    return make(*args, **options)


def _is_ours(make: Callable[..., Any]) -> bool:
  if isinstance(make, Method):
    return not make.source
  return (getattr(make, "__module__", None) or "").partition(".")[0] == __name__.partition(".")[0]


@functools.lru_cache(maxsize=256)
def _made_once(make: Callable[..., Any], args: tuple, options: tuple[tuple[str, Any], ...]) -> Any:
  # An array that a function holds must outlive the program that asks first.
  with jax.ensure_compile_time_eval():
    return make(*args, **dict(options))
