"""GShard's dispatch and combine tensors (2006.16668), for which XLA inserts the all-to-alls automatically."""

import jax
import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Shard, no_sharding, run_experts
from moe_jax.ops.dispatch.slots import assign_slots
from moe_jax.ops.experts import Experts
from moe_jax.types import Array, Assignment


def einsum_dispatch(
  x_GTD: Array,
  assignment: Assignment,
  experts: Experts,
  *,
  num_experts: int,
  capacity: int,
  shard: Shard = no_sharding,
) -> tuple[Array, Array]:
  """Returns y_GTD = sum of weight * expert(x) over the kept entries, and kept_GA. Fields are [G, A]."""
  _, num_tokens, _ = x_GTD.shape
  slots = jax.vmap(lambda a: assign_slots(a, num_tokens, num_experts, capacity))(assignment)
  weight_GEC = jax.vmap(lambda w, e: w.at[e].get(mode="fill", fill_value=0))(
    assignment.weight_A, slots.entry_EC
  )
  # This is a comparison instead of a scatter: XLA fuses it, and it partitions over groups without communication.
  dispatch_GTEC = slots.token_EC[:, None] == jnp.arange(num_tokens)[None, :, None, None]
  combine_GTEC = jnp.where(dispatch_GTEC, weight_GEC[:, None], 0).astype(x_GTD.dtype)

  rows_GECD = jnp.einsum("GTEC,GTD->GECD", dispatch_GTEC.astype(x_GTD.dtype), x_GTD)
  rows_GECD = run_experts(experts, rows_GECD, shard)
  y_GTD = jnp.einsum("GTEC,GECD->GTD", combine_GTEC, rows_GECD)
  return shard(y_GTD, ("group", None, None)), slots.kept_A
