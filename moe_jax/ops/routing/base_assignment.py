"""BASE layers (2103.16716): in training, tokens and experts are matched by a balanced linear assignment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.types import Array, RouterContext, Routing


def base_assignment(num_experts: int, num_experts_per_token: int) -> Choice:
  """BASE (2103.16716): K = 1, equal numbers of tokens per expert in training, the best expert in evaluation.

  In training the assignment maximises the sum of logits among all assignments that give every expert n / E of
  the group's n valid tokens (rounded up or down where E does not divide n). `balanced_assignment` says how
  exact that is. In evaluation every token takes its largest logit. The weight is a = sigmoid(x . w_e).

  The published layer computes a E(x) + (1 - a) x, where the expert E(x) = x + F(norm(x)) contains a residual
  connection; together that is x + a F(norm(x)) (fairseq, base_layer.py). A transformer block of this package
  computes the same: its residual connection is around the layer, F is the expert, and a its weight. A layer
  without a residual connection around it needs the term (1 - a) x as well, which the router module adds with its
  option `mix`.

  Leaks the future in training: the expert of a token depends on all tokens of the group.

  Raises:
    InputError: K is not 1.
  """
  if num_experts_per_token != 1:
    raise InputError(f"num_experts_per_token={num_experts_per_token}: router base_assignment takes 1")

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    if context.train:
      expert_T = balanced_assignment(logits_TE, context.mask)
      expert_TK = jnp.where(context.mask, expert_T, 0)[:, None]
    else:
      expert_TK = select_top_k(logits_TE, None, 1)
    weight_TK = jax.nn.sigmoid(take_experts(logits_TE, expert_TK))
    assignment = token_major(expert_TK, weight_TK, context.mask)
    return Routing(logits_TE, jax.nn.log_sigmoid(logits_TE), context.mask, assignment)

  return Choice(choose, leaks="always", takes_bias=False)


class _Matching(NamedTuple):
  expert_T: Array  # int32, E for padding
  moves: Array  # int32, chains moved so far


NO_MOVE = -(2**30)  # the gain of a move that does not exist: below that of any chain of moves


def balanced_assignment(scores_TE: Array, mask_T: Array) -> Array:
  """The assignment of valid tokens to experts with the largest sum of scores under equal load. No gradient.

  Every token starts at its best expert. While an expert has more than ceil(n / E) tokens, the chain of moves
  that costs least is applied: this expert and each next one of the chain pass one token on, until an expert has
  room. Experts with less than floor(n / E) tokens are filled in the same way. These are successive shortest paths
  of a minimum-cost flow, so the result is optimal. (The published code, fairseq's balanced_assignment.cpp, is an
  auction. It bids in steps of at least 1/50 of the range of the scores and changes to a cruder rule after 100
  rounds, so it is balanced but only near the optimum.)

  The search is exact in integers: scores less the token's best are rounded to range / (2^29 / E). The sum is
  within n times that of the optimum, which is as fine as float32 itself up to 32 experts. There are at most 2 n
  chains, each found in at most E steps of size E^2, so every loop is bounded.

  Args:
    scores_TE: float32.
    mask_T: bool, False for padding, which takes no place.

  Returns:
    int32 [T], in [0, E); E for padding.
  """
  num_tokens, num_experts = scores_TE.shape
  cost_TE = _integer_scores(jax.lax.stop_gradient(scores_TE), mask_T)
  num_valid = jnp.sum(mask_T)
  floor, ceil = num_valid // num_experts, -(-num_valid // num_experts)

  def load(expert_T):
    return jnp.sum(expert_T[:, None] == jnp.arange(num_experts)[None], axis=0)

  def goes_on(matching):
    load_E = load(matching.expert_T)
    return jnp.any((load_E > ceil) | (load_E < floor)) & (matching.moves < 2 * num_tokens)

  def move(matching):
    load_E = load(matching.expert_T)
    too_many = jnp.any(load_E > ceil)
    gives_E = jnp.where(too_many, load_E > ceil, load_E > floor)
    takes_E = jnp.where(too_many, load_E < ceil, load_E < floor)
    gain_E, previous_E = _best_chains(_move_gains(cost_TE, matching.expert_T), gives_E)
    end = jnp.argmax(jnp.where(takes_E, gain_E, 2 * NO_MOVE))
    return _Matching(_pass_along(cost_TE, matching.expert_T, previous_E, end), matching.moves + 1)

  greedy_T = jnp.where(mask_T, jnp.argmax(cost_TE, axis=-1), num_experts).astype(jnp.int32)
  return jax.lax.while_loop(goes_on, move, _Matching(greedy_T, jnp.int32(0))).expert_T


def _integer_scores(scores_TE: Array, mask_T: Array) -> Array:
  """int32 scores less the token's best, at most 0, such that sums over E experts stay above NO_MOVE / 2."""
  below_best_TE = scores_TE - jnp.max(scores_TE, axis=-1, keepdims=True)
  below_best_TE = jnp.where(mask_T[:, None], below_best_TE, 0)
  widest = jnp.maximum(-jnp.min(below_best_TE), jnp.finfo(jnp.float32).tiny)
  levels = 2**29 // scores_TE.shape[-1]
  return jnp.round(below_best_TE / widest * levels).astype(jnp.int32)


def _move_gains(cost_TE: Array, expert_T: Array) -> Array:
  """gain_EE[e, f]: the best change of the sum of scores by moving one token from expert e to f."""
  num_experts = cost_TE.shape[-1]
  own_T = jnp.max(jnp.where(expert_T[:, None] == jnp.arange(num_experts)[None], cost_TE, NO_MOVE), axis=-1)
  change_TE = cost_TE - own_T[:, None]
  by_expert_EE = jax.ops.segment_max(change_TE, expert_T, num_segments=num_experts + 1)[:num_experts]
  return jnp.maximum(by_expert_EE, NO_MOVE)


def _best_chains(gain_EE: Array, gives_E: Array) -> tuple[Array, Array]:
  """Bellman-Ford: the best gain of a chain of moves to every expert from one that gives, and its last step.

  Integers, and no cycle of moves gains anything (the matching is optimal for its loads), so an expert's chain
  never returns to it.
  """
  num_experts = gives_E.shape[0]

  def goes_on(carry):
    *_, changed, i = carry
    return changed & (i < num_experts)

  def step(carry):
    gain_E, previous_E, _, i = carry
    reached_EE = jnp.where(
      (gain_E[:, None] > NO_MOVE) & (gain_EE > NO_MOVE), gain_E[:, None] + gain_EE, NO_MOVE
    )
    best_E = jnp.max(reached_EE, axis=0)
    better_E = best_E > gain_E
    previous_E = jnp.where(better_E, jnp.argmax(reached_EE, axis=0).astype(jnp.int32), previous_E)
    return jnp.where(better_E, best_E, gain_E), previous_E, jnp.any(better_E), i + 1

  start_E = jnp.where(gives_E, 0, NO_MOVE).astype(jnp.int32)
  itself_E = jnp.arange(num_experts, dtype=jnp.int32)
  gain_E, previous_E, _, _ = jax.lax.while_loop(goes_on, step, (start_E, itself_E, jnp.bool_(True), 0))
  return gain_E, previous_E


def _pass_along(cost_TE: Array, expert_T: Array, previous_E: Array, end: Array) -> Array:
  """Moves one token along every step of the chain that ends at expert `end`, the last step first."""
  num_experts = cost_TE.shape[-1]

  def goes_on(carry):
    _, expert, i = carry
    return (previous_E[expert] != expert) & (i < num_experts)

  def step(carry):
    expert_T, expert, i = carry
    giver = previous_E[expert]
    change_T = jnp.where(expert_T == giver, cost_TE[:, expert] - cost_TE[:, giver], 2 * NO_MOVE)
    is_moved_T = jnp.arange(expert_T.shape[0]) == jnp.argmax(change_T)
    return jnp.where(is_moved_T, expert, expert_T), giver, i + 1

  return jax.lax.while_loop(goes_on, step, (expert_T, end.astype(jnp.int32), 0))[0]
