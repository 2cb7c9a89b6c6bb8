"""Token rounding (SonicMoE, 2512.14080): every expert gets a multiple of a tile of tokens."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.ops.routing.topk import weigh
from moe_jax.types import Array, Assignment, RouterContext, Routing

ROUNDS = {  # how to round tokens / tile
  "nearest": jnp.round,  # half to even
  "up": jnp.ceil,
  "down": jnp.floor,
}


def token_rounding(
  num_experts: int, num_experts_per_token: int, tile: int = 16, to: str = "nearest"
) -> Choice:
  """Softmax top-k, then the tokens of each expert are rounded to a multiple of `tile` (2512.14080).

  A grouped product on a GPU works on tiles of rows, and pads the last one of each expert. Here no tile is padded.
  First, each token takes its K best experts, with weights that sum to 1. Then an expert with too many tokens drops
  those to which it gives the smallest weights, and one with too few adds the tokens with the highest scores among
  those that did not choose it. The weight of an added token is its plain score, not divided by anything. This is the
  released code (Dao-AILab/sonic-moe, benchmarks/moe-token-rounding.py, where the tile has 128 rows and the group is a
  whole micro-batch). The paper was not re-read.

  The assignment has the K choices of every token, token after token, then the added tokens, expert after expert. So
  capacity drops added tokens first. With a capacity, counts are no longer multiples of the tile: use a dispatcher
  that never drops. Rounding is within a routing group. A group should have many more tokens than a tile times E/K,
  or rounding moves much of its load; with one sequence per group, `group_size` makes it larger.

  Two things are ours, because the released code has no padding and tiles that divide the tokens: padding does not
  count, and an expert that cannot be rounded up, for want of further valid tokens, is rounded down.

  Leaks the future: whether an expert keeps or adds a token depends on the scores of all others.

  Args:
    tile: the number of tokens that counts are a multiple of.
    to: nearest, up or down. `nearest` rounds halves to even multiples, as the released code does.

  Raises:
    InputError: if `tile` is below 1, or `to` is unknown.
  """
  require_option("router token_rounding", "to", to, tuple(ROUNDS))
  if tile < 1:
    raise InputError(f"router token_rounding: tile must be at least 1, got {tile}")

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    num_tokens = logits_TE.shape[0]
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, context.bias_E, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize=True, scale=1.0)

    order_TE, count_E = _ranked(scores_TE, expert_TK, weight_TK, context.mask)
    most = jnp.sum(context.mask) // tile * tile
    rounded_E = jnp.minimum((ROUNDS[to](count_E / tile) * tile).astype(jnp.int32), most)

    rank_TE = jnp.argsort(order_TE, axis=0)  # the place of a token in an expert's order
    kept_TK = take_experts(rank_TE, expert_TK) < take_experts(rounded_E[None], expert_TK)
    chosen = token_major(expert_TK, weight_TK, context.mask, kept_TK)
    added = _added(scores_TE, order_TE, count_E, rounded_E, min(_most_added(tile, to), num_tokens))
    assignment = jax.tree.map(lambda *fields: jnp.concatenate(fields), chosen, added)
    return Routing(logits_TE, log_scores_TE, context.mask, assignment)

  return Choice(choose, leaks="always", fewest=0, replays=False)


def _ranked(scores_TE: Array, expert_TK: Array, weight_TK: Array, mask_T: Array) -> tuple[Array, Array]:
  """The tokens in the order in which each expert wants them [T, E], and how many chose it [E].

  First those that chose it, by weight, then the others, by score, then padding. Equal ones by index. No gradient.
  """
  is_chosen_TKE = expert_TK[:, :, None] == jnp.arange(scores_TE.shape[-1])[None, None]
  is_chosen_TE = is_chosen_TKE.any(axis=1) & mask_T[:, None]
  weight_TE = jnp.sum(jnp.where(is_chosen_TKE, weight_TK[:, :, None], 0), axis=1)
  wanted_TE = jnp.where(is_chosen_TE, weight_TE, jnp.where(mask_T[:, None], scores_TE - 2, -jnp.inf))
  order_TE = jnp.argsort(-jax.lax.stop_gradient(wanted_TE), axis=0, stable=True)
  return order_TE.astype(jnp.int32), is_chosen_TE.sum(axis=0)


def _most_added(tile: int, to: str) -> int:
  """How many tokens an expert can add at most."""
  return {"nearest": tile // 2, "up": tile - 1, "down": 0}[to]


def _added(scores_TE: Array, order_TE: Array, count_E: Array, rounded_E: Array, most: int) -> Assignment:
  """The tokens that each expert adds to those that chose it, best first: `most` entries for each, [E * most]."""
  num_tokens, num_experts = scores_TE.shape
  place_EX = count_E[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
  token_EX = jnp.take_along_axis(order_TE.T, jnp.minimum(place_EX, num_tokens - 1), axis=1)
  return Assignment(
    token_A=token_EX.reshape(-1),
    expert_A=jnp.repeat(jnp.arange(num_experts, dtype=jnp.int32), most),
    weight_A=jnp.take_along_axis(scores_TE.T, token_EX, axis=1).reshape(-1),
    valid_A=(place_EX < rounded_E[:, None]).reshape(-1),
  )
