"""The MoE layer: route, dispatch to experts, combine. `forward` mutates nothing."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.nn.mlp import MLP
from moe_jax.nn.variables import BalancerState, matrix
from moe_jax.ops import stats
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.balancing.losses import normalized_scores
from moe_jax.ops.dispatch import default_group_size, expert_capacity, get_dispatcher
from moe_jax.ops.experts import ExpertWeights, expert_ffn
from moe_jax.ops.routing import make_router, to_batch
from moe_jax.sharding import constrain
from moe_jax.types import Array, BatchRouting, MoEAux, PyTree, Routing


class MoE(nnx.Module):
  """Routed experts, plus shared ones if the config asks for them.

  `y_BLD, aux = moe(x_BLD, mask_BL)`; tokens that no expert keeps get zero from the routed experts, so
  the residual carries them.

  Raises:
    InputError: unknown or unsuitable router, balancer or dispatcher.
  """

  def __init__(self, config: MoEConfig, dim: int, init_scale: float = 1.0, *, rngs: nnx.Rngs):
    config.check()
    # Wrong names end here, before anything is drawn or compiled.
    get_dispatcher(config.dispatcher)
    make_router(config.router, config.num_experts_per_token)
    balancer = make_balancer(config.balancers)
    self.config = config
    e, f = config.num_experts, config.expert_dim
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    gated = config.expert_activation == "swiglu"
    self.w_router_DE = matrix(rngs, (dim, e), ("embed", "router"), init_scale)
    self.w_gate_EDF = matrix(rngs, (e, dim, f), into, init_scale) if gated else None
    self.w_up_EDF = matrix(rngs, (e, dim, f), into, init_scale)
    self.w_down_EFD = matrix(rngs, (e, f, dim), out, init_scale)
    shared = config.num_shared_experts * f
    self.shared = MLP(dim, shared, config.expert_activation, init_scale, rngs=rngs) if shared else None
    self.balancer_state = BalancerState(balancer.init(e))

  def __call__(
    self,
    x_BLD: Array,
    mask_BL: Array | None = None,
    *,
    key_B: Array | None = None,
    step_stats: PyTree = None,
    train: bool = False,
  ) -> tuple[Array, MoEAux]:
    """One forward pass.

    Args:
      x_BLD: activations of any float dtype; the router works in float32 whatever it is.
      mask_BL: bool, False for padding: it is routed nowhere and counts nowhere.
      key_B: a random key per sequence, for jitter and routers that draw. Keys belong to sequences, so
        cutting the batch into micro-batches or over devices changes no draw.
      step_stats: the balancer's statistics of the whole optimizer step; None: this batch is all of it.
      train: uses jitter and `capacity_factor` instead of `eval_capacity_factor`.
    """
    batch, length, _ = x_BLD.shape
    if mask_BL is None:
      mask_BL = jnp.ones((batch, length), bool)
    balancer = make_balancer(self.config.balancers)
    state = jax.lax.stop_gradient(self.balancer_state.get_value())

    logits_BLE = self._router_logits(x_BLD, key_B if train else None)
    routing = self._route(logits_BLE, mask_BL, key_B if train else None, balancer.bias(state))
    y_BLD, kept_per_expert_E = self._experts(x_BLD, routing, train)
    if self.shared is not None:
      y_BLD = y_BLD + self.shared(x_BLD)

    batch_routing = to_batch(routing, batch, length)
    observed = jax.lax.stop_gradient(balancer.observe(batch_routing))
    losses = balancer.losses(state, batch_routing, observed if step_stats is None else step_stats)
    return y_BLD, _aux(batch_routing, losses, observed, kept_per_expert_E)

  def _router_logits(self, x_BLD: Array, key_B: Array | None) -> Array:
    x_BLD = x_BLD.astype(jnp.float32)
    if key_B is not None and self.config.jitter > 0:
      low, high = 1 - self.config.jitter, 1 + self.config.jitter
      draw = lambda key: jax.random.uniform(
        jax.random.fold_in(key, 0), x_BLD.shape[1:], minval=low, maxval=high
      )
      x_BLD = x_BLD * jax.vmap(draw)(key_B)
    # Full float32 products also where the accelerator's default is lower: a rounded logit flips a choice.
    return jnp.einsum("BLD,DE->BLE", x_BLD, self.w_router_DE[...], precision=jax.lax.Precision.HIGHEST)

  def _route(self, logits_BLE: Array, mask_BL: Array, key_B: Array | None, bias_E: Array | None) -> Routing:
    """The routing of every group; each field has a leading G."""
    batch, length, e = logits_BLE.shape
    t = self.group_size(length)
    router = make_router(self.config.router, self.config.num_experts_per_token)
    logits_GTE = constrain(logits_BLE.reshape(-1, t, e), ("group", None, None))
    mask_GT = mask_BL.reshape(-1, t)
    if key_B is None:
      return jax.vmap(lambda logits, mask: router(logits, bias_E=bias_E, mask_T=mask))(logits_GTE, mask_GT)
    first_token_G = jnp.arange(batch * length // t) * t
    key_G = jax.vmap(jax.random.fold_in)(key_B[first_token_G // length], 1 + first_token_G % length // t)
    route = lambda logits, mask, key: router(logits, bias_E=bias_E, key=key, mask_T=mask)
    return jax.vmap(route)(logits_GTE, mask_GT, key_G)

  def _experts(self, x_BLD: Array, routing: Routing, train: bool) -> tuple[Array, Array]:
    config, assignment = self.config, routing.assignment
    t = routing.mask_T.shape[-1]
    factor = config.capacity_factor if train else config.eval_capacity_factor
    cast = lambda w: None if w is None else w[...].astype(x_BLD.dtype)
    weights = ExpertWeights(cast(self.w_gate_EDF), cast(self.w_up_EDF), cast(self.w_down_EFD))
    x_GTD = constrain(x_BLD.reshape(-1, t, x_BLD.shape[-1]), ("group", None, None))
    y_GTD, kept_GA = get_dispatcher(config.dispatcher)(
      x_GTD,
      assignment,
      lambda rows, matmul: expert_ffn(weights, rows, matmul),
      num_experts=config.num_experts,
      capacity=expert_capacity(t, config.num_experts_per_token, factor, config.num_experts),
      shard=constrain,
    )
    y_BLD = constrain(y_GTD.reshape(x_BLD.shape), ("batch", None, None))
    onehot_GAE = jax.nn.one_hot(assignment.expert_A, config.num_experts, dtype=jnp.float32)
    kept_per_expert_E = jnp.einsum("GA,GAE->E", kept_GA.astype(jnp.float32), onehot_GAE)
    return y_BLD, kept_per_expert_E

  def group_size(self, length: int) -> int:
    """Tokens per routing group for sequences of `length` tokens."""
    return self.config.group_size or default_group_size(self.config.dispatcher, length)


def _aux(
  routing: BatchRouting, losses: dict[str, Array], observed: PyTree, kept_per_expert_E: Array
) -> MoEAux:
  entropy_BL = stats.entropy(normalized_scores(routing.scores_BLE))
  aux = MoEAux(
    losses=losses,
    balancer_stats=observed,
    tokens_per_expert_BE=routing.selected_BLE.sum(axis=1),
    kept_per_expert_E=kept_per_expert_E,
    router_entropy=jnp.sum(entropy_BL * routing.mask_BL),
    num_tokens=routing.mask_BL.sum().astype(jnp.float32),
  )
  return jax.lax.stop_gradient(aux)._replace(losses=losses)
