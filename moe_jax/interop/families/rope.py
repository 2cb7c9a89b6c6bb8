"""Rotary positions of a config.json, as options of a mixer and back."""

import math
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.interop.families.base import Values
from moe_jax.interop.families.fields import layers_of


def read_rope(values: Values) -> dict[str, Any]:
  """Returns the YaRN options of a mixer. Without scaling there are none.

  Raises:
    InputError: if positions are scaled in another way.
  """
  rope = values.rope
  if rope["rope_type"] == "default":
    return {}
  if rope["rope_type"] != "yarn":
    raise InputError(
      f"{values.where}: rope_type={rope['rope_type']!r} is not supported here, only 'default' or 'yarn'"
    )
  factor, all_dim = float(rope["factor"]), float(rope.get("mscale_all_dim") or 0)
  mscale = float(rope["mscale"]) if rope.get("mscale") and all_dim else 1.0  # transformers reads both or none
  if rope.get("attention_factor") is not None:
    if all_dim:
      raise InputError(
        f"{values.where}: rope has attention_factor and mscale_all_dim, of which only one is supported"
      )
    mscale = (rope["attention_factor"] - 1) / (0.1 * math.log(factor))
  length = rope.get("original_max_position_embeddings") or values("max_position_embeddings")
  return {
    "yarn_factor": factor,
    "yarn_length": length,
    "yarn_beta_fast": float(rope.get("beta_fast") or 32),
    "yarn_beta_slow": float(rope.get("beta_slow") or 1),
    "yarn_truncate": rope.get("truncate", True),
    "yarn_mscale": mscale,
    "yarn_mscale_all_dim": all_dim,
  }


def write_rope(options: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `read_rope`, for the options of a resolved mixer."""
  factor = options["yarn_factor"]
  if factor == 1:
    return {}
  scaling = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": factor,
    "original_max_position_embeddings": options["yarn_length"],
    "beta_fast": options["yarn_beta_fast"],
    "beta_slow": options["yarn_beta_slow"],
  }
  if not options["yarn_truncate"]:
    scaling["truncate"] = False
  if options["yarn_mscale_all_dim"]:
    scaling |= {"mscale": options["yarn_mscale"], "mscale_all_dim": options["yarn_mscale_all_dim"]}
  elif options["yarn_mscale"] != 1:
    scaling["attention_factor"] = 0.1 * options["yarn_mscale"] * math.log(factor) + 1
  return {"rope_scaling": scaling}


def yarn_positions(config: ModelConfig) -> int:
  """Returns the positions that YaRN stretches those of pre-training to. 0 if a resolved configuration has none."""
  options = (dict(block.mixer.options) for block in layers_of(config))
  reach = (o["yarn_factor"] * o["yarn_length"] for o in options if o.get("yarn_factor", 1) != 1)
  return round(max(reach, default=0))
