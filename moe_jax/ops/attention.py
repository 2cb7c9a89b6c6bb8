"""Causal attention that never holds the scores of a whole long sequence."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array

BLOCK = 1024  # queries whose scores are held at once


def causal_attention(query_BLNH: Array, key_BLXH: Array, value_BLXH: Array, block: int = BLOCK) -> Array:
  """Each position's softmax-weighted mean of the values up to itself, [B, L, N, H]; X divides N heads.

  Scores are [B, N, L, L] in float32: at L = 4096, 32 heads and 4 sequences 8 GiB per layer. So queries go in
  blocks, each with the keys up to its own end only, and the backward pass recomputes a block's scores
  (the idea of 2205.14135, left to XLA): B * N * block * L numbers are held instead. With L / block = 4 blocks
  10/16 of the L x L products are made, with 8 blocks 9/16.
  """
  length = query_BLNH.shape[1]
  attend = lambda query, key, value: jax.nn.dot_product_attention(query, key, value, is_causal=True)
  if length <= block:
    return attend(query_BLNH, key_BLXH, value_BLXH)
  # A barrier (prevent_cse) keeps XLA from merging this recomputation with that of the layer around it.
  one_block = jax.checkpoint(_attend_to_the_past)
  rows = []
  for start in range(0, length, block):
    end = min(start + block, length)
    rows.append(one_block(query_BLNH[:, start:end], key_BLXH[:, :end], value_BLXH[:, :end]))
  return jnp.concatenate(rows, axis=1)


def _attend_to_the_past(query_BQNH: Array, key_BLXH: Array, value_BLXH: Array) -> Array:
  """Queries that are the last Q of the L positions."""
  queries, keys = query_BQNH.shape[1], key_BLXH.shape[1]
  position_Q = keys - queries + jnp.arange(queries)
  mask_11QL = (jnp.arange(keys)[None, :] <= position_Q[:, None])[None, None]
  return jax.nn.dot_product_attention(query_BQNH, key_BLXH, value_BLXH, mask=mask_11QL)
