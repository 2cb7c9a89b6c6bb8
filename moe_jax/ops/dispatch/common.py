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


def run_experts(experts: Experts, rows_EGCD: Array) -> Array:
  """The experts on their capacity buffers: one batched product over E.

  G and C become one axis first: XLA:CPU takes 1.5x as long for a product with two row axes.
  """
  num_experts, num_groups, capacity, dim = rows_EGCD.shape
  rows_END = rows_EGCD.reshape(num_experts, num_groups * capacity, dim)
  rows_END = experts(rows_END, lambda rows, w_EXY: jnp.einsum("ENX,EXY->ENY", rows, w_EXY))
  return rows_END.reshape(rows_EGCD.shape)
