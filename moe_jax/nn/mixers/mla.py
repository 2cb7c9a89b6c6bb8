"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1)."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError, require_option
from moe_jax.nn.context import Context, Past
from moe_jax.nn.mixers.positions import make_yarn, sequence_positions
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.attention import attend_cached
from moe_jax.ops.cache import append
from moe_jax.ops.largest_scores import largest_scores
from moe_jax.ops.rotary import Rotary
from moe_jax.sharding import constrain
from moe_jax.sharding.attention import attend
from moe_jax.types import Array, Maximum, MixerAux

_CACHED = ("batch", None, None)


class MLA(nnx.Module):
  """Multi-head latent attention: `y_BLD, aux = mla(x_BLD, context)`.

  Keys and values of all heads are projected from one vector of `kv_rank` per position. A part of each query and
  key is rotated, and this part of the key is the same in all heads. The cache holds only the vector and the
  rotated key. Whole sequences are computed in the plain form (equations 37 to 47 of appendix C). Behind a cache
  the absorbed form is used: queries are multiplied by the keys' projection, and what they attend to by that of
  the values, so that no key or value of a past position is projected again.

  Padding is treated as in `Attention`.

  Args:
    dim: D.
    num_heads: N.
    head_dim: what the sizes below are made of, if they are 0.
    rope_theta: the base of the rotary positions.
    causal: whether a position attends only to itself and earlier positions, or to all.
    query_rank: queries are projected from a vector of this size; 0: directly from x (V2-Lite).
    kv_rank: size of the vector that keys and values are projected from; 0: 4 * head_dim, as in V2.
    nope_dim: width of the part of a head that is not rotated; 0: head_dim.
    rope_dim: width of the rotated part; 0: head_dim / 2, as in V2.
    value_dim: width of a value; 0: head_dim.
    rank_norm_eps: added to the mean square in the norms of the two vectors.
    interleaved: rotary pairs are (2i, 2i + 1), as in all DeepSeek models.
    yarn_factor: stretches positions, see `moe_jax.ops.rotary.Yarn`, also for the other yarn options; 1: not.
    kernel: of the plain form, as in `Attention`.
    init_scale: s in std = sqrt(s / fan_in) of every matrix.
    rngs: draws the parameters.

  Raises:
    InputError: if an option is out of range.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    head_dim: int,
    *,
    rope_theta: float = 10_000.0,
    causal: bool = True,
    query_rank: int = 0,
    kv_rank: int = 0,
    nope_dim: int = 0,
    rope_dim: int = 0,
    value_dim: int = 0,
    rank_norm_eps: float = 1e-6,
    interleaved: bool = True,
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
    given = {"query_rank": query_rank, "kv_rank": kv_rank, "nope_dim": nope_dim, "value_dim": value_dim}
    for name, size in (given | {"rope_dim": rope_dim}).items():
      if size < 0:
        raise InputError(f"mixer mla: {name} must be 0 (the default) or a size, got {size}")
    require_option("mixer mla", "kernel", kernel, ("auto", "blocks"))
    kv_rank, nope, value = kv_rank or 4 * head_dim, nope_dim or head_dim, value_dim or head_dim
    rope = rope_dim or head_dim // 2
    if rope % 2:
      raise InputError(f"mixer mla: rope_dim must be even, got {rope}; set it, e.g. rope_dim={rope + 1}")
    yarn = make_yarn(
      "mla", yarn_factor, yarn_length, yarn_beta_fast, yarn_beta_slow, yarn_truncate, yarn_mscale,
      yarn_mscale_all_dim,
    )  # fmt: skip
    self.rotary = Rotary(rope, rope_theta, interleaved, yarn)
    self.kernel = kernel
    self.scale = (nope + rope) ** -0.5 * self.rotary.score_scale
    self.causal, self.kv_rank, self.nope_dim, self.rope_dim = causal, kv_rank, nope, rope
    d, n, s = dim, num_heads, init_scale
    into, up = ("embed", "attention_rank"), ("attention_rank", "heads", "head_dim")
    low = query_rank > 0
    self.w_query_DNH = None if low else matrix(rngs, (d, n, nope + rope), ("embed", "heads", "head_dim"), s)
    self.w_query_down_DX = matrix(rngs, (d, query_rank), into, s) if low else None
    self.query_norm = RMSNorm(query_rank, rank_norm_eps) if low else None
    self.w_query_up_XNH = matrix(rngs, (query_rank, n, nope + rope), up, s) if low else None
    self.w_kv_down_DX = matrix(rngs, (d, kv_rank), into, s)
    self.w_key_rope_DH = matrix(rngs, (d, rope), ("embed", "head_dim"), s)
    self.kv_norm = RMSNorm(kv_rank, rank_norm_eps)
    self.w_key_up_XNH = matrix(rngs, (kv_rank, n, nope), up, s)
    self.w_value_up_XNH = matrix(rngs, (kv_rank, n, value), up, s)
    self.w_out_NHD = matrix(rngs, (n, value, d), ("heads", "head_dim", "embed"), s, num_in=2)

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, MixerAux | None]:
    position_XL = sequence_positions(x_BLD, context)
    mask_BL = None if self.causal else context.mask_of(x_BLD)
    query, compressed = self._query(x_BLD, position_XL), self._compressed(x_BLD, position_XL)
    packed = {"segment_BL": context.segment_BL}
    y_BLD = self._out(self._plain(query, compressed, mask_BL=mask_BL, **packed))
    if not context.record_scores:
      return y_BLD, None
    key, where = self._keys(compressed), {"causal": self.causal, "scale": self.scale, **packed}
    return y_BLD, MixerAux(Maximum(largest_scores(query, key, context.mask_of(x_BLD), **where)))

  scores_scale = True  # with the matrices of queries and keys, whose norms come before them

  def scale_scores(self, factor_N: Array) -> None:
    """Changes the parameters so that all scores of each head are multiplied by a factor, above 0.

    The parts that are not rotated each get its square root. The rotated key is that of all heads, so the rotated part of
    a query gets the whole factor (2507.20534, section 2.1).

    Args:
      factor_N: of each head; for stacked parameters, with their leading axes.
    """
    w_query = self.w_query_DNH if self.w_query_DNH is not None else self.w_query_up_XNH
    factor = factor_N[..., None, :, None]
    plain, rotated = jnp.split(w_query[...], [self.nope_dim], axis=-1)
    w_query.set_value(jnp.concatenate([plain * jnp.sqrt(factor), rotated * factor], axis=-1))
    self.w_key_up_XNH.set_value(self.w_key_up_XNH[...] * jnp.sqrt(factor))

  def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Array:
    """Returns an empty cache: for each column the vector of rank kv_rank, and the rotated part of the key.

    Raises:
      InputError: if the attention is not causal.
    """
    if not self.causal:
      raise InputError("mixer mla: sees later positions, so there is nothing to keep in a cache")
    return constrain(jnp.zeros((batch_size, length, self.kv_rank + self.rope_dim), dtype), _CACHED)

  def extend(self, x_BLD: Array, context: Context, cache_BXY: Array) -> tuple[Array, Array]:
    """Returns (y_BLD, cache) for tokens behind those of the cache, see `moe_jax.nn.mixers`."""
    past, length = context.past, x_BLD.shape[1]
    positions_BL = past.positions(length)
    query, compressed = self._query(x_BLD, positions_BL), self._compressed(x_BLD, positions_BL)
    cache_BXY = constrain(append(cache_BXY, compressed, past.start), _CACHED)
    if past.fresh:
      return self._out(self._plain(query, compressed, pad_B=past.pad_B)), cache_BXY
    return self._out(self._absorbed(query, cache_BXY, past)), cache_BXY

  def _query(self, x_BLD: Array, position_XL: Array) -> Array:
    """Returns queries [B, L, N, nope + rope], the second part rotated."""
    dtype = x_BLD.dtype
    if self.w_query_DNH is not None:
      query = jnp.einsum("BLD,DNH->BLNH", x_BLD, weight(self.w_query_DNH, dtype))
    else:
      low_BLX = self.query_norm(jnp.einsum("BLD,DX->BLX", x_BLD, weight(self.w_query_down_DX, dtype)))
      query = jnp.einsum("BLX,XNH->BLNH", low_BLX, weight(self.w_query_up_XNH, dtype))
    rotated = self.rotary(query[..., self.nope_dim :], position_XL)
    return jnp.concatenate([query[..., : self.nope_dim], rotated], axis=-1)

  def _compressed(self, x_BLD: Array, position_XL: Array) -> Array:
    """Returns what the cache keeps of each position, [B, L, kv_rank + rope]."""
    dtype = x_BLD.dtype
    low_BLX = self.kv_norm(jnp.einsum("BLD,DX->BLX", x_BLD, weight(self.w_kv_down_DX, dtype)))
    key_BLH = jnp.einsum("BLD,DH->BLH", x_BLD, weight(self.w_key_rope_DH, dtype))
    return jnp.concatenate([low_BLX, self.rotary(key_BLH[:, :, None], position_XL)[:, :, 0]], axis=-1)

  def _plain(self, query_BLNH: Array, compressed_BLX: Array, **seen: Array | None) -> Array:
    """Projects the keys and values of all heads, and attends. `seen` has `mask_BL`, `pad_B`, `segment_BL`."""
    low_BLX = compressed_BLX[..., : self.kv_rank]
    value = jnp.einsum("BLX,XNH->BLNH", low_BLX, weight(self.w_value_up_XNH, query_BLNH.dtype))
    key = self._keys(compressed_BLX)
    scores = {"causal": self.causal, "scale": self.scale, "kernel": self.kernel}
    return attend(query_BLNH, key, value, **seen, **scores)

  def _keys(self, compressed_BLX: Array) -> Array:
    """Returns the keys of all heads, [B, L, N, nope + rope]."""
    low_BLX, rotated_BLX = jnp.split(compressed_BLX, [self.kv_rank], axis=-1)
    key = jnp.einsum("BLX,XNH->BLNH", low_BLX, weight(self.w_key_up_XNH, low_BLX.dtype))
    shared = jnp.broadcast_to(rotated_BLX[:, :, None], (*key.shape[:-1], self.rope_dim))
    return jnp.concatenate([key, shared], axis=-1)

  def _absorbed(self, query_BLNH: Array, cache_BXY: Array, past: Past) -> Array:
    """The same with one head of keys for all heads of queries, which is the cache as it stands."""
    dtype = query_BLNH.dtype
    plain, rotated = jnp.split(query_BLNH, [self.nope_dim], axis=-1)
    absorbed = jnp.einsum("BLNH,XNH->BLNX", plain, weight(self.w_key_up_XNH, dtype))
    mixed_BLNX = attend_cached(
      jnp.concatenate([absorbed, rotated], axis=-1),
      cache_BXY[:, :, None],
      cache_BXY[:, :, None, : self.kv_rank],
      column_L=past.columns(query_BLNH.shape[1]),
      column_X=jnp.arange(cache_BXY.shape[1], dtype=jnp.int32),
      pad_B=past.pad_B,
      scale=self.scale,
    )
    return jnp.einsum("BLNX,XNH->BLNH", mixed_BLNX, weight(self.w_value_up_XNH, dtype))

  def _out(self, mixed_BLNH: Array) -> Array:
    return jnp.einsum("BLNH,NHD->BLD", mixed_BLNH, weight(self.w_out_NHD, mixed_BLNH.dtype))
