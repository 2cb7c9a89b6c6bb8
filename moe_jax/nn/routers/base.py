"""The contract of a router."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.ops.routing.common import in_groups
from moe_jax.ops.routing.topk import softmax_topk
from moe_jax.types import Array, RouterContext, Routing


class Router(nnx.Module):
  """Decides where tokens go, with whatever parameters it needs: `routing = router(x_GTD, context)`.

  x_GTD: float32, G groups of T tokens. context: a `RouterContext` of all groups. Each field of the routing has a
  leading G. What a model must know beforehand are attributes, with safe defaults:

  leaks: whether the choice for a token depends on later tokens of its sequence: "" never, "drops" only where
    capacity drops assignments, "always" otherwise. A causal model refuses the latter two.
  takes_bias: False where there is no choice that a balancer's bias could move.
  gives_smooth_load: fills in `Routing.smooth_load_TE`.
  whole_sequences: needs groups of whole sequences.
  num_tasks: domains that it knows; 0: it reads none.
  num_scored_experts: experts that its logits score; None: the layer's. More, where it serves some itself
    (`Routing.direct_TD`).
  """

  leaks: str = ""
  takes_bias: bool = True
  gives_smooth_load: bool = False
  whole_sequences: bool = False
  num_tasks: int = 0
  num_scored_experts: int | None = None

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    raise NotImplementedError

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> Routing | None:
    """The routing that follows from recorded logits; None where they do not suffice."""
    del logits_GTE, context
    return None


def project(x_GTD: Array, w_DE: Array) -> Array:
  """Full float32 products also where the accelerator's default is lower: a rounded logit flips a choice."""
  return jnp.einsum("GTD,DE->GTE", x_GTD, w_DE, precision=jax.lax.Precision.HIGHEST)


def top_k(logits_GTE: Array, num_experts_per_token: int, context: RouterContext) -> Routing:
  """The plain choice, for a router of your own: the K experts with the highest softmax (with bias), weighted by the
  softmax over the K chosen logits (2401.04088)."""
  choice = softmax_topk(logits_GTE.shape[-1], num_experts_per_token)
  return in_groups(choice.choose, logits_GTE, context=context)
