"""Caches: what a model keeps of the tokens it has read, so that the next ones cost no second reading."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array, PyTree


class Past(NamedTuple):
  """Where new tokens stand behind those of a cache. A mixer reads it from `Context.past`.

  A column is a position in the batch. Sequences of different lengths end together: sequence b starts in column
  `pad_B[b]`, and its positions count from there.
  """

  start: Array  # int32 [], the columns that the cache already holds
  pad_B: Array  # int32, columns of padding before each sequence
  fresh: bool = False  # static: the cache is empty, so the new tokens need nothing of it

  def columns(self, length: int) -> Array:
    """Returns the columns of `length` new tokens, int32 [L]."""
    return self.start + jnp.arange(length, dtype=jnp.int32)

  def positions(self, length: int) -> Array:
    """Returns their positions in the sequences, int32 [B, L]. Padding has those below 0."""
    return self.columns(length)[None, :] - self.pad_B[:, None]

  def mask(self, length: int) -> Array:
    """Returns which of them are no padding, bool [B, L]."""
    return self.positions(length) >= 0


class Cache(NamedTuple):
  """The cache of a model for a batch of sequences."""

  start: Array  # int32 [], the columns it holds
  pad_B: Array  # int32, columns of padding before each sequence
  layers: PyTree  # per segment and block of its pattern, stacked over repetitions


class CacheBytes(NamedTuple):
  """Bytes of one sequence in a cache."""

  per_token: int  # of each further token
  fixed: int  # whatever the length: recurrent states, and windows that are full
  total: int  # of a sequence of the given length


def tree_bytes(tree: PyTree) -> int:
  """Returns the bytes of all arrays of a tree, which may be abstract."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
