"""The numbers of a config.json that do not shape the model: V, the ids of special tokens, and positions; all checked."""

import pathlib

from moe_jax.data.model_ids import ModelIds
from moe_jax.errors import InputError
from moe_jax.interop.families import Values
from moe_jax.interop.folder import read_config

_LARGEST = 2**31 - 1
_GENERATION = "generation_config.json"


def read_numbers(folder: pathlib.Path, values: Values) -> ModelIds:
  """Reads them from config.json, and `bos_token_id` and `eos_token_id` from generation_config.json where that has them.

  Raises:
    InputError: if a number is no integer, an id is not in [0, V) and not -1, or V is missing.
  """
  check_integer(values, "vocab_size", 1, _LARGEST)
  size = values("vocab_size")
  bos, eos, pad = (_token_ids(values, f"{name}_token_id", size) for name in ("bos", "eos", "pad"))
  path = folder / _GENERATION
  generation = Values(str(path), read_config(path) if path.exists() else {})
  begin, stop = (_token_ids(generation, f"{name}_token_id", size) for name in ("bos", "eos"))
  check_integer(values, "max_position_embeddings", 0, _LARGEST)
  first = lambda ids: ids[0] if ids else None
  stop_ids = (eos or ()) if stop is None else stop
  return ModelIds(
    size, first(begin or bos), first(pad or eos), stop_ids, values("max_position_embeddings", 0)
  )


def check_integer(values: Values, name: str, least: int, most: int) -> None:
  """Raises `InputError` unless a value, if there is one, is an integer in [least, most]."""
  value = values(name, least)
  if type(value) is not int or not least <= value <= most:
    raise InputError(f"{values.where}: {name}={_short(value)}: must be an integer from {least} to {most}")


def _token_ids(values: Values, name: str, vocab_size: int) -> tuple[int, ...] | None:
  """The id or ids that a value holds. None: it is missing, or -1, which is no id for SentencePiece, too."""
  value = values(name, None)
  if value is None or (type(value) is int and value == -1):
    return None
  ids = value if isinstance(value, list) else [value]
  if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
    right = f"must be an integer from 0 to {vocab_size - 1}, below vocab_size={vocab_size}, or a list of such"
    raise InputError(f"{values.where}: {name}={_short(value)}: {right}")
  return tuple(ids)


def _short(value: object) -> str:
  return repr(value)[:60]
