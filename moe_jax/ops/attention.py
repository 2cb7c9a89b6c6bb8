"""Causal attention that never holds the scores of a whole long sequence."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array

BLOCK = 1024  # queries whose scores are held at once


def causal_attention(query_BLNH: Array, key_BLNH: Array, value_BLNH: Array, block: int = BLOCK) -> Array:
  """Each position's softmax-weighted mean of the values up to itself, [B, L, N, H]. The heads of keys and
  values divide those of the queries.

  Scores are [B, N, L, L] in float32: at L = 4096, 32 heads and 4 sequences 8 GiB per layer. So queries go in
  blocks, each with the keys up to its own end only, and the backward pass recomputes a block's scores
  (the idea of 2205.14135, left to XLA): B * N * block * L numbers are held instead. With L / block = 4 blocks
  10/16 of the L x L products are made, with 8 blocks 9/16.
  """
  length = query_BLNH.shape[1]
  attend = lambda query, key, value: jax.nn.dot_product_attention(query, key, value, is_causal=True)
  if length <= block:
    return attend(query_BLNH, key_BLNH, value_BLNH)
  # A barrier (prevent_cse) keeps XLA from merging this recomputation with that of the layer around it.
  one_block = jax.checkpoint(_attend_to_the_past)
  rows = []
  for start in range(0, length, block):
    end = min(start + block, length)
    rows.append(one_block(query_BLNH[:, start:end], key_BLNH[:, :end], value_BLNH[:, :end]))
  return jnp.concatenate(rows, axis=1)


def _attend_to_the_past(query_BXNH: Array, key_BLNH: Array, value_BLNH: Array) -> Array:
  """Queries that are the last X of the L positions."""
  queries, keys = query_BXNH.shape[1], key_BLNH.shape[1]
  position_X = keys - queries + jnp.arange(queries)
  mask_11XL = (jnp.arange(keys)[None, :] <= position_X[:, None])[None, None]
  return jax.nn.dot_product_attention(query_BXNH, key_BLNH, value_BLNH, mask=mask_11XL)
