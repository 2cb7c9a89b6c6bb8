"""Families of published models, one file each. `FAMILIES` has all of them by the `model_type` of their config.json."""

from moe_jax.interop.families.base import Family, Values
from moe_jax.interop.families.mixtral import MIXTRAL
from moe_jax.interop.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL, QWEN3_MOE)}

__all__ = ["FAMILIES", "Family", "Values"]
