"""Grouped-query attention (2305.13245) with rotary positions (2104.09864), and what models add to it."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError, require_option
from moe_jax.nn.context import Context
from moe_jax.nn.mixers.positions import make_yarn, sequence_positions
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.variables import matrix, plus, vector, weight
from moe_jax.ops.attention import attend_cached
from moe_jax.ops.cache import append, ring_append, ring_columns
from moe_jax.ops.largest_scores import largest_scores
from moe_jax.ops.rotary import Rotary
from moe_jax.sharding import constrain
from moe_jax.sharding.attention import attend
from moe_jax.types import Array, Maximum, MixerAux

_CACHED = ("batch", None, "kv_heads", None)


class Attention(nnx.Module):
  """Grouped-query softmax attention: `y_BLD, aux = attention(x_BLD, context)`.

  Padding follows the text, so the causal mask already hides it from real tokens. Without a causal mask,
  padding is masked explicitly.

  Args:
    dim: D.
    num_heads: N, the heads of queries.
    num_kv_heads: the heads of keys and values. It divides `num_heads`.
    head_dim: H.
    rope_theta: the base of the rotary positions.
    qk_norm: whether to normalise queries and keys, each with a scale of its own.
    qk_norm_over: what that norm is over: "head", each over H (Qwen3, 2505.09388), or "projection", over all
      heads together (OLMoE, 2409.02060).
    norm_eps: added to the mean square in that norm.
    causal: whether a position attends only to itself and earlier positions, or to all.
    window: attend only to the last `window` positions, including the position itself; 0: no limit. Without
      `causal`, to as many on either side.
    qkv_bias: whether queries, keys and values have biases (Qwen1.5, gpt-oss).
    out_bias: whether the output has one (gpt-oss).
    clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv], behind the norm (OLMoE); 0: not.
    sinks: whether each head has a learned score that takes part in its softmax (gpt-oss, 2508.10925).
    rotary_fraction: the first part of a head that is rotated (MiniMax-01, 2501.08313: 0.5); 0: no positions.
    yarn_factor: stretches positions, see `moe_jax.ops.rotary.Yarn`, also for the other yarn options; 1: not.
    kernel: "auto": for bfloat16, and not behind a cache, cuDNN's kernel on a GPU (causal, without sinks) and splash
      attention on a TPU; otherwise, and with "blocks", blocks of queries by XLA. See `moe_jax.sharding.attention`.
    init_scale: s in std = sqrt(s / fan_in) of every matrix.
    rngs: draws the parameters.

  Raises:
    InputError: if an option is out of range.
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
    qk_norm_over: str = "head",
    qkv_bias: bool = False,
    out_bias: bool = False,
    clip_qkv: float = 0.0,
    sinks: bool = False,
    rotary_fraction: float = 1.0,
    yarn_factor: float = 1.0,
    yarn_length: int = 4096,
    yarn_beta_fast: float = 32.0,
    yarn_beta_slow: float = 1.0,
    yarn_truncate: bool = True,
    yarn_mscale: float = 1.0,
    yarn_mscale_all_dim: float = 0.0,
    kernel: str = "auto",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    _check(window, clip_qkv, rotary_fraction, head_dim)
    require_option("mixer attention", "qk_norm_over", qk_norm_over, ("head", "projection"))
    require_option("mixer attention", "kernel", kernel, ("auto", "blocks"))
    d, n, n_kv, h, s = dim, num_heads, num_kv_heads, head_dim, init_scale
    yarn = make_yarn(
      "attention", yarn_factor, yarn_length, yarn_beta_fast, yarn_beta_slow, yarn_truncate, yarn_mscale,
      yarn_mscale_all_dim,
    )  # fmt: skip
    self.rotary = Rotary(round(head_dim * rotary_fraction), rope_theta, yarn=yarn)
    self.scale = h**-0.5 * self.rotary.score_scale
    self.causal, self.window, self.clip_qkv, self.kernel = causal, window, clip_qkv, kernel
    self.num_kv_heads, self.head_dim, self.norm_projection = n_kv, h, qk_norm_over == "projection"
    self.w_query_DNH = matrix(rngs, (d, n, h), ("embed", "heads", "head_dim"), s)
    self.w_key_DNH = matrix(rngs, (d, n_kv, h), ("embed", "kv_heads", "head_dim"), s)
    self.w_value_DNH = matrix(rngs, (d, n_kv, h), ("embed", "kv_heads", "head_dim"), s)
    self.w_out_NHD = matrix(rngs, (n, h, d), ("heads", "head_dim", "embed"), s, num_in=2)
    bias = lambda heads, axis: vector(jnp.zeros((heads, h)), (axis, "head_dim")) if qkv_bias else None
    self.b_query_NH = bias(n, "heads")
    self.b_key_NH, self.b_value_NH = bias(n_kv, "kv_heads"), bias(n_kv, "kv_heads")
    self.b_out_D = vector(jnp.zeros(d), ("embed",)) if out_bias else None
    self.sink_N = vector(jnp.zeros(n), ("heads",)) if sinks else None
    norm = lambda heads: RMSNorm(heads * h if self.norm_projection else h, norm_eps) if qk_norm else None
    self.query_norm, self.key_norm = norm(n), norm(n_kv)

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, MixerAux | None]:
    query, key, value = self._projected(x_BLD, sequence_positions(x_BLD, context))
    mask_BL = None if self.causal else context.mask_of(x_BLD)
    packed = {"segment_BL": context.segment_BL}
    form = {"causal": self.causal, "mask_BL": mask_BL, "kernel": self.kernel, **packed}
    mixed = attend(query, key, value, **form, **self._scores())
    if not context.record_scores:
      return self._out(mixed), None
    where = {"causal": self.causal, "window": self.window, "scale": self.scale, **packed}
    largest_N = largest_scores(query, key, context.mask_of(x_BLD), **where)
    return self._out(mixed), MixerAux(Maximum(largest_N))

  @property
  def scores_scale(self) -> bool:
    """Whether scores scale with the matrices of queries and keys."""
    return self.query_norm is None and not self.clip_qkv

  def scale_scores(self, factor_N: Array) -> None:
    """Changes the parameters so that all scores of each query head are multiplied by a factor, above 0.

    Queries and keys each get its square root. A key head with several query heads gets that of the smallest of their
    factors, and each of these query heads what is missing.

    Args:
      factor_N: of each head; for stacked parameters, with their leading axes.
    """
    per_key = factor_N.reshape(*factor_N.shape[:-1], self.num_kv_heads, -1)
    of_key = jnp.sqrt(per_key.min(axis=-1))
    of_query = (per_key / of_key[..., None]).reshape(factor_N.shape)
    for w, b, factor in (
      (self.w_query_DNH, self.b_query_NH, of_query),
      (self.w_key_DNH, self.b_key_NH, of_key),
    ):
      w.set_value(w[...] * factor[..., None, :, None])
      if b is not None:
        b.set_value(b[...] * factor[..., None])

  def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns empty keys and values. With a window there are only as many columns.

    Raises:
      InputError: if the attention is not causal.
    """
    if not self.causal:
      raise InputError("mixer attention: sees later positions, so there is nothing to keep in a cache")
    columns = min(length, self.window) if self.window else length
    empty = jnp.zeros((batch_size, columns, self.num_kv_heads, self.head_dim), dtype)
    return (constrain(empty, _CACHED),) * 2

  def extend(
    self, x_BLD: Array, context: Context, cache: tuple[Array, Array]
  ) -> tuple[Array, tuple[Array, Array]]:
    """Returns (y_BLD, cache) for tokens behind those of the cache, see `moe_jax.nn.mixers`."""
    past, length = context.past, x_BLD.shape[1]
    query, *new = self._projected(x_BLD, past.positions(length))
    size, columns = cache[0].shape[1], past.columns(length)
    add = ring_append if self.window else append
    extended = tuple(constrain(add(kept, x, past.start), _CACHED) for kept, x in zip(cache, new, strict=True))
    if past.fresh:
      mixed = attend(query, *new, pad_B=past.pad_B, kernel=self.kernel, **self._scores())
    else:
      if self.window:  # the new tokens may overwrite what the first of them still sees
        seen = [jnp.concatenate([kept, x.astype(kept.dtype)], axis=1) for kept, x in zip(cache, new)]
        column_X = jnp.concatenate([ring_columns(size, past.start), columns])
      else:
        seen, column_X = extended, jnp.arange(size, dtype=jnp.int32)
      where = {"column_L": columns, "column_X": column_X, "pad_B": past.pad_B}
      mixed = attend_cached(query, *seen, **where, **self._scores())
    return self._out(mixed), extended

  def _scores(self) -> dict:
    sink_N = None if self.sink_N is None else self.sink_N[...]
    return {"window": self.window, "scale": self.scale, "sink_N": sink_N}

  def _projected(self, x_BLD: Array, position_XL: Array) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values, rotated."""
    dtype = x_BLD.dtype

    def project(w, b, norm=None):
      y_BLNH = jnp.einsum("BLD,DNH->BLNH", x_BLD, weight(w, dtype))
      if b is not None:
        y_BLNH = plus(y_BLNH, weight(b))
      if norm is not None:
        flat = y_BLNH.reshape(*y_BLNH.shape[:2], -1) if self.norm_projection else y_BLNH
        y_BLNH = norm(flat).reshape(y_BLNH.shape)
      return jnp.clip(y_BLNH, -self.clip_qkv, self.clip_qkv) if self.clip_qkv else y_BLNH

    query = project(self.w_query_DNH, self.b_query_NH, self.query_norm)
    key = project(self.w_key_DNH, self.b_key_NH, self.key_norm)
    value = project(self.w_value_DNH, self.b_value_NH)
    return self.rotary(query, position_XL), self.rotary(key, position_XL), value

  def _out(self, mixed_BLNH: Array) -> Array:
    dtype = mixed_BLNH.dtype
    y_BLD = jnp.einsum("BLNH,NHD->BLD", mixed_BLNH, weight(self.w_out_NHD, dtype))
    return y_BLD if self.b_out_D is None else plus(y_BLD, weight(self.b_out_D))


def _check(window: int, clip_qkv: float, rotary_fraction: float, head_dim: int) -> None:
  if window < 0:
    raise InputError(f"mixer attention: window must be 0 (no limit) or more positions, got {window}")
  if clip_qkv < 0:
    raise InputError(f"mixer attention: clip_qkv must be 0 (no clipping) or above, got {clip_qkv}")
  if not 0 <= rotary_fraction <= 1 or (head_dim * rotary_fraction) % 2:
    raise InputError(
      f"mixer attention: rotary_fraction must be in [0, 1] and leave an even part of head_dim={head_dim}, got "
      f"{rotary_fraction}"
    )
