"""Flax NNX modules.

They own parameters, name their logical axes, and call the pure functions of `moe_jax.ops`.
"""

from moe_jax.nn.context import Context
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import BalancerState

__all__ = ["BalancerState", "Context", "MoE", "Transformer"]
