"""What every dispatcher is given."""

from collections.abc import Callable

import jax.numpy as jnp

from moe_jax.ops.experts import Matmul
from moe_jax.types import Array

Experts = Callable[[Array, Matmul], Array]  # experts(rows, matmul) -> rows, see ops/experts.py
Shard = Callable[[Array, tuple[str | None, ...]], Array]  # constrains the sharding of named axes


def no_sharding(x: Array, axes: tuple[str | None, ...]) -> Array:
  """The default `shard`: one device."""
  del axes
  return x


def batched_matmul(rows_EGCX: Array, w_EXY: Array) -> Array:
  """The `matmul` of capacity buffers: one batched product over E."""
  return jnp.einsum("EGCX,EXY->EGCY", rows_EGCX, w_EXY)
