"""Routers: modules that decide which experts a token is sent to. `ROUTERS` has all of them by name.

A method whose logits are one matrix product is a pure choice in `moe_jax.ops.routing`. A method with other
parameters is a module in this package.
"""

from moe_jax.nn.routers.base import Router, project, top_k
from moe_jax.nn.routers.gpt_oss import GptOssTopK
from moe_jax.nn.routers.linear import Linear, LinearRouter
from moe_jax.nn.routers.merged import MergedTopK
from moe_jax.nn.routers.noisy import HierarchicalTopK, NoisyTopK
from moe_jax.nn.routers.nonlinear import CosineTopK, Gemma4TopK, MLPTopK
from moe_jax.nn.routers.task import TaskLevel
from moe_jax.nn.routers.zero_computation import BaseAssignment, LongCatTopK, MoEPlusPlus
from moe_jax.ops.routing import CHOICES
from moe_jax.registry import Registry

ROUTERS = Registry(
  "router",
  {name: Linear(choice) for name, choice in CHOICES.items()}
  | {
    "noisy_topk": NoisyTopK,
    "hierarchical_topk": HierarchicalTopK,
    "task_level": TaskLevel,
    "moe_plus_plus": MoEPlusPlus,
    "longcat_topk": LongCatTopK,
    "base_assignment": BaseAssignment,
    "cosine_topk": CosineTopK,
    "mlp_topk": MLPTopK,
    "gemma4_topk": Gemma4TopK,
    "gpt_oss_topk": GptOssTopK,
    "merged_topk": MergedTopK,
  },
  offered=("dim", "num_experts", "num_experts_per_token", "init_scale", "rngs"),
  wraps="router",
)

__all__ = ["ROUTERS", "Linear", "LinearRouter", "Router", "project", "top_k"]
