"""Softmax attention that never stores all scores of a long sequence."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.types import Array

BLOCK = 1024  # queries whose scores are held at once


def attend(
  query_BLNH: Array,
  key_BLNH: Array,
  value_BLNH: Array,
  *,
  causal: bool = True,
  window: int = 0,
  mask_BL: Array | None = None,
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
    value_BLNH: values, with as many heads as keys.
    causal: whether a position attends only to itself and earlier positions.
    window: attend only to the last `window` positions, including the position itself; 0: no limit. Without
      `causal`, to as many on either side.
    mask_BL: bool, False: no position attends to it. None: all True.
    block: the number of queries whose scores are stored at a time.
  """
  length = query_BLNH.shape[1]
  if length <= block and causal and not window and mask_BL is None:
    return jax.nn.dot_product_attention(query_BLNH, key_BLNH, value_BLNH, is_causal=True)
  # A barrier (prevent_cse) keeps XLA from merging this recomputation with that of the layer around it.
  rows = []
  for start in range(0, length, block):
    end = min(start + block, length)
    first = max(0, start - window + 1) if window else 0
    last = end if causal else min(length, end + window - 1) if window else length
    one_block = functools.partial(_attend, start=start, first=first, causal=causal, window=window)
    if length > block:
      one_block = jax.checkpoint(one_block)
    seen = None if mask_BL is None else mask_BL[:, first:last]
    rows.append(one_block(query_BLNH[:, start:end], key_BLNH[:, first:last], value_BLNH[:, first:last], seen))
  return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _attend(
  query_BXNH: Array,
  key_BYNH: Array,
  value_BYNH: Array,
  seen_BY: Array | None,
  *,
  start: int,
  first: int,
  causal: bool,
  window: int,
) -> Array:
  """`attend` for queries that start at position `start` and keys that start at position `first`."""
  behind_XY = (start + jnp.arange(query_BXNH.shape[1]))[:, None] - (first + jnp.arange(key_BYNH.shape[1]))[
    None
  ]
  mask_XY = behind_XY >= 0 if causal else jnp.ones(behind_XY.shape, bool)
  if window:
    mask_XY &= jnp.abs(behind_XY) < window
  mask_11XY = mask_XY[None, None]
  mask = mask_11XY if seen_BY is None else mask_11XY & seen_BY[:, None, None, :]
  return jax.nn.dot_product_attention(query_BXNH, key_BYNH, value_BYNH, mask=mask)
