"""The MoE layer: route, dispatch to experts, combine. `forward` mutates nothing."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.methods import check_flat, check_methods, group_size, num_scored_experts, router_of
from moe_jax.nn.mlp import MLP
from moe_jax.nn.variables import BalancerState, matrix, weight
from moe_jax.nn.zero_computation import ZeroComputation
from moe_jax.ops import stats
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.balancing.common import normalized_scores
from moe_jax.ops.dispatch import expert_capacity, no_sharding
from moe_jax.ops.experts import ExpertWeights
from moe_jax.ops.routing import to_batch
from moe_jax.sharding import constrain, on_one_cpu
from moe_jax.sharding.dispatchers import get_dispatcher
from moe_jax.types import Array, BatchRouting, MoEAux, PyTree, Routing, StepStats


class MoE(nnx.Module):
  """Routed experts, plus shared ones if the config asks for them.

  `y_BLD, aux = moe(x_BLD, mask_BL)`; tokens that no expert keeps get zero from the routed experts, so
  the residual carries them.

  Raises:
    InputError: unknown router, balancer or dispatcher, or some that do not fit together.
  """

  def __init__(self, config: MoEConfig, dim: int, init_scale: float = 1.0, *, rngs: nnx.Rngs):
    check_methods(config)  # wrong names end here, before anything is drawn or compiled
    router = router_of(config)
    self.config = config
    e, f = config.num_experts, config.expert_dim
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    gated = config.expert_activation == "swiglu"
    scored = num_scored_experts(config)
    projection = lambda width: matrix(
      rngs, (dim, width), ("embed", "router"), init_scale, zero=router.zero_init
    )
    tasks = router.num_tasks
    self.w_router_DE = None if tasks else projection(scored)
    self.w_task_SE = matrix(rngs, (tasks, scored), ("task", "router"), init_scale) if tasks else None
    self.w_side_DX = projection(router.num_side_logits) if router.num_side_logits else None
    self.bypass = ZeroComputation(router.bypass, dim, rngs=rngs) if router.bypass else None
    self.w_gate_EDF = matrix(rngs, (e, dim, f), into, init_scale) if gated else None
    self.w_up_EDF = matrix(rngs, (e, dim, f), into, init_scale)
    self.w_down_EFD = matrix(rngs, (e, f, dim), out, init_scale)
    shared = config.num_shared_experts * f
    self.shared = MLP(dim, shared, config.expert_activation, init_scale, rngs=rngs) if shared else None
    self.balancer_state = BalancerState(make_balancer(config.balancers).init(scored))

  def __call__(
    self,
    x_BLD: Array,
    mask_BL: Array | None = None,
    *,
    key_B: Array | None = None,
    step_stats: StepStats | None = None,
    train: bool = False,
    token_id_BL: Array | None = None,
    domain_B: Array | None = None,
    record_logits: bool = False,
  ) -> tuple[Array, MoEAux]:
    """One forward pass.

    Args:
      x_BLD: activations of any float dtype; the router works in float32 whatever it is. Or x_TD, tokens that
        are no sequences; the other arguments and y then have no leading B either.
      mask_BL: bool, False for padding: it is routed nowhere and counts nowhere.
      key_B: a random key per sequence, for jitter and routers that draw. Keys belong to sequences, so
        cutting the batch into micro-batches or over devices changes no draw.
      step_stats: `whole`, the balancer's statistics of the whole optimizer step, and `so_far`, those of the
        micro-batches before this one. None, as a whole or as a field: this batch is all there is.
      train: uses jitter and `capacity_factor` instead of `eval_capacity_factor`.
      token_id_BL: int32 vocabulary ids, for routers that read them.
      domain_B: int32, the domain of each sequence, for routers by task.
      record_logits: fills in `MoEAux.logits_BLE`.

    Raises:
      InputError: the router reads an argument that was not given, or a method needs sequences and x is flat.
    """
    if x_BLD.ndim == 2:
      check_flat(self.config)
      with_batch = lambda x: None if x is None else x[None]
      y_1TD, aux = self(
        x_BLD[None],
        with_batch(mask_BL),
        key_B=with_batch(key_B),
        step_stats=step_stats,
        train=train,
        token_id_BL=with_batch(token_id_BL),
        domain_B=with_batch(domain_B),
        record_logits=record_logits,
      )
      return y_1TD[0], aux
    x_BLD = jnp.asarray(x_BLD)
    batch, length, _ = x_BLD.shape
    if mask_BL is None:
      mask_BL = jnp.ones((batch, length), bool)
    balancer = make_balancer(self.config.balancers)
    state = jax.lax.stop_gradient(self.balancer_state.get_value())

    router_input_BLD = self._router_input(x_BLD, key_B if train else None)
    further = {
      "token_id_T": token_id_BL,
      "side_logits_TX": None if self.w_side_DX is None else project(router_input_BLD, weight(self.w_side_DX)),
    }
    logits_BLE = self._logits(router_input_BLD, domain_B)
    bias_E = balancer.bias(state)
    routing = route_groups(self.config, logits_BLE, mask_BL, bias_E, key_B if train else None, train, further)
    y_BLD, kept_per_expert_E = self._experts(x_BLD, routing, train)
    if self.shared is not None:
      y_BLD = y_BLD + self.shared(x_BLD)
    if self.bypass is not None:
      y_BLD = y_BLD + self.bypass(x_BLD, routing.bypass_TZ.reshape(batch, length, -1))

    batch_routing = to_batch(routing, batch, length, self.config.num_experts_per_token)
    observed = jax.lax.stop_gradient(balancer.observe(state, batch_routing))
    losses = balancer.losses(state, batch_routing, _with_this_batch(step_stats, observed))
    aux = _aux(batch_routing, losses, observed, kept_per_expert_E)
    return y_BLD, aux._replace(logits_BLE=jax.lax.stop_gradient(logits_BLE)) if record_logits else aux

  def _router_input(self, x_BLD: Array, key_B: Array | None) -> Array:
    x_BLD = x_BLD.astype(jnp.float32)
    if key_B is None or self.config.jitter == 0:
      return x_BLD
    low, high = 1 - self.config.jitter, 1 + self.config.jitter
    draw = lambda key: jax.random.uniform(
      jax.random.fold_in(key, 0), x_BLD.shape[1:], minval=low, maxval=high
    )
    return x_BLD * jax.vmap(draw)(key_B)

  def _logits(self, router_input_BLD: Array, domain_B: Array | None) -> Array:
    if self.w_task_SE is None:
      return project(router_input_BLD, weight(self.w_router_DE))
    if domain_B is None:
      raise InputError(f"router {self.config.router}: reads the domain of each sequence: call with domain_B=")
    logits_BE = self.w_task_SE[...][domain_B]
    shape = (*router_input_BLD.shape[:2], logits_BE.shape[-1])
    return jnp.broadcast_to(logits_BE[:, None, :], shape)

  def _experts(self, x_BLD: Array, routing: Routing, train: bool) -> tuple[Array, Array]:
    config = self.config
    # Zero-computation experts come behind the others: no dispatcher sees them, and nothing drops there.
    has_ffn_GA = routing.assignment.expert_A < config.num_experts
    assignment = routing.assignment._replace(
      expert_A=jnp.where(has_ffn_GA, routing.assignment.expert_A, 0),
      valid_A=routing.assignment.valid_A & has_ffn_GA,
    )
    t = routing.mask_T.shape[-1]
    factor = config.capacity_factor if train else config.eval_capacity_factor
    dispatcher = get_dispatcher(config.dispatcher)
    # A dispatcher that spells the exchange gathers what is kept in parts itself.
    used = (
      (lambda w: w[...].astype(x_BLD.dtype))
      if dispatcher.spells_exchange
      else (lambda w: weight(w, x_BLD.dtype))
    )
    matrices = self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD
    x_GTD = constrain(x_BLD.reshape(-1, t, x_BLD.shape[-1]), ("group", None, None))
    y_GTD, kept_GA = dispatcher.dispatch(
      x_GTD,
      assignment,
      ExpertWeights(*(None if w is None else used(w) for w in matrices)),
      num_experts=config.num_experts,
      capacity=expert_capacity(t, config.num_experts_per_token, factor, config.num_experts),
      shard=no_sharding if on_one_cpu() else constrain,
    )
    y_BLD = constrain(y_GTD.reshape(x_BLD.shape), ("batch", None, None))
    kept_GA |= routing.assignment.valid_A & ~has_ffn_GA
    onehot_GAE = jax.nn.one_hot(routing.assignment.expert_A, routing.logits_TE.shape[-1], dtype=jnp.float32)
    kept_per_expert_E = jnp.einsum("GA,GAE->E", kept_GA.astype(jnp.float32), onehot_GAE)
    return y_BLD, kept_per_expert_E


def route_groups(
  config: MoEConfig,
  logits_BLE: Array,
  mask_BL: Array,
  bias_E: PyTree,
  key_B: Array | None,
  train: bool,
  further: dict[str, Array | None],
) -> Routing:
  """The routing of every group; each field has a leading G. `further`: [B, L, ...] arrays by name.

  Raises:
    InputError: the router reads an array that `further` lacks.
  """
  batch, length, _ = logits_BLE.shape
  t = group_size(config, length)
  router = router_of(config)
  cut = lambda x: x.reshape(-1, t, *x.shape[2:])
  index_in_group_B = jnp.arange(batch, dtype=jnp.int32) % max(t // length, 1)
  sequence_BL = jnp.broadcast_to(index_in_group_B[:, None], (batch, length))
  static = {"train": train} if "train" in router.reads else {}
  arrays = further | {"sequence_T": sequence_BL}
  given = {name: arrays.get(name) for name in router.reads if name != "train"}
  for name, value in given.items():
    if value is None:
      raise InputError(f"router {config.router}: reads {name}, which the layer was not given")
  mapped = {name: cut(value) for name, value in given.items()} | {"mask_T": cut(mask_BL)}
  if key_B is not None:
    first_token_G = jnp.arange(batch * length // t) * t
    mapped["key"] = jax.vmap(jax.random.fold_in)(
      key_B[first_token_G // length], 1 + first_token_G % length // t
    )
  logits_GTE = constrain(cut(logits_BLE), ("group", None, None))
  route = lambda logits, kwargs: router(logits, bias_E=bias_E, **static, **kwargs)
  return jax.vmap(route)(logits_GTE, mapped)


def project(router_input_BLD: Array, w_DE: Array) -> Array:
  """Full float32 products also where the accelerator's default is lower: a rounded logit flips a choice."""
  return jnp.einsum("BLD,DE->BLE", router_input_BLD, w_DE, precision=jax.lax.Precision.HIGHEST)


def _with_this_batch(step_stats: StepStats | None, observed: PyTree) -> StepStats:
  whole, before = step_stats or (None, None)
  return StepStats(
    whole=observed if whole is None else whole,
    so_far=observed if before is None else jax.tree.map(jnp.add, before, observed),
  )


def _aux(
  routing: BatchRouting, losses: dict[str, Array], observed: PyTree, kept_per_expert_E: Array
) -> MoEAux:
  entropy_BL = stats.entropy(normalized_scores(routing))
  aux = MoEAux(
    losses=losses,
    balancer_stats=observed,
    tokens_per_expert_BE=routing.selected_BLE.sum(axis=1),
    kept_per_expert_E=kept_per_expert_E,
    router_entropy=jnp.sum(entropy_BL * routing.mask_BL),
    num_tokens=routing.mask_BL.sum().astype(jnp.float32),
  )
  return jax.lax.stop_gradient(aux)._replace(losses=losses)
