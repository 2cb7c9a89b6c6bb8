"""Low-rank adapters on a frozen mixer (LoRA, 2106.09685)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.context import Context
from moe_jax.nn.low_rank import Adapters
from moe_jax.registry import Spec, as_inner, inner_spec
from moe_jax.types import Array, PyTree


class LowRankMixer(nnx.Module):
  """The mixer `mixer`, frozen, with a trained addition to each of its matrices: see `Adapters`.

  Args:
    rank, alpha: the addition is alpha / rank * A B, with A [.., rank].
    mixer: a name with options behind `;`, e.g. attention;window=128.
    dim: D; this and all others are for the mixer.

  Raises:
    InputError: if `rank` is less than 1, or the mixer has no matrices of its own.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    mixer: Spec = "attention",
    rope_theta: float = 10_000.0,
    qk_norm: bool = False,
    norm_eps: float = 1e-6,
    causal: bool = True,
    init_scale: float = 1.0,
    num_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    from moe_jax.nn.mixers import MIXERS  # which has this module's users

    offered: dict[str, Any] = {
      "dim": dim,
      "num_heads": num_heads,
      "num_kv_heads": num_kv_heads,
      "head_dim": head_dim,
    }
    offered |= {"rope_theta": rope_theta, "qk_norm": qk_norm, "norm_eps": norm_eps, "causal": causal}
    offered |= {"init_scale": init_scale, "num_layers": num_layers, "rngs": rngs}
    self.mixer = MIXERS.resolve(inner_spec(mixer))(**offered)
    self.adapters = Adapters(self.mixer, rank, alpha, f"mixer low_rank:mixer={as_inner(mixer)}", rngs=rngs)

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, PyTree]:
    return self.adapters.apply(self.mixer, lambda mixer: mixer(x_BLD, context))

  def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> PyTree:
    """Returns the cache of the mixer."""
    return self.mixer.init_cache(batch_size, length, dtype)

  def extend(self, x_BLD: Array, context: Context, cache: PyTree) -> tuple[Array, PyTree]:
    """Returns (y_BLD, cache), see `moe_jax.nn.mixers`."""
    return self.adapters.apply(self.mixer, lambda mixer: mixer.extend(x_BLD, context, cache))
