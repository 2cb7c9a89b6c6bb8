"""Grouped-query attention (2305.13245) with rotary positions (2104.09864)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.attention import attend


def rotate(x_BLNH: jax.Array, theta: float) -> jax.Array:
  """Rotary positions (2104.09864): turns the pair (i, i + H/2) at position l by l * theta^(-2i/H) radians."""
  half = x_BLNH.shape[-1] // 2
  frequency_X = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_LX = jnp.arange(x_BLNH.shape[1], dtype=jnp.float32)[:, None] * frequency_X[None, :]
  cos = jnp.cos(angle_LX)[None, :, None, :]
  sin = jnp.sin(angle_LX)[None, :, None, :]
  a, b = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLNH.dtype)


class Attention(nnx.Module):
  """Grouped-query softmax attention: `y_BLD, None = attention(x_BLD, context)`.

  Padding follows the text, so the causal mask already hides it from real tokens. Without a causal mask,
  padding is masked explicitly.

  Args:
    dim: D.
    num_heads: N, the heads of queries.
    num_kv_heads: the heads of keys and values. It divides `num_heads`.
    head_dim: H.
    rope_theta: the base of the rotary positions.
    qk_norm: whether to normalise queries and keys over H, each with a scale of its own (Qwen3, 2505.09388).
    norm_eps: added to the mean square in that norm.
    causal: whether a position attends only to itself and earlier positions, or to all.
    window: attend only to the last `window` positions, including the position itself; 0: no limit. Without
      `causal`, to as many on either side.
    init_scale: s in std = sqrt(s / fan_in) of every matrix.
    rngs: draws the parameters.

  Raises:
    InputError: if `window` is negative.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    rope_theta: float = 10_000.0,
    qk_norm: bool = False,
    norm_eps: float = 1e-6,
    causal: bool = True,
    window: int = 0,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if window < 0:
      raise InputError(f"mixer attention: window must be 0 (no limit) or more positions, got {window}")
    d, h, s = dim, head_dim, init_scale
    self.theta, self.causal, self.window = rope_theta, causal, window
    self.w_query_DNH = matrix(rngs, (d, num_heads, h), ("embed", "heads", "head_dim"), s)
    self.w_key_DNH = matrix(rngs, (d, num_kv_heads, h), ("embed", "kv_heads", "head_dim"), s)
    self.w_value_DNH = matrix(rngs, (d, num_kv_heads, h), ("embed", "kv_heads", "head_dim"), s)
    self.w_out_NHD = matrix(rngs, (num_heads, h, d), ("heads", "head_dim", "embed"), s, num_in=2)
    self.query_norm = RMSNorm(h, norm_eps) if qk_norm else None
    self.key_norm = RMSNorm(h, norm_eps) if qk_norm else None

  def __call__(self, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, None]:
    dtype = x_BLD.dtype
    project = lambda w: jnp.einsum("BLD,DNH->BLNH", x_BLD, weight(w, dtype))
    query, key = project(self.w_query_DNH), project(self.w_key_DNH)
    if self.query_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rotate(query, self.theta), rotate(key, self.theta)
    mask_BL = None if self.causal else context.mask_of(x_BLD)
    mixed_BLNH = attend(
      query,
      key,
      project(self.w_value_DNH),
      causal=self.causal,
      window=self.window,
      mask_BL=mask_BL,
    )
    return jnp.einsum("BLNH,NHD->BLD", mixed_BLNH, weight(self.w_out_NHD, dtype)), None
