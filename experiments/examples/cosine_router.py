"""A router of your own with a learned temperature, in your own file.

python experiments/load_balancing.py --plugins=experiments/examples/cosine_router.py --router=cosine:temperature=0.1
"""

import jax.numpy as jnp

import moe_jax


class CosineRouter(moe_jax.Router):
  """Logits are cosines of token and expert, divided by a learned temperature (X-MoE, 2204.09179)."""

  def __init__(self, dim, num_experts, num_experts_per_token, *, temperature: float = 0.07, rngs):
    self.k = num_experts_per_token
    self.w_DE = moe_jax.matrix(rngs, (dim, num_experts), ("embed", "router"))
    self.temperature = moe_jax.vector(jnp.float32(temperature), ())

  def __call__(self, x_GTD, context):
    unit = lambda x, axis: x / jnp.linalg.norm(x, axis=axis, keepdims=True)
    logits_GTE = moe_jax.project(unit(x_GTD, -1), unit(self.w_DE[...], 0)) / self.temperature[...]
    return moe_jax.top_k(logits_GTE, self.k, context)


moe_jax.register("router", "cosine", CosineRouter)
