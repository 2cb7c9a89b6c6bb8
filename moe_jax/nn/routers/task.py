"""Task-level routing: the logits are a learned row per domain (2110.03742)."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.base import Router
from moe_jax.nn.variables import matrix
from moe_jax.ops.routing.common import in_groups, require
from moe_jax.ops.routing.task import task_level
from moe_jax.types import Array, RouterContext, Routing


class TaskLevel(Router):
  """Task-level routing (2110.03742, section 3.1): the experts of a token follow from the domain of its text."""

  def __init__(
    self,
    num_experts: int,
    num_experts_per_token: int,
    *,
    tasks: int = 16,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    choice = task_level(num_experts, num_experts_per_token, tasks)
    self.choose, self.num_tasks = choice.choose, tasks
    self.w_task_SE = matrix(rngs, (tasks, num_experts), ("task", "router"), init_scale)

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    domain_GT = require(context.domain, "router task_level", "the domain of each sequence")
    # Of a domain without a row, NaN: indexing would take the last one.
    logits_GTE = jnp.asarray(self.w_task_SE[...]).at[domain_GT].get(mode="fill", fill_value=jnp.nan)
    return in_groups(self.choose, logits_GTE, context=context)
