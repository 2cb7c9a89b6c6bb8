"""What a cache keeps of past columns: all of them, or the last ones in a ring.

A column is a position in the batch. Sequences of different lengths end together, so they start in different
columns, and what is before is padding.
"""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def append(kept_BX: Array, new_BX: Array, start: Array) -> Array:
  """Writes new columns behind the first `start` ones. The other axes are the same."""
  return jax.lax.dynamic_update_slice_in_dim(kept_BX, new_BX.astype(kept_BX.dtype), start, axis=1)


def ring_columns(size: int, start: Array) -> Array:
  """Returns which column each slot of a ring holds after `start` columns, int32 [size]. Below 0: none yet."""
  slot_X = jnp.arange(size, dtype=jnp.int32)
  return start - 1 - (start - 1 - slot_X) % size


def ring_append(kept_BX: Array, new_BX: Array, start: Array) -> Array:
  """Writes new columns over the oldest ones. The other axes are the same."""
  size, length = kept_BX.shape[1], new_BX.shape[1]
  new_BX = new_BX[:, -size:].astype(kept_BX.dtype)
  if length == 1:
    return jax.lax.dynamic_update_slice_in_dim(kept_BX, new_BX, start % size, axis=1)
  slots = (start + length - new_BX.shape[1] + jnp.arange(new_BX.shape[1])) % size
  return kept_BX.at[:, slots].set(new_BX, unique_indices=True)
