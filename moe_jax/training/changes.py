"""What makes two configurations different runs."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import Config
from moe_jax.config.plain import fingerprint, to_plain

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
  """Returns a text for every leaf of JSON values that differs: its field, its old value and its new value."""
  if isinstance(old, dict) and isinstance(new, dict):
    keys = [*old, *(key for key in new if key not in old)]
    return [line for key in keys for line in differences(old.get(key), new.get(key), key)]
  if old == new:
    return []
  if isinstance(old, str) and isinstance(new, str) and old.partition(" [")[0] == new.partition(" [")[0]:
    return [f"the code of {name} {old.partition(' [')[0]!r} has changed"]
  return [f"{name} was {old!r}, now {new!r}"]
