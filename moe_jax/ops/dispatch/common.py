"""What every dispatcher is given."""

from collections.abc import Callable

from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.experts import Batched, Experts
from moe_jax.types import Array

Shard = Callable[[Array, tuple[str | None, ...]], Array]  # constrains the sharding of named axes


def no_sharding(x: Array, axes: tuple[str | None, ...]) -> Array:
  """The default `shard`: one device, so no dispatcher has to prepare an exchange."""
  del axes
  return x


BY_GROUP = ("group", None, None, None)  # logical axes of rows_GECD
BY_EXPERT = ("expert", "group", None, None)  # of rows_EGCD


EXCHANGED = "exchanged"  # the name by which a remat policy saves rows that have just travelled


def exchanged(rows: Array) -> Array:
  """Rows that have just travelled between devices: the remat policy `exchange` keeps them, so they travel once."""
  return checkpoint_name(rows, EXCHANGED)


def run_experts(experts: Experts, rows_GECD: Array, shard: Shard) -> Array:
  """The experts on their capacity buffers, [G, E, C, D] -> the same: one batched product over E.

  Both layouts are constrained on both sides of the experts. Where groups are spread over the devices that
  hold the experts, each change of layout is then one all-to-all, and so is each in the backward pass;
  with fewer constraints XLA gathers activations instead.
  """
  rows_EGCD = exchanged(shard(shard(rows_GECD, BY_GROUP).swapaxes(0, 1), BY_EXPERT))
  # G and C become one axis: XLA:CPU takes 1.5 times as long for a product with two row axes.
  num_experts, num_groups, capacity, dim = rows_EGCD.shape
  rows_EMD = rows_EGCD.reshape(num_experts, num_groups * capacity, dim)
  rows_EMD = experts(rows_EMD, Batched())
  rows_EGCD = shard(rows_EMD.reshape(rows_EGCD.shape), BY_EXPERT)
  return exchanged(shard(rows_EGCD.swapaxes(0, 1), BY_GROUP))
