"""Routers that are logits and a pure choice. Mostly, the logits are one matrix product."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from moe_jax.nn.routers.base import Router, project
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.once import made_once
from moe_jax.ops.routing.common import Choice, in_groups
from moe_jax.sharding import constrain
from moe_jax.types import Array, RouterContext, Routing


class ChoiceRouter(Router):
  """A router whose `choice` decides from logits alone. Subclasses say what the logits are."""

  def __init__(self, choice: Choice):
    self.choose = choice.choose
    self.leaks, self.takes_bias = choice.leaks, choice.takes_bias
    self.gives_smooth_load, self.whole_sequences = choice.gives_smooth_load, choice.whole_sequences
    self.weighs, self.has_threshold = choice.weighs, choice.has_threshold
    self.sparse_weights, self.most, self.fewest = choice.sparse_weights, choice.most, choice.fewest
    # A choice that a bias moves is a top-k of scores, and choices that are given stand for the bias.
    by_bias = choice.takes_bias and not choice.has_threshold and not choice.sparse_weights
    self.replays = by_bias and choice.replays

  def logits(self, x_GTD: Array) -> Array:
    """Returns logits_GTE in float32."""
    raise NotImplementedError

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    return self.from_logits(self.logits(x_GTD), context)

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> Routing | None:
    return in_groups(self.choose, logits_GTE, context=context)


class LinearRouter(ChoiceRouter):
  """A router with logits = x W, followed by `choice`. Subclasses add parameters."""

  def __init__(self, choice: Choice, dim: int, num_logits: int, init_scale: float, *, rngs: nnx.Rngs):
    super().__init__(choice)
    self.w_router_DE = matrix(rngs, (dim, num_logits), ("embed", "router"), init_scale, zero=choice.zero_init)

  def logits(self, x_GTD: Array) -> Array:
    return constrain(project(x_GTD, weight(self.w_router_DE)), ("group", None, None))


@dataclasses.dataclass(frozen=True)
class Linear:
  """Makes a router factory of a choice: `Linear(softmax_topk)(dim=..., num_experts=..., ...)` is a router."""

  choice: Callable[..., Choice]

  def __call__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> LinearRouter:
    choice = made_once(self.choice, num_experts, num_experts_per_token, **options)
    return LinearRouter(choice, dim, num_experts, init_scale, rngs=rngs)

  @property
  def __wrapped__(self) -> Callable[..., Choice]:
    return self.choice

  @property
  def __signature__(self) -> inspect.Signature:
    own = list(inspect.signature(type(self).__call__).parameters.values())[1:-1]  # without self and options
    options = list(inspect.signature(self.choice).parameters.values())[2:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    by_name = [p.replace(kind=keyword) for p in (*own[3:], *options)]
    return inspect.Signature([*own[:3], *by_name])
