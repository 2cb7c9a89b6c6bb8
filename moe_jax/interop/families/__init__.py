"""Families of published models, one file each. `FAMILIES` has all of them by the `model_type` of their config.json."""

from moe_jax.interop.families.base import Family, Values
from moe_jax.interop.families.deepseek import DEEPSEEK_MOE_16B, DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from moe_jax.interop.families.gpt_oss import GPT_OSS
from moe_jax.interop.families.minimax import MINIMAX
from moe_jax.interop.families.mixtral import MIXTRAL
from moe_jax.interop.families.olmoe import OLMOE
from moe_jax.interop.families.qwen2_moe import QWEN2_MOE
from moe_jax.interop.families.qwen3_moe import QWEN3_MOE

# A model is saved as the first family that computes the same.
_ALL = (
  MIXTRAL,
  QWEN3_MOE,
  QWEN2_MOE,
  OLMOE,
  DEEPSEEK_MOE_16B,
  DEEPSEEK_V2,
  DEEPSEEK_V3,
  KIMI_K2,
  GPT_OSS,
  MINIMAX,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = ["FAMILIES", "Family", "Values"]
