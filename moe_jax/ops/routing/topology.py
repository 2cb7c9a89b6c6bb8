"""FasterMoE's topology-aware router (He et al., PPoPP 2022): few tokens leave their node."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import (
  Choice,
  apply_bias,
  select_top_k,
  take_experts,
  token_major,
)
from moe_jax.ops.routing.topk import weigh
from moe_jax.types import Array, RouterContext, Routing


def topology_aware_topk(
  num_experts: int, num_experts_per_token: int, nodes: int = 2, max_remote_fraction: float = 0.14
) -> Choice:
  """Softmax top-k in which at most a fraction of each node's tokens uses experts of other nodes.

  Token t of a group of T is on node t * nodes // T, expert e on node e * nodes // E. Tokens that would use
  remote experts are ranked by the highest logit among those experts. In each node the first
  int(max_remote_fraction * tokens of the node) of them keep their choice; all others choose among the experts
  of their own node. The tokens of a node include its padding, since the limit is about what the network can
  carry.

  The paper lets a fraction W_net / (M * W_local) of a worker's tokens leave, where W_net and W_local are the
  bandwidths between nodes and within a node of M workers. The released code has 0.14. Both rank first choices,
  which for K = 1 is the same as here. For K = 2 the code sends a token that may leave to its first choice and
  to the best expert of its own node, and does not limit remote second choices where few first choices are
  remote. Here every remote choice counts, for every K. A routing group holds the tokens of all nodes, so it
  must not be cut by device.

  Leaks the future: whether a token may leave depends on all tokens of its node. Nothing is ranked, and nothing
  leaks, where the fraction is 0 or 1 or there is only one node.

  Args:
    nodes: P, equal parts of neighbouring tokens and experts.
    max_remote_fraction: in [0, 1].

  Raises:
    InputError: P does not divide E, a node has fewer than K experts, or a fraction outside [0, 1].
  """
  _check(num_experts, num_experts_per_token, nodes, max_remote_fraction)

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    biased_TE = apply_bias(jnp.exp(log_scores_TE), context.bias_E)
    node_T = np.arange(len(logits_TE)) * nodes // len(logits_TE)
    node_E = np.arange(num_experts) * nodes // num_experts
    is_local_TE = node_T[:, None] == node_E[None, :]

    free_TK = select_top_k(biased_TE, None, num_experts_per_token)
    local_TK = select_top_k(jnp.where(is_local_TE, biased_TE, -jnp.inf), None, num_experts_per_token)
    remote_logit_TK = take_experts(jnp.where(is_local_TE, -jnp.inf, logits_TE), free_TK)
    leaves_T = context.mask & jnp.any(jnp.asarray(node_E)[free_TK] != node_T[:, None], axis=-1)
    allowance_P = [int(max_remote_fraction * size) for size in np.bincount(node_T, minlength=nodes)]
    may_leave_T = leaves_T & (
      _rank_in_node(remote_logit_TK.max(axis=-1), leaves_T, node_T) < np.array(allowance_P)[node_T]
    )
    expert_TK = jnp.where(may_leave_T[:, None], free_TK, local_TK)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize=True, scale=1.0)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  ranks = nodes > 1 and 0 < max_remote_fraction < 1
  return Choice(choose, leaks="always" if ranks else "", replays=not ranks)


def _rank_in_node(score_T: Array, counts_T: Array, node_T: np.ndarray) -> Array:
  """Rank of each token that counts among those of its node, the highest score first, ties by position."""
  # Sorted by node, then by whether the token counts, then by score.
  order_T = jnp.lexsort((-jax.lax.stop_gradient(score_T), ~counts_T, jnp.asarray(node_T)))
  first_T = np.searchsorted(node_T, node_T)  # the first token of the same node
  return jnp.argsort(order_T) - first_T


def _check(num_experts: int, k: int, nodes: int, max_remote_fraction: float) -> None:
  if nodes < 1 or num_experts % nodes:
    raise InputError(
      f"router topology_aware_topk: nodes={nodes} must divide num_experts={num_experts} into equal parts"
    )
  if num_experts // nodes < k:
    raise InputError(
      f"router topology_aware_topk: the {num_experts // nodes} experts of a node (num_experts={num_experts}, "
      f"nodes={nodes}) are fewer than num_experts_per_token={k}, and a token must find K experts on its own node"
    )
  if not 0 <= max_remote_fraction <= 1:
    raise InputError(
      f"router topology_aware_topk: max_remote_fraction must be in [0, 1], got {max_remote_fraction}"
    )
