"""Converts configurations to plain JSON values and back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.config.model import BlockConfig, ModelConfig, MoEConfig, Segment
from moe_jax.errors import InputError
from moe_jax.fingerprint import digest, is_builtin
from moe_jax.registry import Method


def spec_text(spec: Any) -> str:
  """Returns the text of a method, a sequence of methods, or a name."""
  if isinstance(spec, tuple | list):
    return ",".join(spec_text(part) for part in spec)
  if isinstance(spec, str | Method):
    return str(spec)
  return getattr(spec, "__name__", repr(spec))


def fingerprint(spec: Any) -> str:
  """Returns `spec_text`, with a digest of the source for a user's code.

  This is what results depend on.
  """
  if isinstance(spec, tuple | list):
    return ",".join(fingerprint(part) for part in spec)
  if isinstance(spec, Method):
    return spec.fingerprint
  builtin = isinstance(spec, str) or is_builtin(spec)
  return spec_text(spec) if builtin else f"{spec_text(spec)} [{digest(spec)}]"


def to_plain(value: Any, text: Callable[[Any], str] = spec_text) -> Any:
  """Converts a configuration to JSON values. `text` converts methods, by default to their names."""
  if dataclasses.is_dataclass(value) and not isinstance(value, Method | type):
    of_field = lambda f: text if isinstance(f.default, str) else lambda x: to_plain(x, text)
    return {f.name: of_field(f)(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, tuple | list):
    return [to_plain(part, text) for part in value]
  return value


def own_code(config: Any) -> list[str]:
  """Returns the fingerprints of what a configuration has of a user's code, which may change under one name. Sorted."""
  plain = zip(_leaves(to_plain(config)), _leaves(to_plain(config, fingerprint)), strict=True)
  return sorted({code for name, code in plain if name != code})


def is_same_code(then: str, now: str) -> bool:
  """Returns whether a fingerprint of before may be of the code of one of now.

  `Method.source` has a digest of the method, and more of what is inside. Before, there was only the first of them, so that
  where the others are missing, they are not known.
  """
  (old, _, was), (new, _, source) = (text.removesuffix("]").partition(" [") for text in (then, now))
  return old == new and (was == source or source.startswith(f"{was}+"))


def is_other_code(then: Sequence[str], now: Sequence[str]) -> bool:
  """Returns whether two lists of `own_code`, of before and of now, are of other code, see `is_same_code`."""
  name = lambda text: text.partition(" [")[0]
  names = set(map(name, then))
  known = [text for text in now if name(text) in names or not is_same_code(name(text), text)]
  is_there = lambda old: any(is_same_code(old, new) for new in known)
  was_there = lambda new: any(is_same_code(old, new) for old in then)
  return not (all(map(is_there, then)) and all(map(was_there, known)))


def _leaves(value: Any) -> list[Any]:
  if isinstance(value, dict):
    value = list(value.values())
  return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [value]


def from_fields(cls: type, values: dict[str, Any]) -> Any:
  """Returns `cls(**values)`. Raises `InputError` for fields that this version does not have, and for no fields at all."""
  if not isinstance(values, dict):
    raise InputError(f"configuration: {cls.__name__} must be an object with fields, got {str(values)[:60]!r}")
  unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
  if unknown:
    raise InputError(f"configuration: {cls.__name__} has no field {', '.join(unknown)} in this version")
  return cls(**values)


def model_from_plain(values: dict[str, Any]) -> ModelConfig:
  """Returns the model configuration that `to_plain` wrote."""
  nested = {
    "moe": from_fields(MoEConfig, values["moe"]),
    "segments": tuple(_segment(segment) for segment in values.get("segments", ())),
  }
  return from_fields(ModelConfig, values | nested)


def _segment(values: dict[str, Any]) -> Segment:
  moe = lambda block: None if block["moe"] is None else from_fields(MoEConfig, block["moe"])
  blocks = (from_fields(BlockConfig, block | {"moe": moe(block)}) for block in values["pattern"])
  return Segment(tuple(blocks), values["repeats"])
