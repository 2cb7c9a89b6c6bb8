"""Token mixers. `MIXERS` has all of them by name.

A mixer is a module that maps (x_BLD, context) to (y_BLD, aux), where aux is a tree of sums or None.
"""

from moe_jax.nn.mixers.attention import Attention
from moe_jax.registry import Registry

MIXERS = Registry(
  "mixer",
  {"attention": Attention},
  offered=(
    "dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    "qk_norm",
    "norm_eps",
    "causal",
    "init_scale",
    "rngs",
  ),
)

__all__ = ["MIXERS"]
