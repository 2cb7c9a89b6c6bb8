"""The router of a model whose experts were merged: it chooses as before, among more experts than there are."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.base import Router
from moe_jax.registry import Spec, inner_spec
from moe_jax.types import Array, RouterContext, Routing


class RouterTable(nnx.Variable):
  """Integers of a router that no gradient and no optimizer changes."""


class MergedTopK(Router):
  """The router `router` with `logits` logits, whose choices stand for E experts (as M-SMoE's, 2310.01334).

  A table says which expert each logit stands for. An expert gets the weights of all its logits, so merging equal
  experts changes nothing. Logits and scores of the routing are of experts: the logarithm of the sum over the logits of
  an expert. `moe_jax.adapt.merge` makes it.

  Args:
    router: a name with options behind `;`, e.g. sigmoid_topk;normalize=true.
    logits: of that router; 0: E, and the table is the identity.
  """

  takes_bias = False

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    router: Spec = "softmax_topk",
    logits: int = 0,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    from moe_jax.nn.routers import ROUTERS  # which has this module

    self.num_experts, num_logits = num_experts, max(logits, num_experts)
    sizes = {"dim": dim, "num_experts": num_logits, "num_experts_per_token": num_experts_per_token}
    self.router = ROUTERS.resolve(inner_spec(router))(**sizes, init_scale=init_scale, rngs=rngs)
    for name in ("leaks", "whole_sequences", "num_tasks", "weighs", "most"):
      setattr(self, name, getattr(self.router, name))
    # All choices of a token may stand for one expert.
    self.fewest = 1 if num_logits > num_experts else self.router.fewest
    self.expert_X = RouterTable(
      jnp.arange(num_logits, dtype=jnp.int32) % num_experts, logical_axes=("router",)
    )

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    routing = self.router(x_GTD, context._replace(bias_E=None))
    expert_X = self.expert_X[...]
    is_of_XE = expert_X[:, None] == jnp.arange(self.num_experts)[None]
    add = lambda x_GTX: jax.nn.logsumexp(jnp.where(is_of_XE, x_GTX[..., None], -jnp.inf), axis=-2)
    assignment = routing.assignment
    return routing._replace(
      logits_TE=add(routing.logits_TE),
      log_scores_TE=add(routing.log_scores_TE),
      assignment=assignment._replace(expert_A=expert_X[assignment.expert_A]),
      smooth_load_TE=None,
    )
