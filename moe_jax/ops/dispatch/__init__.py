"""Tokens to experts and back. Every dispatcher is one function with the same signature:

  dispatch(x_GTD, assignment, experts, *, num_experts, capacity, shard) -> (y_GTD, kept_GA)

`assignment` has fields [G, A]. An entry's position in its expert's queue is the number of earlier entries
of that expert that hold a slot; it is kept if it is valid and its position is below `capacity`.
y_GTD sums weight * expert(x) over the kept entries; a dropped entry contributes exactly zero, also to
gradients. All give the same numbers where nothing is dropped. `experts(rows, matmul)` computes rows of the experts
that the dispatcher says they belong to; `moe_jax.ops.experts.ExpertWeights` are such experts.

These are plain programs over all groups. Those that spell the exchange between devices have the same signature and
live in moe_jax/sharding, whose `get_dispatcher` knows all of them.
"""

from moe_jax.errors import unknown_name
from moe_jax.ops.dispatch.capacity import default_group_size, expert_capacity
from moe_jax.ops.dispatch.common import no_sharding
from moe_jax.ops.dispatch.dropless import dropless_dispatch
from moe_jax.ops.dispatch.einsum import einsum_dispatch
from moe_jax.ops.dispatch.sorted import sorted_dispatch

DISPATCHERS = {"einsum": einsum_dispatch, "sorted": sorted_dispatch, "dropless": dropless_dispatch}


def get_dispatcher(name: str):
  """The dispatcher of that name. Raises `InputError` naming the known ones."""
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
