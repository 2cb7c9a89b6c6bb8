"""What makes two configurations different runs."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import BlockConfig, Config, MoEConfig
from moe_jax.config.plain import fingerprint, is_same_code, to_plain

# What may change when a run continues: none of it changes what is trained. Another mesh sums in another order. Where it
# would drop other tokens, `moe_jax.training.identity.refusal` says so.
FREE = {
  "train": (
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "max_minutes",
    "ignore_memory_check",
    "tensorboard",
  ),
  "data": ("data_dir", "text_folder"),  # the fingerprint of the text must stay
  "mesh": ("slice", "data", "fsdp", "expert", "tensor"),
}
_LONGEST = 100  # characters of a value in an error


def lasting(config: Config) -> dict[str, Any]:
  """Returns the JSON values of a configuration that may not change when a run continues."""
  return _without_free(config.to_dict())


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns a text for every field of two configurations of JSON values that makes them different runs.

  A missing field has its default. More steps than before on a constant schedule are the same run, longer, unless its
  warm-up was cut to half of the steps and would be longer, too.
  """
  old, new = _without_free(old), _without_free(new)
  before, now = old["train"]["num_steps"], new["train"]["num_steps"]
  if before > now or any(x["optimizer"]["schedule"] != "constant" for x in (old, new)):
    return differences(old, new)
  warmup = new["optimizer"]["warmup_steps"]
  was, is_now = (min(warmup, steps // 2) for steps in (before, now))
  if was == is_now:
    old["train"]["num_steps"] = now
  elif old["optimizer"]["warmup_steps"] == warmup:
    old["train"]["num_steps"] = now
    line = (
      f"warm-up was {was} of {before} steps, now {is_now} of {now}: --warmup_steps={warmup} is cut to half of the steps, and to "
      "be extended a run needs one of at most half of its first --num_steps"
    )
    return [line, *differences(old, new)]
  return differences(old, new)


def _without_free(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a configuration of JSON values without the fields that may change. Missing fields have their defaults."""
  defaults = to_plain(Config(), fingerprint)
  filled = {part: _with_defaults(config.get(part, {}), defaults[part]) for part in defaults}
  for part, names in FREE.items():
    filled[part] = {name: value for name, value in filled[part].items() if name not in names}
  return filled


def _with_defaults(values: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
  filled = dict(defaults)
  for name, value in (values if isinstance(values, Mapping) else {}).items():
    nested = isinstance(value, Mapping) and isinstance(filled.get(name), Mapping)
    filled[name] = _with_defaults(value, filled[name]) if nested else value
  return filled


def differences(old: Any, new: Any, name: str = "") -> list[str]:
  """Returns a text for every leaf of JSON values that differs: its field, its old value and its new value.

  Segments are compared layer by layer, and what differs alike in several layers is said once.
  """
  return list(dict.fromkeys(_differences(old, new, name)))


def _differences(old: Any, new: Any, name: str) -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    keys = [*old, *(key for key in new if key not in old)]
    return [line for key in keys for line in _differences(old.get(key), new.get(key), key)]
  if old == new:
    return []
  if isinstance(old, str) and isinstance(new, str) and old.partition(" [")[0] == new.partition(" [")[0]:
    if is_same_code(old, new):
      return []
    return [f"the code of {name} {old.partition(' [')[0]!r} has changed"]
  if name == "segments" and (layers := _layers(old, new)):
    lines = [line for pair in layers for line in _differences(*pair, "block")]
    if lines or _grouping(old) == _grouping(new):
      return lines
  before, now = repr(old), repr(new)
  first = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), 0)
  return [f"{name} was {_short(before, first)}, now {_short(now, first)}"]


def _layers(old: Any, new: Any) -> list[tuple[Any, Any]]:
  """Returns the blocks of every layer in two lists of segments; none if they have other numbers of layers, or none."""
  defaults = to_plain(BlockConfig(), fingerprint), to_plain(MoEConfig(), fingerprint)

  def blocks(segments: Any) -> list[Any]:
    return [block for s in segments for block in s["pattern"] * s["repeats"]]

  def filled(block: Any) -> Any:  # one of an older version lacks fields
    moe = block.get("moe")
    return _with_defaults(block, defaults[0]) | {"moe": moe and _with_defaults(moe, defaults[1])}

  try:
    return list(zip(map(filled, blocks(old)), map(filled, blocks(new)), strict=True))
  except (TypeError, KeyError, ValueError, AttributeError):
    return []


def _grouping(segments: Any) -> list[tuple[int, int]]:
  return [(len(segment["pattern"]), segment["repeats"]) for segment in segments]


def _short(text: str, first: int) -> str:
  """Returns a text, or of a long one what is around the place at which it begins to differ."""
  if len(text) <= _LONGEST:
    return text
  begin = max(0, min(first - 20, len(text) - _LONGEST))
  end = begin + _LONGEST
  return ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")
