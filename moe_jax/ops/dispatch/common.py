"""Types and functions that all dispatchers share."""

from collections.abc import Callable

from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.experts import Batched, Experts
from moe_jax.types import Array

Shard = Callable[[Array, tuple[str | None, ...]], Array]  # constrains the sharding of named axes


def no_sharding(x: Array, axes: tuple[str | None, ...]) -> Array:
  """The default `shard` for one device, on which no dispatcher needs to prepare an exchange."""
  del axes
  return x


BY_GROUP = ("group", None, None, None)  # logical axes of rows_GECD
BY_EXPERT = ("expert", "group", None, None)  # of rows_EGCD


EXCHANGED = "exchanged"  # the name by which a remat policy saves rows received from other devices


def exchanged(rows: Array) -> Array:
  """Marks rows that were just exchanged between devices. The remat policy `exchange` saves them, so they are sent once."""
  return checkpoint_name(rows, EXCHANGED)


def run_experts(experts: Experts, rows_GECD: Array, shard: Shard) -> Array:
  """Runs the experts on their capacity buffers as one batched product over E. [G, E, C, D] -> [G, E, C, D].

  Both layouts are constrained on both sides of the experts. If groups are spread over the devices that hold the
  experts, each change of layout is then one all-to-all, in the forward and in the backward pass. With fewer
  constraints, XLA gathers activations instead.
  """
  rows_EGCD = exchanged(shard(shard(rows_GECD, BY_GROUP).swapaxes(0, 1), BY_EXPERT))
  # G and C become one axis, because XLA:CPU takes 1.5 times as long for a product with two row axes.
  num_experts, num_groups, capacity, dim = rows_EGCD.shape
  rows_EMD = rows_EGCD.reshape(num_experts, num_groups * capacity, dim)
  rows_EMD = experts(rows_EMD, Batched())
  rows_EGCD = shard(rows_EMD.reshape(rows_EGCD.shape), BY_EXPERT)
  return exchanged(shard(rows_EGCD.swapaxes(0, 1), BY_GROUP))
