"""Tokens to experts and back. Every dispatcher is one function with the same signature:

  dispatch(x_GTD, assignment, experts, *, num_experts, capacity, shard) -> (y_GTD, kept_GA)

`assignment` has fields [G, A]. An entry's position in its expert's queue is the number of earlier entries
of that expert that hold a slot; it is kept if it is valid and its position is below `capacity`.
y_GTD sums weight * expert(x) over the kept entries; a dropped entry contributes exactly zero, also to
gradients. All give the same numbers where nothing is dropped. `experts(rows, product)` computes rows of the experts
that the dispatcher says they belong to, see `moe_jax.ops.experts`.

These are plain programs over all groups. Those that spell the exchange between devices have the same signature and
live in `moe_jax.sharding`, where `dispatchers.DISPATCHERS` has all of them by name.
"""

from moe_jax.ops.dispatch.capacity import default_group_size, expert_capacity
from moe_jax.ops.dispatch.common import no_sharding
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.einsum import einsum_dispatch
from moe_jax.ops.dispatch.sorted import sorted_dispatch

__all__ = [
  "default_group_size",
  "dropless_dispatch",
  "einsum_dispatch",
  "expert_capacity",
  "no_sharding",
  "sorted_dispatch",
]
