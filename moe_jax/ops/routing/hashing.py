"""Routers with a fixed table from vocabulary ids to K experts. Nothing about the choice is learned.

A table is an array `table_VK` of experts with one row per vocabulary id. The two routers with a name make
theirs from a seed. Any other table, such as one balanced over a text or one read from a checkpoint, goes to
`table_topk`.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, require, token_major
from moe_jax.ops.routing.topk import LOG_SCORES, weigh
from moe_jax.types import Array, RouterContext, Routing


def hash_topk(
  num_experts: int, num_experts_per_token: int, kind: str = "random", seed: int = 0, vocab_size: int = 32768
) -> Choice:
  """Hash layers (2106.04426): the token's vocabulary id chooses, and each of the K experts has weight 1/K.

  The paper has K = 1, so its weight is 1. The values of the logits are ignored and get no gradient.

  Args:
    kind: `random`: every id gets K random experts. `even`: all experts get equally many ids. The paper's
      "balanced" hash counts tokens instead of ids: use `table_topk` with a `balanced_table`.
    seed: seed of the table, which is the same in every layer.
    vocab_size: V, the rows of the table. An id outside [0, V) takes the row of its remainder by V.
  """
  table_VK = _table_from_seed(kind, num_experts, num_experts_per_token, seed, vocab_size)
  return table_topk(table_VK, num_experts, _log_uniform)


def frozen_table_topk(
  num_experts: int,
  num_experts_per_token: int,
  kind: str = "random",
  seed: int = 0,
  vocab_size: int = 32768,
  score: str = "sqrt_softplus",
  normalize: bool = True,
  scale: float = 1.0,
) -> Choice:
  """The first layers of DeepSeek-V4 (2606.19348, section 2.1): a fixed table chooses, a learned score weighs.

  Args:
    kind, seed, vocab_size: the table, as for `hash_topk`. How the released one was made is not published.
    score: softmax, sigmoid or sqrt_softplus of the logits.
    normalize: divide the scores of the K experts by their sum.
    scale: multiplies the weights; 1.5 in the released V4-Flash, 2.5 in V4-Pro.
  """
  require_option("router frozen_table_topk", "score", score, tuple(LOG_SCORES))
  table_VK = _table_from_seed(kind, num_experts, num_experts_per_token, seed, vocab_size)
  return table_topk(table_VK, num_experts, LOG_SCORES[score], normalize, scale)


def table_topk(
  table_VK: np.ndarray,
  num_experts: int,
  log_score: Callable[[Array], Array],
  normalize: bool = True,
  scale: float = 1.0,
) -> Choice:
  """A choice by a given table. It reads `context.token_id`.

  Args:
    table_VK: ints in [0, E), the K different experts of every vocabulary id. It is copied. An id outside
      [0, V) takes the row of its remainder by V, so there are no unknown tokens.
    log_score: maps logits_TE to log_scores_TE, which give the weights.
    normalize: divide the scores of the K experts by their sum.
    scale: multiplies the weights.

  Raises:
    InputError: the table names an expert that does not exist, or one expert twice in a row.
  """
  table_VK = _checked(table_VK, num_experts)

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    token_id_T = require(context.token_id, "router by table", "token ids")
    log_scores_TE = log_score(logits_TE)
    expert_TK = jnp.asarray(table_VK)[jnp.mod(token_id_T, len(table_VK))]
    weight_TK = weigh(log_scores_TE, expert_TK, normalize, scale)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose, takes_bias=False)


def random_table(vocab_size: int, num_experts: int, k: int, seed: int) -> np.ndarray:
  """[V, K] int32: K different experts for every id, each set equally likely."""
  # numpy promises that the numbers of RandomState never change: a checkpoint keeps its table.
  random = np.random.RandomState(seed)
  table_VK = np.zeros((vocab_size, k), np.int32)
  for i in range(k):
    # A place among the E - i experts that the row does not have yet, counted up past those that it has.
    expert_V = random.randint(0, num_experts - i, size=vocab_size, dtype=np.int64)
    for taken_V in np.sort(table_VK[:, :i], axis=1).T:
      expert_V += expert_V >= taken_V
    table_VK[:, i] = expert_V
  return table_VK


def balanced_table(counts_V: np.ndarray, num_experts: int, k: int, seed: int) -> np.ndarray:
  """[V, K] int32: a table that balances the experts over a text (the balanced hash of 2106.04426).

  Greedy: the most frequent id first, each to the K experts that have the fewest tokens so far; ties are drawn.
  An id that makes up more than K/E of the text cannot be balanced by any table.

  Args:
    counts_V: how often each id is in the text. Ids with 0 are spread evenly by number.
  """
  counts_V = np.asarray(counts_V, np.float64)
  random = np.random.RandomState(seed)
  table_VK = np.zeros((len(counts_V), k), np.int32)
  num_tokens_E = np.zeros(num_experts)
  num_ids_E = np.zeros(num_experts)
  for v in np.argsort(-counts_V, kind="stable"):
    load_E = num_tokens_E if counts_V[v] > 0 else num_ids_E
    expert_K = np.lexsort((random.random_sample(num_experts), load_E))[:k]
    num_tokens_E[expert_K] += counts_V[v]
    num_ids_E[expert_K] += 1
    table_VK[v] = expert_K
  return table_VK


def _log_uniform(logits_TE: Array) -> Array:
  """Scores of 1/E: the router prefers no expert."""
  return jnp.full_like(logits_TE, -np.log(logits_TE.shape[-1]))


@functools.lru_cache(maxsize=32)  # a model asks for its router many times
def _table_from_seed(kind: str, num_experts: int, k: int, seed: int, vocab_size: int) -> np.ndarray:
  require_option("router by table", "kind", kind, ("random", "even"))
  if vocab_size < 1:
    raise InputError(f"router by table: vocab_size={vocab_size} must be at least 1")
  if not 0 <= seed < 2**32:
    raise InputError(f"router by table: seed={seed} must be in [0, 2^32)")
  if kind == "even":
    return balanced_table(np.ones(vocab_size), num_experts, k, seed)
  return random_table(vocab_size, num_experts, k, seed)


def _checked(table_VK: np.ndarray, num_experts: int) -> np.ndarray:
  table_VK = np.array(table_VK, np.int32)
  if table_VK.ndim != 2 or 0 in table_VK.shape:
    raise InputError(f"table_VK: must have one row of K experts per vocabulary id, got {table_VK.shape}")
  if table_VK.min() < 0 or table_VK.max() >= num_experts:
    raise InputError(
      f"table_VK: experts must be in [0, {num_experts}), got {table_VK.min()} to {table_VK.max()}"
    )
  sorted_VK = np.sort(table_VK, axis=1)
  twice_V = np.flatnonzero((sorted_VK[:, 1:] == sorted_VK[:, :-1]).any(axis=1))
  if len(twice_V):
    raise InputError(f"table_VK: row {twice_V[0]} names an expert twice: {table_VK[twice_V[0]].tolist()}")
  return table_VK
