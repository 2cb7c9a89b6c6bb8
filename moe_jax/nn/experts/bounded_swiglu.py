"""The experts of DeepSeek-V4: SwiGLU whose factors are bounded."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.experts.swiglu import SwiGLU
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Bounded:
  """silu(min(gate, limit)) * clip(up, -limit, limit)."""

  limit: float

  def __call__(self, gate: Array, up: Array) -> Array:
    return jax.nn.silu(jnp.minimum(gate, self.limit)) * jnp.clip(up, -self.limit, self.limit)


class BoundedSwiGLU(SwiGLU):
  """`(silu(min(x Wg, limit)) * clip(x Wu, -limit, limit)) Wd` (DeepSeek-V4's released code, `swiglu_limit` 10).

  A bound keeps single hidden units from outliers. Below it, the network is `swiglu`, and above it a factor has no
  gradient. Unlike `clipped_swiglu`, it has neither biases nor a shift of the second factor.

  Raises:
    InputError: if `limit` is not above 0.
  """

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    limit: float = 10.0,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if not limit > 0:
      raise InputError(f"experts bounded_swiglu: limit must be above 0, got {limit}")
    super().__init__(num_experts, dim, expert_dim, init_scale=init_scale, rngs=rngs)
    self.activation = Bounded(limit)
