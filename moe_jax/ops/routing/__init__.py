"""Routers: router logits of one group -> `Routing`. One factory per method, one file per family."""

from moe_jax.ops.methods import build
from moe_jax.ops.routing.common import Router, selected_experts, to_batch
from moe_jax.ops.routing.gshard import gshard_top2
from moe_jax.ops.routing.topk import sigmoid_topk, softmax_topk, switch_top1

ROUTERS = {
  "softmax_topk": softmax_topk,
  "sigmoid_topk": sigmoid_topk,
  "switch_top1": switch_top1,
  "gshard_top2": gshard_top2,
}


def make_router(spec: str, num_experts: int, num_experts_per_token: int) -> Router:
  """`"sigmoid_topk:normalize=true"` -> router."""
  return build("router", ROUTERS, spec, num_experts, num_experts_per_token)


__all__ = ["ROUTERS", "Router", "make_router", "selected_experts", "to_batch"]
