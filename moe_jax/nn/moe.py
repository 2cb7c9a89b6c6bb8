"""The MoE layer: route, dispatch to experts, combine. The forward pass mutates nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.checks import check_factors, check_fit, check_flat, check_routing, check_sizes
from moe_jax.nn.context import DEFAULT, Context
from moe_jax.nn.experts import EXPERTS, ExpertNetwork, as_experts
from moe_jax.nn.parts import made
from moe_jax.nn.routers import ROUTERS, Router
from moe_jax.nn.variables import BalancerState
from moe_jax.ops.balancing import Balancer, balancer_of
from moe_jax.ops.balancing.common import normalized_scores
from moe_jax.ops.dispatch import default_group_size, expert_capacity, no_sharding, weighing_inputs
from moe_jax.ops.experts import Experts, with_row_bits
from moe_jax.ops.metrics import LayerRecord, observe
from moe_jax.ops.routing import to_batch
from moe_jax.registry import Method, Spec
from moe_jax.sharding import constrain, on_one_cpu
from moe_jax.sharding.dispatchers import Dispatcher, make_dispatcher
from moe_jax.types import (
  Array,
  Assignment,
  BatchRouting,
  ExpertOutputs,
  MoEAux,
  PyTree,
  RouterContext,
  Routing,
  StepStats,
)


class Served(NamedTuple):
  """What the routed experts of a layer did."""

  y_BLD: Array  # what they add to the output
  kept_GA: Array  # bool, the entries of the assignment that were served
  outputs: ExpertOutputs | None = None


class MoE(nnx.Module):
  """A layer of routed experts: `y_BLD, aux = moe(x_BLD)`.

  The routed experts return zero for a token that none of them keeps, so a residual connection passes it on
  unchanged. `aux.loss` is the balancing loss, to be added to the loss of the model. Call
  `moe_jax.update_balancers` after each optimizer step.

  Args:
    dim: D, the width of the tokens.
    num_experts: E.
    num_experts_per_token: K, the number of experts that a token is sent to.
    expert_dim: F, the hidden width of an expert.
    router: a name with options (`"sigmoid_topk:normalize=true"`), a function or class that makes a router, or
      a router. Of what a router of your own returns, only shapes and types are checked here; its numbers are in models that
      a configuration describes, where it is tried on a tiny batch.
    experts: the network of the experts, in the same forms.
    balancer: the balancer, in the same forms. Several are a text with commas, or a sequence.
    dispatcher: how tokens get to experts, in the same forms.
    shared: a module that all tokens go through beside the routed experts, or None.
    capacity_factor: the slots of an expert divided by T*K/E, in training.
    eval_capacity_factor: the same in evaluation.
    group_size: T, the number of tokens that share the slots of an expert; 0: chosen from the shape.
    jitter: in training, the input of the router is multiplied by U(1-jitter, 1+jitter) (2101.03961).
    init_scale: s in std = sqrt(s / fan_in) of every matrix.
    rngs: draws the parameters.

  Raises:
    InputError: if a name is unknown, a number makes no sense, or parts do not fit together.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_experts: int = 8,
    num_experts_per_token: int = 2,
    expert_dim: int = 256,
    router: Spec | Router = "softmax_topk",
    experts: Spec | ExpertNetwork = "swiglu",
    balancer: Spec | Balancer | tuple[Method, ...] = "none",
    dispatcher: Spec | Dispatcher = "dropless",
    shared: nnx.Module | None = None,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    group_size: int = 0,
    jitter: float = 0.0,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_sizes(num_experts, num_experts_per_token, expert_dim, group_size)
    check_factors(capacity_factor, eval_capacity_factor, jitter, init_scale)
    self.num_experts, self.num_experts_per_token = num_experts, num_experts_per_token
    self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
    self.group_size, self.jitter = group_size, jitter
    self.balancer = balancer_of(balancer)
    self.dispatcher = make_dispatcher(dispatcher)
    offered = {"dim": dim, "num_experts": num_experts, "init_scale": init_scale, "rngs": rngs}
    self.router = made(ROUTERS, router, Router, num_experts_per_token=num_experts_per_token, **offered)
    self.num_scored_experts = self.router.num_scored_experts or num_experts
    check_fit(self.router, self.balancer, num_experts)
    self.experts = made(EXPERTS, experts, ExpertNetwork, expert_dim=expert_dim, **offered)
    self.shared = nnx.data(shared)  # may come later, and is data even while there is none
    self.balancer_state = BalancerState(self.balancer.init(self.num_scored_experts))

  def __call__(self, x_BLD: Array, context: Context = DEFAULT) -> tuple[Array, MoEAux]:
    """One forward pass.

    Args:
      x_BLD: activations of any float dtype. The router always works in float32. For tokens that are not
        sequences, pass x_TD; the fields of the context and the output then have no leading B either.
      context: mask, keys, what a router may read, and whether this is training.

    Returns:
      y_BLD in the dtype of x, and a `MoEAux` with losses, counts and metrics.

    Raises:
      InputError: if the router reads a field that the context does not have, a field has another shape than x, a method
        needs sequences and x is flat, or groups of `group_size` do not divide the tokens.
    """
    if x_BLD.ndim == 2:
      check_flat(self.router, self.balancer)
      y_1TD, aux = self(x_BLD[None], _with_batch_axis(context))
      return y_1TD[0], aux
    x_BLD = jnp.asarray(x_BLD)
    batch, length, _ = x_BLD.shape
    context.check_shapes(batch, length)
    state = jax.lax.stop_gradient(self.balancer_state.get_value())
    router_input_BLD = self._router_input(x_BLD, context)
    t = self.tokens_per_group(length)
    if batch * length % t:
      raise InputError(f"group_size={t}: must divide the {batch * length} tokens of {batch} sequences")
    cut = lambda y_BLX: constrain(y_BLX.reshape(-1, t, y_BLX.shape[-1]), ("group", None, None))
    of_groups = group_context(context, x_BLD.shape, t, self.balancer.bias(state))
    if context.routes_BLE is not None and not self.router.replays:
      raise InputError(
        f"router {type(self.router).__name__}: its choices cannot be given; use a top-k router"
      )
    routing = self.router(cut(router_input_BLD), of_groups._replace(layer_input=cut(x_BLD)))
    name = f"router {type(self.router).__name__}"
    check_routing(name, self.router, routing, (*of_groups.mask.shape, x_BLD.shape[-1]), self.num_experts)
    served = self._experts(x_BLD, routing, context)
    y_BLD = served.y_BLD
    if self.shared is not None:
      y_BLD = y_BLD + self.shared(x_BLD)[0]
    if routing.direct_TD is not None:
      y_BLD = y_BLD + routing.direct_TD.reshape(y_BLD.shape)

    batch_routing = to_batch(routing, batch, length, self.num_experts_per_token)
    batch_routing = batch_routing._replace(outputs=served.outputs)
    observed = jax.lax.stop_gradient(self.balancer.observe(state, batch_routing))
    losses = self.balancer.losses(state, batch_routing, _with_this_batch(context.step_stats, observed))
    kept_per_expert_E = _count_kept(routing, served.kept_GA)
    return y_BLD, _aux(batch_routing, losses, observed, kept_per_expert_E, context)

  def tokens_per_group(self, length: int) -> int:
    """Returns T for sequences of `length` tokens.

    Raises:
      InputError: if the router needs whole sequences and `group_size` would cut them.
    """
    if not self.router.whole_sequences:
      return self.group_size or default_group_size(self.dispatcher.small_groups, length)
    if self.group_size % length:
      raise InputError(
        f"group_size={self.group_size}: the router decides for whole sequences; use a multiple of "
        f"sequence_length={length}, or 0"
      )
    return self.group_size or length

  def _router_input(self, x_BLD: Array, context: Context) -> Array:
    x_BLD = x_BLD.astype(jnp.float32)
    if context.key_B is None or not context.train or self.jitter == 0:
      return x_BLD
    low, high = 1 - self.jitter, 1 + self.jitter
    draw = lambda key: jax.random.uniform(
      jax.random.fold_in(key, 0), x_BLD.shape[1:], jnp.float32, minval=low, maxval=high
    )
    return x_BLD * jax.vmap(draw)(context.key_B)

  def _experts(self, x_BLD: Array, routing: Routing, context: Context) -> Served:
    """What the routed experts add. A subclass may give rows of another width than D, and change the result."""
    # The router itself serves entries for experts without a network. No dispatcher sees them, and none drops.
    has_network_GA = routing.assignment.expert_A < self.num_experts
    assignment = routing.assignment._replace(
      expert_A=jnp.where(has_network_GA, routing.assignment.expert_A, 0),
      valid_A=routing.assignment.valid_A & has_network_GA,
    )
    t = routing.mask_T.shape[-1]
    factor = self.capacity_factor if context.train else self.eval_capacity_factor
    network, rows_BLD = self.experts.for_step(context.drawing_key), x_BLD
    # A dispatcher that writes out the exchange gathers split parameters itself.
    experts = as_experts(network, x_BLD.dtype, gather=not self.dispatcher.spells_exchange)
    if network.draws:
      rows_BLD, experts = with_row_bits(x_BLD, context.random_bits(x_BLD.shape[1]), experts)
    rows_GTD = constrain(rows_BLD.reshape(-1, t, rows_BLD.shape[-1]), ("group", None, None))
    capacity = expert_capacity(t, self.num_experts_per_token, factor, self.num_experts)
    y_GTD, kept_GA, outputs = self._dispatch(rows_GTD, assignment, experts, capacity, x_BLD.shape[-1])
    y_BLD = y_GTD.reshape(rows_BLD.shape)[..., : x_BLD.shape[-1]]
    y_BLD = constrain(y_BLD, ("batch", None, None))
    return Served(y_BLD, kept_GA | (routing.assignment.valid_A & ~has_network_GA), outputs)

  def _dispatch(
    self, rows_GTD: Array, assignment: Assignment, experts: Experts, capacity: int, dim: int
  ) -> tuple[Array, Array, ExpertOutputs | None]:
    """Returns y_GTD, which entries were kept [G, A], and the outputs of experts if the layer measures them.

    Behind the first `dim` columns of a row may be random bits.
    """
    dispatch = self.dispatcher.dispatch
    if self.router.weighs == "input":
      dispatch = weighing_inputs(dispatch, dim)
    y_GTD, kept_GA = dispatch(
      rows_GTD,
      assignment,
      experts,
      num_experts=self.num_experts,
      capacity=capacity,
      shard=no_sharding if on_one_cpu() else constrain,
    )
    return y_GTD, kept_GA, None


def group_context(context: Context, shape: tuple[int, ...], t: int, bias_E: PyTree) -> RouterContext:
  """Returns what the router of a layer reads of its groups: those of `t` tokens, for x_BLD of `shape`."""
  batch, length, *_ = shape
  cut = lambda x_BL: None if x_BL is None else x_BL.reshape(-1, t)
  along = lambda x_B: None if x_B is None else cut(jnp.broadcast_to(x_B[:, None], (batch, length)))
  index_in_group_B = jnp.arange(batch, dtype=jnp.int32) % max(t // length, 1)
  key_G = None
  if context.train and context.key_B is not None:
    first_token_G = jnp.arange(batch * length // t) * t
    part_G = 1 + first_token_G % length // t  # 0 is the jitter's
    key_G = jax.vmap(jax.random.fold_in)(context.key_B[first_token_G // length], part_G)
  mask_BL = jnp.ones((batch, length), bool) if context.mask_BL is None else context.mask_BL
  return RouterContext(
    mask=cut(mask_BL),
    bias_E=bias_E,
    key=key_G,
    token_id=cut(context.token_id_BL),
    sequence=along(index_in_group_B),
    domain=along(context.domain_B),
    train=context.train,
    routes=None
    if context.routes_BLE is None
    else context.routes_BLE.reshape(-1, t, context.routes_BLE.shape[-1]),
  )


def _count_kept(routing: Routing, kept_GA: Array) -> Array:
  onehot_GAE = jax.nn.one_hot(routing.assignment.expert_A, routing.logits_TE.shape[-1], dtype=jnp.float32)
  return jnp.einsum("GA,GAE->E", kept_GA.astype(jnp.float32), onehot_GAE)


def _with_batch_axis(context: Context) -> Context:
  arrays = ("mask_BL", "key_B", "token_id_BL", "domain_B")
  given = {name: getattr(context, name) for name in arrays}
  return context._replace(**{name: jnp.asarray(x)[None] for name, x in given.items() if x is not None})


def _with_this_batch(step_stats: StepStats | None, observed: PyTree) -> StepStats:
  whole, before = step_stats or (None, None)
  return StepStats(
    whole=observed if whole is None else whole,
    so_far=observed if before is None else jax.tree.map(jnp.add, before, observed),
  )


def _aux(
  routing: BatchRouting,
  losses: dict[str, Array],
  observed: PyTree,
  kept_per_expert_E: Array,
  context: Context,
) -> MoEAux:
  tokens_per_expert_BE = routing.selected_BLE.sum(axis=1)
  layer = LayerRecord(
    tokens_per_expert_BE,
    kept_per_expert_E,
    normalized_scores(routing),
    routing.mask_BL,
    context.domain_one_hot(routing.mask_BL),
  )
  aux = MoEAux(
    losses=losses,
    balancer_stats=observed,
    tokens_per_expert_BE=tokens_per_expert_BE,
    kept_per_expert_E=kept_per_expert_E,
    metrics=observe(layer),
    logits_BLE=routing.logits_BLE if context.record_logits else None,
    selected_BLE=routing.selected_BLE if context.record_logits else None,
  )
  return jax.lax.stop_gradient(aux)._replace(losses=losses)
