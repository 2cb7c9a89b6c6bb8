"""Weights on what the experts read instead of on their outputs, for any dispatcher."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.ops.dispatch.common import Shard, no_sharding
from moe_jax.ops.experts import Experts
from moe_jax.types import Array, Assignment


def weighing_inputs(dispatch: Callable, dim: int) -> Callable:
  """Returns a dispatcher for y_GTD = sum of expert(weight * x) over the kept entries, as in Llama 4.

  An expert is no linear function, so this differs from the sum of weight * expert(x). Each entry becomes a token of
  its own, already multiplied, and goes to its expert with weight 1. No dispatcher has to know, and capacity counts
  the same entries as before. `dispatch` gets A instead of T rows in each group, so the tensors of `einsum` grow by
  A/T.

  Args:
    dispatch: a dispatcher, see `moe_jax.ops.dispatch`.
    dim: D. Further columns of the rows, such as random bits, are not multiplied.
  """

  def weighing(
    x_GTD: Array, assignment: Assignment, experts: Experts, *, shard: Shard = no_sharding, **sizes: int
  ) -> tuple[Array, Array]:
    num_tokens = x_GTD.shape[1]
    rows_GAD = jax.vmap(lambda x_TD, token_A: x_TD[token_A])(x_GTD, assignment.token_A)
    weighted_GAD = (rows_GAD[..., :dim] * assignment.weight_A[..., None]).astype(x_GTD.dtype)
    rows_GAD = jnp.concatenate([weighted_GAD, rows_GAD[..., dim:]], axis=-1)
    entry_A = jnp.arange(rows_GAD.shape[1], dtype=jnp.int32)
    own = assignment._replace(
      token_A=jnp.broadcast_to(entry_A[None], assignment.token_A.shape),
      weight_A=jnp.ones_like(assignment.weight_A),
    )
    y_GAD, kept_GA = dispatch(shard(rows_GAD, ("group", None, None)), own, experts, shard=shard, **sizes)
    of_tokens = jax.vmap(lambda y_AD, token_A: jax.ops.segment_sum(y_AD, token_A, num_tokens))
    y_GTD = of_tokens(y_GAD.astype(jnp.float32), assignment.token_A).astype(x_GTD.dtype)
    return shard(y_GTD, ("group", None, None)), kept_GA

  return weighing
