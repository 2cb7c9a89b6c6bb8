"""Caches: what a model keeps of the tokens it has read, so that the next ones cost no second reading."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, Segment
from moe_jax.nn.block import Block
from moe_jax.nn.build import make_blocks, resolve
from moe_jax.types import Array, PyTree


class Cache(NamedTuple):
  """The cache of a model for a batch of sequences."""

  start: Array  # int32 [], the columns it holds
  pad_B: Array  # int32, columns of padding before each sequence
  layers: PyTree  # per segment and block of its pattern, stacked over repetitions


class CacheBytes(NamedTuple):
  """Bytes of one sequence in the cache of a model."""

  per_token: int  # of each further token of a long sequence
  fixed: int  # whatever the length: recurrent states, and windows that are full
  total: int  # of a sequence of the given length


def cache_bytes(config: ModelConfig, length: int, dtype: str = "bfloat16") -> CacheBytes:
  """Returns what the cache of a sequence of `length` tokens takes. Nothing is allocated.

  Args:
    config: the model. Names in it are resolved here.
    length: tokens of the sequence.
    dtype: of keys, values and what stands for them. Recurrent states are float32.

  Raises:
    InputError: if a mixer keeps no cache.
  """
  config = resolve(config)
  of_length = lambda length: sum(
    segment.repeats * _pattern_bytes(config, segment, length, jnp.dtype(dtype)) for segment in config.blocks
  )
  long = 1 << 24  # longer than any window
  per_token = of_length(long + 1) - of_length(long)
  return CacheBytes(per_token, of_length(long) - long * per_token, of_length(length))


def _pattern_bytes(config: ModelConfig, segment: Segment, length: int, dtype: jnp.dtype) -> int:
  def empty() -> PyTree:
    blocks: list[Block] = make_blocks(config, Segment(segment.pattern), nnx.Rngs(0))
    return [block.init_cache(1, length, dtype) for block in blocks]

  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(empty)))
