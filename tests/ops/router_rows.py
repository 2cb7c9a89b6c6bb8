"""The laws table of routers: one row per method and option that changes what it computes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.reference import batch_routing, limited_routing, noisy_routing, table_routing, variable_routing
from tests.reference import routing as reference

T = 12  # tokens of a group in the laws


def uniform_per_token(key):
  return np.asarray(jax.random.uniform(key, (T,)))


def uniform_per_further_choice(key):
  return np.asarray(jax.random.uniform(key, (T, 2)))


def four_sequences(seed):
  """Which of four sequences each token belongs to; their lengths depend on the seed."""
  lengths = [3, 3, 3, 3] if seed % 2 == 0 else [1, 5, 2, 4]
  return {"sequence_T": np.repeat(np.arange(4, dtype=np.int32), lengths)}


def normals(*widths):
  """key -> standard normal noise [T, width]; for several widths a tuple, each from its own key."""

  def draw(key):
    keys = [key] if len(widths) == 1 else jax.random.split(key, len(widths))
    drawn = [np.asarray(jax.random.normal(k, (T, width))) for k, width in zip(keys, widths)]
    return drawn[0] if len(widths) == 1 else tuple(drawn)

  return draw


def side_logits(width):
  return lambda seed: {
    "side_logits_TX": np.random.default_rng(seed + 50).normal(size=(T, width)).astype(np.float32)
  }


def twenty_ids(seed):
  """Vocabulary ids in [0, 20), for tables with fewer rows too."""
  return {"token_id_T": np.random.default_rng(seed + 50).integers(0, 20, T).astype(np.int32)}


def in_training(seed):
  return {"train": True}


def in_evaluation(seed):
  return {"train": False}


class Row(NamedTuple):
  """One router under test.

  `reference(logits_TE, k, bias_E, mask_T, draw, **further)` is a slow loop in float64 that gives a list of
  `reference.Entry`, in priority order. `bias_E` is an array of zeros where there is no bias, and `draw` is None
  where the router got no key.
  """

  spec: str
  num_experts: int
  k: int
  reference: Callable
  score: Callable = reference.softmax  # logits_E -> scores_E, a list of floats
  draw: Callable | None = None  # key -> the random numbers that the router draws from it, as numpy
  draws_per_expert: bool = (
    False  # what is drawn belongs to experts, so experts cannot be permuted under a key
  )
  leaks: str = ""  # as the router declares it
  leak_found: str | None = None  # what the laws find, where that is less: in evaluation
  further: Callable[[int], dict[str, Any]] = lambda seed: {}  # seed -> the router's further arguments
  takes_bias: bool = True
  bias_decides: bool = True  # an overwhelming bias brings its expert to every token
  own_weights: bool = False  # a weight does not depend on which other experts the token has
  permutable: bool = True  # experts have no order or groups
  exact_ties: bool = True  # equal scores go to the lower index
  differentiable: bool = True  # weights depend on the logits


ROWS = {
  "softmax_topk": Row("softmax_topk", 6, 2, reference.softmax_topk),
  "softmax_before": Row("softmax_topk:softmax=before", 6, 3, reference.softmax_before_topk, own_weights=True),
  "every_expert": Row("softmax_topk:before", 3, 3, reference.softmax_before_topk, own_weights=True),
  "sigmoid_topk": Row("sigmoid_topk", 6, 2, reference.sigmoid_topk, reference.sigmoid, own_weights=True),
  "deepseek_v3": Row("sigmoid_topk:normalize=true:scale=2.5", 6, 2, reference.deepseek_v3, reference.sigmoid),
  "switch_top1": Row("switch_top1", 6, 1, reference.softmax_before_topk, own_weights=True),
  "gshard_top2": Row("gshard_top2", 6, 2, reference.gshard_top2, draw=uniform_per_token, leaks="drops"),
  "gshard_mesh": Row(
    "gshard_top2:threshold=0.2:slots=sent",
    6,
    2,
    variable_routing.mesh_top2,
    draw=uniform_per_token,
    leaks="drops",
  ),
  "noisy_topk": Row(
    "noisy_topk",
    6,
    2,
    noisy_routing.noisy_topk,
    draw=normals(6),
    draws_per_expert=True,
    further=side_logits(6),
    exact_ties=False,  # noise breaks them
  ),
  "vmoe_topk": Row(
    "vmoe_topk",
    6,
    2,
    noisy_routing.vmoe_topk,
    draw=normals(6),
    draws_per_expert=True,
    own_weights=True,
    exact_ties=False,
  ),
  "hierarchical_topk": Row(
    "hierarchical_topk:groups=3:groups_per_token=2",
    9,
    4,
    functools.partial(noisy_routing.hierarchical_topk, groups=3, groups_per_token=2),
    score=None,  # of the side logits too
    draw=normals(3, 9),
    draws_per_expert=True,
    further=side_logits(3 + 3 + 9),
    bias_decides=False,
    permutable=False,
    exact_ties=False,
  ),
  "hierarchical_without_noise": Row(
    "hierarchical_topk:2:1:none",
    6,
    2,
    functools.partial(noisy_routing.hierarchical_topk, groups=2, groups_per_token=1),
    score=None,
    further=side_logits(2),
    bias_decides=False,
    permutable=False,
  ),
  "st_moe_topn": Row(
    "st_moe_topn", 6, 3, variable_routing.st_moe_topn, draw=uniform_per_further_choice, leaks="drops"
  ),
  "st_moe_top1": Row("st_moe_topn", 6, 1, reference.softmax_topk, differentiable=False),
  "top_p": Row("top_p", 6, 3, variable_routing.top_p(0.4), own_weights=True),
  # K = E without taking every expert, which the law of the bias does not expect of other routers
  "top_p_unlimited": Row("top_p:0.8", 4, 4, variable_routing.top_p(0.8), bias_decides=False),
  "task_level": Row("task_level:3", 6, 2, reference.softmax_topk),
  "sequence_level": Row(
    "sequence_level",
    6,
    2,
    variable_routing.sequence_level,
    score=None,
    leaks="always",
    further=four_sequences,
  ),
  "moe_plus_plus": Row("moe_plus_plus", 4, 3, variable_routing.moe_plus_plus(4, 1), own_weights=True),
  "moe_plus_plus_normalized": Row(
    "moe_plus_plus:zeros=2:constants=1:normalize=true",
    4,
    3,
    variable_routing.moe_plus_plus(4, 2, normalize=True),
    permutable=False,  # the weights next to a zero expert are others
  ),
  "sqrt_softplus_topk": Row(
    "sqrt_softplus_topk", 6, 2, limited_routing.sqrt_softplus_topk, limited_routing.sqrt_softplus
  ),
  "sqrt_softplus_plain": Row(
    "sqrt_softplus_topk:normalize=false",
    6,
    3,
    functools.partial(limited_routing.sqrt_softplus_topk, normalize=False),
    limited_routing.sqrt_softplus,
    own_weights=True,
  ),
  "group_limited_topk": Row(
    "group_limited_topk:groups=2:groups_per_token=1:group_top=3:score=sqrt_softplus:normalize=false",
    8,
    3,
    functools.partial(
      limited_routing.group_limited, groups=2, groups_per_token=1, group_top=3, score="sqrt_softplus"
    ),
    limited_routing.sqrt_softplus,
    own_weights=True,
    permutable=False,
  ),
  "device_limited_topk": Row(
    "device_limited_topk:groups=4:groups_per_token=2:scale=1",
    8,
    3,
    functools.partial(
      limited_routing.group_limited, groups=4, groups_per_token=2, group_top=1, score="softmax"
    ),
    own_weights=True,
    permutable=False,
  ),
  "node_limited_topk": Row(
    "node_limited_topk:groups=3:groups_per_token=2",
    6,
    2,
    functools.partial(
      limited_routing.group_limited,
      groups=3,
      groups_per_token=2,
      group_top=2,
      score="sigmoid",
      normalize=True,
      scale=2.5,
    ),
    reference.sigmoid,
    permutable=False,
  ),
  "topology_aware_topk": Row(
    "topology_aware_topk:max_remote_fraction=0.4",
    6,
    2,
    functools.partial(limited_routing.topology_aware, nodes=2, fraction=0.4),
    leaks="always",
    bias_decides=False,
    permutable=False,
  ),
  "topology_local": Row(
    "topology_aware_topk:nodes=3:max_remote_fraction=0",
    6,
    2,
    functools.partial(limited_routing.topology_aware, nodes=3, fraction=0.0),
    bias_decides=False,
    permutable=False,
  ),
  "hash_topk": Row(
    "hash_topk:seed=3:vocab_size=16",
    6,
    3,
    functools.partial(table_routing.hash_topk, seed=3, vocab_size=16),
    table_routing.uniform,
    further=twenty_ids,
    takes_bias=False,
    permutable=False,
    differentiable=False,
  ),
  "frozen_table_topk": Row(
    "frozen_table_topk:vocab_size=16:scale=1.5",
    6,
    2,
    functools.partial(
      table_routing.frozen_table_topk, seed=0, vocab_size=16, score="sqrt_softplus", normalize=True, scale=1.5
    ),
    limited_routing.sqrt_softplus,
    further=twenty_ids,
    takes_bias=False,
    permutable=False,
  ),
  "batch_prioritized": Row(
    "batch_prioritized",
    6,
    2,
    batch_routing.batch_prioritized,
    leaks="drops",
    own_weights=True,
    exact_ties=False,
  ),
  "batch_prioritized_sum": Row(
    "batch_prioritized:priority=sum",
    6,
    3,
    functools.partial(batch_routing.batch_prioritized, priority="sum"),
    leaks="drops",
    own_weights=True,
    exact_ties=False,
  ),
  "expert_choice": Row(
    "expert_choice", 6, 2, batch_routing.expert_choice, leaks="always", takes_bias=False, exact_ties=False
  ),
  "expert_choice_uneven": Row(
    "expert_choice", 5, 2, batch_routing.expert_choice, leaks="always", takes_bias=False, exact_ties=False
  ),
  "base_assignment": Row(
    "base_assignment",
    6,
    1,
    batch_routing.base_assignment,
    reference.sigmoid,
    leaks="always",
    further=in_training,
    takes_bias=False,
    exact_ties=False,
  ),
  "base_assignment_evaluation": Row(
    "base_assignment:mix=true",
    6,
    1,
    batch_routing.base_assignment,
    reference.sigmoid,
    leaks="always",
    leak_found="",
    further=in_evaluation,
    takes_bias=False,
  ),
  "sinkhorn": Row(
    "sinkhorn",
    6,
    2,
    batch_routing.sinkhorn,
    leaks="always",
    further=in_training,
    takes_bias=False,
    exact_ties=False,
  ),
  "sinkhorn_top1": Row(
    "sinkhorn",
    6,
    1,
    batch_routing.sinkhorn_sigmoid,
    reference.sigmoid,
    leaks="always",
    further=in_training,
    takes_bias=False,
    exact_ties=False,
  ),
  "sinkhorn_evaluation": Row(
    "sinkhorn:score=sigmoid",
    6,
    2,
    batch_routing.sinkhorn_sigmoid,
    reference.sigmoid,
    leaks="always",
    leak_found="",
    further=in_evaluation,
    takes_bias=False,
  ),
  "quantile_topk": Row(
    "quantile_topk",
    6,
    2,
    batch_routing.quantile_topk,
    reference.sigmoid,
    leaks="always",
    takes_bias=False,
    exact_ties=False,
  ),
  "quantile_topk_softmax": Row(
    "quantile_topk:softmax:rounds=3:strength=0.5",
    6,
    2,
    batch_routing.quantile_topk_softmax,
    leaks="always",
    takes_bias=False,
    exact_ties=False,
  ),
}
