"""The router of gpt-oss."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.linear import LinearRouter
from moe_jax.nn.variables import vector
from moe_jax.ops.routing.topk import softmax_topk
from moe_jax.types import Array


class GptOssTopK(LinearRouter):
  """The router of gpt-oss (2508.10925, and the released code): logits x W + b, and the softmax over the K largest.

  b is a parameter that the loss trains and that is a part of every logit, unlike the bias of a balancer. It starts
  at 0.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      softmax_topk(num_experts, num_experts_per_token), dim, num_experts, init_scale, rngs=rngs
    )
    self.b_router_E = vector(jnp.zeros(num_experts), ("router",))

  def logits(self, x_GTD: Array) -> Array:
    return super().logits(x_GTD) + self.b_router_E[...][None, None]
