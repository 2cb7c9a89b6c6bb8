"""Choices: router logits of one group -> `Routing`. One factory per method, one file per family.

`moe_jax.nn.routers` gives them their projections.
"""

from moe_jax.ops.once import made_once
from moe_jax.ops.routing.base_assignment import base_assignment
from moe_jax.ops.routing.common import Choice, selected_experts, to_batch
from moe_jax.ops.routing.expert_choice import expert_choice
from moe_jax.ops.routing.gshard import gshard_top2
from moe_jax.ops.routing.hashing import frozen_table_topk, hash_topk
from moe_jax.ops.routing.hierarchical import hierarchical_topk
from moe_jax.ops.routing.limited import (
  device_limited_topk,
  group_limited_topk,
  grouped_topk,
  node_limited_topk,
)
from moe_jax.ops.routing.noisy import noisy_topk, vmoe_topk
from moe_jax.ops.routing.prioritized import batch_prioritized
from moe_jax.ops.routing.quantile import quantile_topk
from moe_jax.ops.routing.remoe import remoe
from moe_jax.ops.routing.sinkhorn import sinkhorn
from moe_jax.ops.routing.st_moe import st_moe_topn
from moe_jax.ops.routing.task import sequence_level, task_level
from moe_jax.ops.routing.threshold import expert_threshold
from moe_jax.ops.routing.token_rounding import token_rounding
from moe_jax.ops.routing.top_p import top_p
from moe_jax.ops.routing.topk import (
  llama4_topk,
  sigmoid_topk,
  softmax_topk,
  sqrt_softplus_topk,
  switch_top1,
)
from moe_jax.ops.routing.topology import topology_aware_topk
from moe_jax.ops.routing.zero_computation import longcat_topk, moe_plus_plus
from moe_jax.registry import Registry, Spec

CHOICES = Registry(
  "router",
  {
    "softmax_topk": softmax_topk,
    "sigmoid_topk": sigmoid_topk,
    "sqrt_softplus_topk": sqrt_softplus_topk,
    "switch_top1": switch_top1,
    "llama4_topk": llama4_topk,
    "gshard_top2": gshard_top2,
    "noisy_topk": noisy_topk,
    "vmoe_topk": vmoe_topk,
    "hierarchical_topk": hierarchical_topk,
    "st_moe_topn": st_moe_topn,
    "top_p": top_p,
    "remoe": remoe,
    "task_level": task_level,
    "sequence_level": sequence_level,
    "moe_plus_plus": moe_plus_plus,
    "longcat_topk": longcat_topk,
    "group_limited_topk": group_limited_topk,
    "device_limited_topk": device_limited_topk,
    "node_limited_topk": node_limited_topk,
    "grouped_topk": grouped_topk,
    "topology_aware_topk": topology_aware_topk,
    "hash_topk": hash_topk,
    "frozen_table_topk": frozen_table_topk,
    "batch_prioritized": batch_prioritized,
    "expert_choice": expert_choice,
    "expert_threshold": expert_threshold,
    "token_rounding": token_rounding,
    "base_assignment": base_assignment,
    "sinkhorn": sinkhorn,
    "quantile_topk": quantile_topk,
  },
  offered=("num_experts", "num_experts_per_token"),
)


def make_choice(spec: Spec, num_experts: int, num_experts_per_token: int) -> Choice:
  """`"sigmoid_topk:normalize=true"` -> its choice."""
  sizes = {"num_experts": num_experts, "num_experts_per_token": num_experts_per_token}
  return made_once(CHOICES.resolve(spec), **sizes)


__all__ = ["CHOICES", "Choice", "make_choice", "selected_experts", "to_batch"]
