"""Causal grouped-query attention (2305.13245) with rotary positions (2104.09864)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.attention import causal_attention


def rotate(x_BLNH: jax.Array, theta: float) -> jax.Array:
  """Rotary positions: the pair (i, i + H/2) at position l turns by l * theta^(-2i/H)."""
  half = x_BLNH.shape[-1] // 2
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_LH = jnp.arange(x_BLNH.shape[1], dtype=jnp.float32)[:, None] * frequency_H[None, :]
  cos = jnp.cos(angle_LH)[None, :, None, :]
  sin = jnp.sin(angle_LH)[None, :, None, :]
  a, b = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLNH.dtype)


class Attention(nnx.Module):
  """Padding sits behind the text, so the causal mask already hides it from every real token."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    d, h, s = config.model_dim, config.head_dim, config.init_scale
    self.theta = config.rope_theta
    self.w_query_DNH = matrix(rngs, (d, config.num_heads, h), ("embed", "heads", "head_dim"), s)
    self.w_key_DNH = matrix(rngs, (d, config.num_kv_heads, h), ("embed", "kv_heads", "head_dim"), s)
    self.w_value_DNH = matrix(rngs, (d, config.num_kv_heads, h), ("embed", "kv_heads", "head_dim"), s)
    self.w_out_NHD = matrix(rngs, (config.num_heads, h, d), ("heads", "head_dim", "embed"), s, num_in=2)
    self.query_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
    self.key_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    dtype = x_BLD.dtype
    project = lambda w: jnp.einsum("BLD,DNH->BLNH", x_BLD, weight(w, dtype))
    query, key = project(self.w_query_DNH), project(self.w_key_DNH)
    if self.query_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rotate(query, self.theta), rotate(key, self.theta)
    mixed_BLNH = causal_attention(query, key, project(self.w_value_DNH))
    return jnp.einsum("BLNH,NHD->BLD", mixed_BLNH, weight(self.w_out_NHD, dtype))
