"""Dispatchers send tokens to experts and combine the results. All are functions with the same signature:

  dispatch(x_GTD, assignment, experts, *, num_experts, capacity, shard) -> (y_GTD, kept_GA)

`assignment` has fields [G, A]. An entry's position in its expert's queue is the number of earlier entries
of that expert that hold a slot. An entry is kept if it is valid and its position is below `capacity`.
y_GTD sums weight * expert(x) over the kept entries. A dropped entry contributes exactly zero, also to
gradients. All dispatchers give the same results if nothing is dropped. `experts(rows, product)` applies to each row
the expert that the dispatcher assigns to it (see `moe_jax.ops.experts`).
`weighing_inputs` makes a dispatcher of a dispatcher.

These dispatchers are plain programs over all groups. Dispatchers that write out the exchange between devices have
the same signature and are in `moe_jax.sharding`, where `dispatchers.DISPATCHERS` has all of them by name.
"""

from moe_jax.ops.dispatch.capacity import default_group_size, expert_capacity
from moe_jax.ops.dispatch.common import no_sharding
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.einsum import einsum_dispatch
from moe_jax.ops.dispatch.inputs import weighing_inputs
from moe_jax.ops.dispatch.sorted import sorted_dispatch

__all__ = [
  "default_group_size",
  "dropless_dispatch",
  "einsum_dispatch",
  "expert_capacity",
  "no_sharding",
  "sorted_dispatch",
  "weighing_inputs",
]
