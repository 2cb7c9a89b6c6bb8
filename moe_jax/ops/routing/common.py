"""What all routers share: the call signature, selection, and the two orders of an assignment."""

from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.types import Array, Assignment, BatchRouting, Routing


class Router(Protocol):
  """Routes one group of T tokens; the layer maps it over groups.

  Args:
    logits_TE: float32 router logits.
    bias_E: moves the choice of experts, never a weight. None: no bias.
    key: randomness for routers that draw; None (evaluation): the deterministic choice.
    mask_T: bool, False for padding. None: no padding.
  """

  def __call__(
    self,
    logits_TE: Array,
    *,
    bias_E: Array | None = None,
    key: Array | None = None,
    mask_T: Array | None = None,
  ) -> Routing: ...


def select_top_k(scores_TE: Array, bias_E: Array | None, k: int) -> Array:
  """Expert indices [T, K] of the K highest scores + bias, best first; ties go to the lower index.

  K rounds of argmax and not `jax.lax.top_k`: XLA's partitioner gathers the logits of all devices for that
  one, while argmax stays where its tokens are. Each token needs K scores above minus infinity.
  """
  left_TE = jax.lax.stop_gradient(scores_TE if bias_E is None else scores_TE + bias_E[None])
  expert_E = jnp.arange(scores_TE.shape[-1])
  chosen = []
  for _ in range(k):
    best_T = jnp.argmax(left_TE, axis=-1).astype(jnp.int32)
    left_TE = jnp.where(expert_E[None, :] == best_T[:, None], -jnp.inf, left_TE)
    chosen.append(best_T)
  return jnp.stack(chosen, axis=-1)


def take_experts(values_TE: Array, expert_TK: Array) -> Array:
  """`values_TE[t, expert_TK[t, k]]` as [T, K], differentiable without a scatter."""
  is_chosen_TKE = expert_TK[:, :, None] == jnp.arange(values_TE.shape[-1])[None, None, :]
  return jnp.sum(jnp.where(is_chosen_TKE, values_TE[:, None, :], 0), axis=-1)


def full_mask(logits_TE: Array, mask_T: Array | None) -> Array:
  return jnp.ones(logits_TE.shape[:1], bool) if mask_T is None else mask_T


def token_major(expert_TK: Array, weight_TK: Array, mask_T: Array) -> Assignment:
  """All choices of token 0, then of token 1, ...: a later token can never evict an earlier one.

  This order keeps a causal model causal also where capacity drops.
  """
  t, k = expert_TK.shape
  return Assignment(
    token_A=jnp.repeat(jnp.arange(t, dtype=jnp.int32), k),
    expert_A=expert_TK.reshape(-1),
    weight_A=weight_TK.reshape(-1),
    valid_A=jnp.repeat(mask_T, k),
  )


def choice_major(expert_TK: Array, weight_TK: Array, valid_TK: Array, holds_slot_TK: Array) -> Assignment:
  """All first choices, then all second ones, ...: GShard's order (2006.16668, Algorithm 1).

  A later token's first choice can evict an earlier token's second one: in a causal model that is a
  weak leak of the future, present in the published method.
  """
  t, k = expert_TK.shape
  return Assignment(
    token_A=jnp.tile(jnp.arange(t, dtype=jnp.int32), k),
    expert_A=expert_TK.T.reshape(-1),
    weight_A=weight_TK.T.reshape(-1),
    valid_A=valid_TK.T.reshape(-1),
    holds_slot_A=holds_slot_TK.T.reshape(-1),
  )


def selected_experts(routing: Routing) -> Array:
  """[T, E] float32, 1 where a token was sent to an expert, before capacity. No gradient."""
  a = routing.assignment
  valid_A = a.valid_A.astype(jnp.float32)
  return jnp.zeros(routing.logits_TE.shape, jnp.float32).at[a.token_A, a.expert_A].add(valid_A)


def to_batch(routing: Routing, batch: int, length: int) -> BatchRouting:
  """A routing with a leading group axis, regrouped into `batch` sequences of `length` tokens."""
  e = routing.logits_TE.shape[-1]
  selected_GTE = jax.vmap(selected_experts)(routing)
  return BatchRouting(
    logits_BLE=routing.logits_TE.reshape(batch, length, e),
    scores_BLE=routing.scores_TE.reshape(batch, length, e),
    selected_BLE=jax.lax.stop_gradient(selected_GTE).reshape(batch, length, e),
    mask_BL=routing.mask_T.reshape(batch, length),
    group_size=routing.logits_TE.shape[-2],
  )
