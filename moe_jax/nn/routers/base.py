"""The base class of routers, and pieces to build one from."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.ops.routing.common import in_groups
from moe_jax.ops.routing.topk import softmax_topk
from moe_jax.types import Array, RouterContext, Routing


class Router(nnx.Module):
  """A module that decides which experts a token is sent to: `routing = router(x_GTD, context)`.

  The input x_GTD is float32, with G groups of T tokens. `context` is a `RouterContext` of all groups. Every
  field of the returned `Routing` has a leading G. A router has any parameters that it needs, made by `moe_jax.matrix` and
  `moe_jax.vector`. What it changes in its forward pass is lost: state belongs to a balancer or a hook. The following
  attributes say what a model must know beforehand. Their defaults are those of a plain top-k router:

  leaks: whether the choice for a token depends on later tokens of its sequence: "" never, "drops" only if
    capacity drops assignments, "always" otherwise. A causal model refuses the last two.
  takes_bias: whether the bias of a balancer can change the choice.
  gives_smooth_load: whether the router sets `Routing.smooth_load_TE`.
  whole_sequences: whether groups must consist of whole sequences.
  num_tasks: the number of domains that the router distinguishes; 0: it does not read the domain.
  num_scored_experts: the number of experts that the logits score; None: the E experts of the layer. It
    exceeds E if the router serves some experts itself, with `Routing.direct_TD`.
  weighs: what the weights of the assignment multiply: the "output" of the experts, or their "input" (Llama 4).
  has_threshold: whether the router compares logits with the bias of balancer `expert_threshold`.
  sparse_weights: whether an expert is used where its weight is above 0, so that a loss on weights sets how many
    are used.
  most: the largest number of experts of a token; None: K.
  fewest: the smallest number of them in evaluation; None: K.
  replays: whether the router takes `context.routes` in place of its own choices.
  """

  leaks: str = ""
  takes_bias: bool = True
  gives_smooth_load: bool = False
  whole_sequences: bool = False
  num_tasks: int = 0
  num_scored_experts: int | None = None
  weighs: str = "output"
  has_threshold: bool = False
  sparse_weights: bool = False
  most: int | None = None
  fewest: int | None = None
  replays: bool = False

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    raise NotImplementedError

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> Routing | None:
    """Returns the routing for recorded logits, or None if the logits do not determine it."""
    del logits_GTE, context
    return None


def project(x_GTD: Array, w_DE: Array) -> Array:
  """Returns the logits x W [G, T, E], in full float32 precision on every device.

  A rounded logit can change a choice.
  """
  return jnp.einsum("GTD,DE->GTE", x_GTD, w_DE, precision=jax.lax.Precision.HIGHEST)


def top_k(logits_GTE: Array, num_experts_per_token: int, context: RouterContext) -> Routing:
  """Returns the usual routing for logits of your own: the K experts with the highest softmax score plus bias.

  The weights are the softmax over the K chosen logits, as in Mixtral (2401.04088).
  """
  choice = softmax_topk(logits_GTE.shape[-1], num_experts_per_token)
  return in_groups(choice.choose, logits_GTE, context=context)
