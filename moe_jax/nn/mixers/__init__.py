"""Token mixers. `MIXERS` has all by name.

A mixer is a module `mixer(x_BLD, context) -> (y_BLD, aux)`, where aux is a tree of sums that it knows, or None.
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
