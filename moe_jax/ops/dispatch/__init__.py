"""Dispatchers send tokens to experts and combine the results. All are functions with the same signature:

  dispatch(x_GTD, assignment, experts, *, num_experts, capacity, shard) -> (y_GTD, kept_GA)

`assignment` has fields [G, A]. An entry's position in its expert's queue is the number of earlier entries
of that expert that hold a slot. An entry is kept if it is valid and its position is below `capacity`.
y_GTD sums weight * expert(x) over the kept entries. A dropped entry contributes exactly zero, also to
gradients. All dispatchers give the same results if nothing is dropped. `experts(rows, matmul)` applies to each row
the expert that the dispatcher assigns to it; `moe_jax.ops.experts.ExpertWeights` is such a callable.

These dispatchers are plain programs over all groups. Dispatchers that write out the exchange between devices have
the same signature and are in moe_jax/sharding, whose `get_dispatcher` returns any dispatcher.
"""

from moe_jax.errors import unknown_name
from moe_jax.ops.dispatch.capacity import default_group_size, expert_capacity
from moe_jax.ops.dispatch.common import no_sharding
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.einsum import einsum_dispatch
from moe_jax.ops.dispatch.sorted import sorted_dispatch

DISPATCHERS = {"einsum": einsum_dispatch, "sorted": sorted_dispatch, "dropless": dropless_dispatch}


def get_dispatcher(name: str):
  """Returns the dispatcher with this name. Raises `InputError`, which lists the known names."""
  if name not in DISPATCHERS:
    raise unknown_name("dispatcher", name, DISPATCHERS)
  return DISPATCHERS[name]


__all__ = [
  "DISPATCHERS",
  "default_group_size",
  "expert_capacity",
  "get_dispatcher",
  "no_sharding",
]
