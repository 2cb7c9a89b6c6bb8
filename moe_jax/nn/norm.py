"""RMSNorm (1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis, computed in float32 and returned in the dtype of x."""

  def __init__(self, dim: int, eps: float):
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones(dim, jnp.float32), logical_axes=("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (normed * self.scale_D[...].reshape(shape)).astype(x.dtype)
