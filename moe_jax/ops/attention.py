"""Softmax attention that never stores all scores of a long sequence, in XLA's operations.

`moe_jax.sharding.attention` uses the kernel of a GPU or a TPU instead, where there is one.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.types import Array

BLOCK = 1024  # queries whose scores are held at once
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without any key is no NaN


def attend(
  query_BLNH: Array,
  key_BLNH: Array,
  value_BLNH: Array,
  *,
  causal: bool = True,
  window: int = 0,
  mask_BL: Array | None = None,
  pad_B: Array | None = None,
  segment_BL: Array | None = None,
  scale: float | None = None,
  sink_N: Array | None = None,
  block: int = BLOCK,
) -> Array:
  """Returns, for each position, the softmax-weighted mean of the values that it attends to, [B, L, N, H].

  All scores [B, N, L, L] would be 8 GiB per layer in float32, for L = 4096, 32 heads and 4 sequences. Queries
  are therefore processed in blocks, each with only the keys that it can attend to, and the backward pass
  recomputes the scores of a block (the idea of 2205.14135, left to XLA). This stores B * N * block * L
  numbers at a time. With 4 blocks, 10/16 of the L x L products are computed, and with 8 blocks 9/16.

  Args:
    query_BLNH: queries of any float type.
    key_BLNH: keys. Their number of heads divides that of the queries.
    value_BLNH: values, with as many heads as keys. Their width may differ.
    causal: whether a position attends only to itself and earlier positions.
    window: attend only to the last `window` positions, including the position itself; 0: no limit. Without
      `causal`, to as many on either side.
    mask_BL: bool, False: no position attends to it. None: all True.
    pad_B: int32, the first position of each sequence; nothing attends to earlier ones. None: all 0.
    segment_BL: int32, the number of the text in a packed row: a position attends only to its own. None: one text a row.
    scale: what scores are multiplied by; None: H^-0.5.
    sink_N: a score of each query head that takes part in its softmax and brings no value (gpt-oss,
      2508.10925), or None.
    block: the number of queries whose scores are stored at a time.
  """
  length = query_BLNH.shape[1]
  if pad_B is not None:
    text_BL = jnp.arange(length)[None] >= pad_B[:, None]
    mask_BL = text_BL if mask_BL is None else mask_BL & text_BL
  if length <= block and causal and not window and mask_BL is None and segment_BL is None:
    return _mix(query_BLNH, key_BLNH, value_BLNH, is_causal=True, scale=scale, sink_N=sink_N)
  # A barrier (prevent_cse) keeps XLA from merging this recomputation with that of the layer around it.
  rows = []
  for start in range(0, length, block):
    end = min(start + block, length)
    first = max(0, start - window + 1) if window else 0
    last = end if causal else min(length, end + window - 1) if window else length
    one_block = functools.partial(
      _attend, start=start, first=first, causal=causal, window=window, scale=scale
    )
    if length > block:
      one_block = jax.checkpoint(one_block)
    seen = None if mask_BL is None else mask_BL[:, first:last]
    key, value = key_BLNH[:, first:last], value_BLNH[:, first:last]
    of_text = None
    if segment_BL is not None:
      of_text = segment_BL[:, start:end, None] == segment_BL[:, None, first:last]
    rows.append(one_block(query_BLNH[:, start:end], key, value, seen, of_text, sink_N))
  return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _attend(
  query_BXNH: Array,
  key_BYNH: Array,
  value_BYNH: Array,
  seen_BY: Array | None,
  of_text_BXY: Array | None,
  sink_N: Array | None,
  *,
  start: int,
  first: int,
  causal: bool,
  window: int,
  scale: float | None,
) -> Array:
  """`attend` for queries that start at position `start` and keys that start at position `first`."""
  behind_XY = (start + jnp.arange(query_BXNH.shape[1]))[:, None] - (first + jnp.arange(key_BYNH.shape[1]))[
    None
  ]
  mask_XY = behind_XY >= 0 if causal else jnp.ones(behind_XY.shape, bool)
  if window:
    mask_XY &= jnp.abs(behind_XY) < window
  mask = mask_XY[None, None]
  if seen_BY is not None:
    mask = mask & seen_BY[:, None, None, :]
  if of_text_BXY is not None:
    mask = mask & of_text_BXY[:, None]
  return _mix(query_BXNH, key_BYNH, value_BYNH, mask=mask, scale=scale, sink_N=sink_N)


def attend_cached(
  query_BLNH: Array,
  key_BXNH: Array,
  value_BXNH: Array,
  *,
  column_L: Array,
  column_X: Array,
  pad_B: Array,
  window: int = 0,
  scale: float | None = None,
  sink_N: Array | None = None,
) -> Array:
  """Returns what `attend` does for queries and keys that say where they stand, [B, L, N, H].

  Args:
    query_BLNH, key_BXNH, value_BXNH, window, scale, sink_N: as in `attend`.
    column_L: int32, the columns of the queries in the batch.
    column_X: int32, the columns of the keys. Queries attend to no later one.
    pad_B: int32, the first column of each sequence; earlier ones are padding.
  """
  behind_LX = column_L[:, None] - column_X[None, :]
  seen_LX = (behind_LX >= 0) & (behind_LX < window) if window else behind_LX >= 0
  mask_BLX = seen_LX[None] & (column_X[None, None, :] >= pad_B[:, None, None])
  return _mix(query_BLNH, key_BXNH, value_BXNH, mask=mask_BLX[:, None], scale=scale, sink_N=sink_N)


def _mix(
  query_BXNH: Array,
  key_BYNH: Array,
  value_BYNH: Array,
  *,
  mask: Array | None = None,
  is_causal: bool = False,
  scale: float | None = None,
  sink_N: Array | None = None,
) -> Array:
  """Softmax attention with all scores at once. `mask` has the axes of the scores: B or 1, 1, X, Y."""
  if sink_N is None and value_BYNH.shape[-1] == key_BYNH.shape[-1]:
    return jax.nn.dot_product_attention(
      query_BXNH, key_BYNH, value_BYNH, mask=mask, is_causal=is_causal, scale=scale
    )
  # What jax.nn does, for values of another width and with sinks. r: the query heads of a key head.
  batch, length, num_heads, head_dim = query_BXNH.shape
  shared = num_heads // key_BYNH.shape[2]
  grouped = query_BXNH.reshape(batch, length, -1, shared, head_dim)
  scores = jnp.einsum("BXNrH,BYNH->BNrXY", grouped, key_BYNH, preferred_element_type=jnp.float32)
  scores *= head_dim**-0.5 if scale is None else scale
  if is_causal:
    mask = jnp.tri(*scores.shape[-2:], dtype=bool)[None, None]
  if mask is not None:
    scores = jnp.where(mask[:, :, None], scores, _MASKED)
  if sink_N is None:
    probs = jax.nn.softmax(scores, axis=-1)
  else:
    sink = sink_N.astype(jnp.float32).reshape(1, -1, shared, 1, 1)
    highest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sink))
    probs = jnp.exp(scores - highest)
    probs /= probs.sum(axis=-1, keepdims=True) + jnp.exp(sink - highest)
  mixed = jnp.einsum("BNrXY,BYNH->BXNrH", probs.astype(value_BYNH.dtype), value_BYNH)
  return mixed.reshape(batch, length, num_heads, value_BYNH.shape[-1])
