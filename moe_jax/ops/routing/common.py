"""What all routers share: the contract of a choice, selection, and the two orders of an assignment."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.types import Array, Assignment, BatchRouting, ExpertScale, Replay, RouterContext, Routing


class Choice(NamedTuple):
  """How a router chooses, given its logits: pure, for one group of T tokens. A plain method names only `choose`.

  choose: `choose(logits_TE, context) -> Routing`, with a `RouterContext` of one group. A method with several
    projections takes their results first: `choose(logits_TE, noise_logits_TE, context)`. One that hands its
    module more than the routing returns a tuple that begins with it.
  leaks: whether the choice for a token depends on later tokens of its sequence: "" never, "drops" only where
    capacity drops assignments, "always" otherwise. A causal model refuses the latter two.
  takes_bias: False where there is no choice that a bias could move.
  gives_smooth_load: fills in `Routing.smooth_load_TE`.
  whole_sequences: reads `context.sequence`, so groups must hold whole sequences.
  num_tasks: domains that it knows; 0: it reads none.
  zero_init: the projections start at zero.
  weighs: whether weights multiply the "output" of the experts or their "input".
  has_threshold: compares logits with the bias of balancer `expert_threshold`.
  sparse_weights: an expert is used where its weight is above 0, so a loss on weights sets how many are used.
  most: the largest number of experts of a token; None: K.
  fewest: the smallest number of them in evaluation; None: K.
  replays: False where a token may be sent to other experts than those that the bias prefers, or to more or fewer, so
    that recorded choices cannot be given in place of a bias.
  """

  choose: Callable[..., Routing]
  leaks: str = ""
  takes_bias: bool = True
  gives_smooth_load: bool = False
  whole_sequences: bool = False
  num_tasks: int = 0
  zero_init: bool = False
  weighs: str = "output"
  has_threshold: bool = False
  sparse_weights: bool = False
  most: int | None = None
  fewest: int | None = None
  replays: bool = True


def in_groups(choose: Callable[..., Routing], *logits_GTE: Array, context: RouterContext) -> Routing:
  """`choose(*logits_TE, context)` of every group; each field of the result has a leading G."""
  shared = {"bias_E": context.bias_E, "train": context.train}

  def of_group(own: RouterContext, *logits_TE: Array) -> Routing:
    replayed = {} if own.routes is None else {"bias_E": Replay(own.routes)}
    return choose(*logits_TE, own._replace(**shared | replayed))

  return jax.vmap(of_group)(context._replace(bias_E=None, train=None), *logits_GTE)


def require(value: Array | None, who: str, name: str) -> Array:
  """`value`, which `who` reads from its context.

  Raises:
    InputError: the layer was called without it.
  """
  if value is None:
    raise InputError(f"{who}: reads {name}, which the layer was not given")
  return value


_FAR = 1e6  # above the difference of any two scores


def apply_bias(scores_TX: Array, bias_X: Array | ExpertScale | Replay | None) -> Array:
  """What the choice is made by: scores with the balancer's bias."""
  if bias_X is None:
    return scores_TX
  if isinstance(bias_X, Replay):
    return scores_TX - _FAR * (1 - bias_X.selected_TE)
  if isinstance(bias_X, ExpertScale):
    return scores_TX * bias_X.factor_E[None]
  return scores_TX + bias_X[None]


def select_top_k(scores_TX: Array, bias_X: Array | ExpertScale | None, k: int) -> Array:
  """Indices [T, k] of the k highest scores with bias, best first; ties go to the lower index.

  X are experts, or parts that the experts are cut into. Each token needs k scores above minus infinity.

  Takes k rounds of argmax instead of `jax.lax.top_k`: for that one, XLA's partitioner gathers the logits of all
  devices, while argmax stays where its tokens are.
  """
  left_TX = jax.lax.stop_gradient(apply_bias(scores_TX, bias_X))
  index_X = jnp.arange(scores_TX.shape[-1])
  chosen = []
  for _ in range(k):
    best_T = jnp.argmax(left_TX, axis=-1).astype(jnp.int32)
    left_TX = jnp.where(index_X[None, :] == best_T[:, None], -jnp.inf, left_TX)
    chosen.append(best_T)
  return jnp.stack(chosen, axis=-1)


def take_experts(values_TX: Array, index_TY: Array) -> Array:
  """`values_TX[t, index_TY[t, y]]` as [T, Y], differentiable without a scatter."""
  is_chosen_TYX = index_TY[:, :, None] == jnp.arange(values_TX.shape[-1])[None, None, :]
  return jnp.sum(jnp.where(is_chosen_TYX, values_TX[:, None, :], 0), axis=-1)


def token_major(
  expert_TK: Array, weight_TK: Array, mask_T: Array, valid_TK: Array | None = None
) -> Assignment:
  """All choices of token 0, then of token 1, ...: a later token can never evict an earlier one.

  This order keeps a causal model causal also where capacity drops. `valid_TK`: which of the choices are sent;
  None: all of them.
  """
  t, k = expert_TK.shape
  mask_TK = jnp.broadcast_to(mask_T[:, None], (t, k))
  valid_TK = mask_TK if valid_TK is None else mask_TK & valid_TK
  return Assignment(
    token_A=jnp.repeat(jnp.arange(t, dtype=jnp.int32), k),
    expert_A=expert_TK.reshape(-1),
    weight_A=weight_TK.reshape(-1),
    valid_A=valid_TK.reshape(-1),
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


def expert_weights(routing: Routing) -> Array:
  """[T, E] float32, the weight of each expert that a token was sent to, before capacity. Differentiable."""
  a = routing.assignment
  weight_A = jnp.where(a.valid_A, a.weight_A, 0)
  return jnp.zeros(routing.logits_TE.shape, jnp.float32).at[a.token_A, a.expert_A].add(weight_A)


def to_batch(routing: Routing, batch: int, length: int, num_experts_per_token: int) -> BatchRouting:
  """A routing with a leading group axis, regrouped into `batch` sequences of `length` tokens."""
  regroup = lambda x: None if x is None else x.reshape(batch, length, -1)
  return BatchRouting(
    logits_BLE=regroup(routing.logits_TE),
    log_scores_BLE=regroup(routing.log_scores_TE),
    selected_BLE=regroup(jax.lax.stop_gradient(jax.vmap(selected_experts)(routing))),
    mask_BL=routing.mask_T.reshape(batch, length),
    group_size=routing.logits_TE.shape[-2],
    num_experts_per_token=num_experts_per_token,
    smooth_load_BLE=regroup(routing.smooth_load_TE),
    weights_BLE=regroup(jax.vmap(expert_weights)(routing)),  # compiled away where no balancer reads it
  )
