"""Token mixers. `MIXERS` has all of them by name.

A mixer is a module that maps (x_BLD, context) to (y_BLD, aux), where aux is a tree of sums and of `Maximum`s, or
None. Its parameters are made by `moe_jax.matrix` and `moe_jax.vector`, and what it changes in its forward pass is lost:
state belongs to a hook. One that can generate also has a cache, a tree of arrays with a leading B:

  init_cache(batch_size, length, dtype) -> cache       for sequences of up to `length` columns
  extend(x_BLD, context, cache) -> (y_BLD, cache)      for tokens behind those of the cache (`context.past`)

One whose attention scores can be limited (`moe_jax.training.hooks.QKClip`) returns a `MixerAux` where
`context.record_scores` is set, and has a method `scale_scores(factor_N)` and an attribute `scores_scale`: whether it
can.
"""

from moe_jax.nn.mixers.attention import Attention
from moe_jax.nn.mixers.lightning import Lightning
from moe_jax.nn.mixers.low_rank import LowRankMixer
from moe_jax.nn.mixers.mla import MLA
from moe_jax.registry import Registry

MIXERS = Registry(
  "mixer",
  {"attention": Attention, "mla": MLA, "lightning": Lightning, "low_rank": LowRankMixer},
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
    "num_layers",
    "rngs",
  ),
  wraps="mixer",
)

__all__ = ["MIXERS"]
