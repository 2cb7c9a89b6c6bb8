"""Rotary positions of a config.json, as options of a mixer and back."""

import math
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.interop.families.base import Values
from moe_jax.interop.families.fields import layers_of


def read_rope(values: Values, scales_scores: bool) -> dict[str, Any]:
  """Returns the YaRN options of a mixer. Without scaling there are none.

  Args:
    values: of a config.json.
    scales_scores: whether `mscale_all_dim` also scales the scores. In transformers only the MLA of DeepSeek does so;
      elsewhere it only divides cosines and sines.

  Raises:
    InputError: if positions are scaled in another way, or only a part of a head is rotated.
  """
  rope = values.rope
  Values(f"{values.where}: rope", dict(values.values) | rope).must_be("partial_rotary_factor", 1.0)
  if rope["rope_type"] == "default":
    return {}
  if rope["rope_type"] != "yarn":
    raise InputError(
      f"{values.where}: rope_type={rope['rope_type']!r} is not supported here, only 'default' or 'yarn'"
    )
  all_dim = float(rope.get("mscale_all_dim") or 0) if scales_scores else 0.0
  length = rope.get("original_max_position_embeddings") or values("max_position_embeddings")
  return {
    "yarn_factor": float(rope["factor"]),
    "yarn_length": length,
    "yarn_beta_fast": float(rope.get("beta_fast") or 32),
    "yarn_beta_slow": float(rope.get("beta_slow") or 1),
    "yarn_truncate": Values(f"{values.where}: rope", rope).boolean("truncate", True),
    "yarn_mscale": _mscale(values.where, rope, all_dim),
    "yarn_mscale_all_dim": all_dim,
  }


def _mscale(where: str, rope: dict[str, Any], all_dim: float) -> float:
  """The mscale with which m(mscale) / m(all_dim), see `Yarn`, is what transformers multiplies cosines and sines by.

  That is `attention_factor`, or m(mscale) / m(mscale_all_dim) if both are there, or m(1). So with `mscale_all_dim`
  alone only the scores of DeepSeek are scaled by it.
  """
  factor, given = float(rope["factor"]), rope.get("attention_factor")
  magnitude = lambda scale: 0.1 * scale * math.log(factor) + 1
  above, below = 1.0, 0.0
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    above, below = float(rope["mscale"]), float(rope["mscale_all_dim"])
  if given is None and (below == all_dim or factor == 1):
    return above
  if factor == 1:
    raise InputError(f"{where}: rope has attention_factor with factor=1, which is not supported here")
  turned = magnitude(above) / magnitude(below) if given is None else given
  # With twelve digits it is the same after it was written and read again.
  return float(f"{(turned * magnitude(all_dim) - 1) / (0.1 * math.log(factor)):.12g}")


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
