"""One optimizer step and one evaluation step, as pure functions.

What a step computes does not depend on how its batch is cut: the language-model loss is divided by the
valid tokens of the whole step, every balancing loss is weighed by its micro-batch's share of them, and
the balancer is updated once, from the summed statistics of the whole step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config import Config
from moe_jax.nn import BalancerState, Transformer
from moe_jax.nn.methods import num_scored_experts
from moe_jax.ops import stats
from moe_jax.ops.balancing import Balancer, make_balancer
from moe_jax.training.optim import learning_rate_schedule, make_optimizer
from moe_jax.types import Array, MoEAux, PyTree, StepStats

Batch = dict[str, Array]  # tokens_BL, targets_BL int32; mask_BL bool; domain_B int32


class TrainState(NamedTuple):
  """All that a step reads and changes."""

  step: Array  # int32, optimizer steps done
  key: Array  # uint32 [2], of the router's randomness; the same for the whole run
  params: nnx.State
  balancer: nnx.State
  opt_state: PyTree


def model_parts(config: Config, vocab_size: int, seed: Array | int = 0) -> tuple[Any, nnx.State, nnx.State]:
  """(graphdef, params, balancer state) of a freshly initialised model."""
  model = Transformer(config.model, vocab_size, rngs=nnx.Rngs(jax.random.key(seed)))
  return nnx.split(model, nnx.Param, BalancerState)


def _graphdef(config: Config, vocab_size: int) -> Any:
  """The model's static part, without computing any parameter."""
  found = []

  def build():
    graphdef, *states = model_parts(config, vocab_size)
    found.append(graphdef)
    return states

  jax.eval_shape(build)  # not nnx.eval_shape: under a mesh that one reads shardings from the variables
  return found[0]


def init_state(config: Config, vocab_size: int, seed: Array | int) -> TrainState:
  """The state before the first step."""
  _, params, balancer = model_parts(config, vocab_size, seed)
  opt_state = make_optimizer(config.optimizer, config.train.num_steps).init(params)
  key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
  return TrainState(jnp.int32(0), key, params, balancer, opt_state)


def with_balancers_of(config: Config, state: TrainState) -> TrainState:
  """`state` with the initial balancer state of `config`. Arms of a comparison differ in nothing else at
  the start, so they share one compiled initialisation."""
  moe = config.model.moe
  layers = config.model.num_moe_layers
  one_layer = make_balancer(moe.balancers).init(num_scored_experts(moe))
  value = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), one_layer)
  variable = lambda leaf: isinstance(leaf, nnx.Variable)
  balancer = jax.tree.map(lambda leaf: leaf.replace(value), state.balancer, is_leaf=variable)
  return state._replace(balancer=balancer)


def cross_entropy(logits_BLV: Array, batch: Batch) -> Array:
  """Negative log likelihood in nats, summed over the valid targets."""
  nll_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch["targets_BL"])
  return jnp.sum(nll_BL * batch["mask_BL"])


class _Sums(NamedTuple):
  """What micro-batches add up to; R layers in front where a field is per layer."""

  nll: Array
  losses: dict[str, Array]  # name -> [R], already weighed by the share of tokens
  balancer_stats: PyTree
  tokens_per_expert_RE: Array
  kept_per_expert_RE: Array
  router_entropy_R: Array


def make_train_step(
  config: Config, vocab_size: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """The function (state, batch of the whole step) -> (state, metrics). Not jitted.

  Metrics: `loss` (nats per token, language model only), `total_loss`, one entry [R] per balancing loss,
  `grad_norm`, `learning_rate`, and per layer `max_vio`, `dropped_fraction`, `router_entropy` [R] and
  `tokens_per_expert` [R, E], all of the whole step, before capacity where counts are meant. With
  `record_router_logits` also `router_trace`, the fields of `moe_jax.training.router_trace.Steps` but the step.
  """
  graphdef = _graphdef(config, vocab_size)
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
  balancer = make_balancer(config.model.moe.balancers)

  def forward(params, balancer_state, micro, step_stats, record=False):
    model = nnx.merge(graphdef, params, balancer_state)
    keys = jax.random.wrap_key_data(micro["key_B"])
    return model(
      micro["tokens_BL"],
      micro["mask_BL"],
      key_B=keys,
      step_stats=step_stats,
      train=True,
      domain_B=micro["domain_B"],
      record_logits=record,
    )

  def loss_fn(params, balancer_state, micro, step_stats, step_tokens):
    record = config.train.record_router_logits > 0
    logits_BLV, aux = forward(params, balancer_state, micro, step_stats, record)
    share = micro["mask_BL"].sum() / step_tokens
    losses = {name: share * loss_R for name, loss_R in aux.losses.items()}
    nll = cross_entropy(logits_BLV, micro)
    # A mean over layers: the weight of a balancing loss means the same at any depth.
    total = nll / step_tokens + sum(loss_R.mean() for loss_R in losses.values())
    return total, (_sums(nll, losses, aux), aux.logits_BLE)

  def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    step_tokens = jnp.maximum(batch["mask_BL"].sum(), 1).astype(jnp.float32)
    batch = _with_keys(state, batch)
    micros = _cut(batch, config.train.accumulation)
    whole = None
    if balancer.needs_whole_step and config.train.accumulation > 1:
      observe = lambda micro, _: (forward(state.params, state.balancer, micro, None)[1].balancer_stats, None)
      whole, _ = _scan_sum(observe, micros)
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def one(micro, before):
      stats_before = None if before is None else before[1].balancer_stats
      step_stats = StepStats(whole, stats_before)
      grads, (sums, logits_RBLE) = grad_fn(state.params, state.balancer, micro, step_stats, step_tokens)
      return (grads, sums), logits_RBLE

    (grads, sums), logits_PRBLE = _scan_sum(one, micros)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_state = TrainState(
      step=state.step + 1,
      key=state.key,
      params=optax.apply_updates(state.params, updates),
      balancer=_update_balancer(balancer, state.balancer, sums.balancer_stats),
      opt_state=opt_state,
    )
    metrics = _metrics(sums, step_tokens)
    if logits_PRBLE is not None:
      metrics["router_trace"] = _router_trace(logits_PRBLE, batch, config.train.router_logits_dtype)
    return new_state, metrics | {
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": schedule(state.step),
    }

  return step_fn


def _sums(nll: Array, losses: dict[str, Array], aux: MoEAux) -> _Sums:
  return _Sums(
    nll=nll,
    losses=losses,
    balancer_stats=aux.balancer_stats,
    tokens_per_expert_RE=aux.tokens_per_expert_BE.sum(axis=1),
    kept_per_expert_RE=aux.kept_per_expert_E,
    router_entropy_R=aux.router_entropy,
  )


def _with_keys(state: TrainState, batch: Batch) -> Batch:
  """Adds a key per sequence, so that no draw depends on how the batch is cut."""
  step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  index_B = jnp.arange(batch["tokens_BL"].shape[0])
  keys = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(step_key, i)))(index_B)
  return {**batch, "key_B": keys}


def _cut(batch: Batch, pieces: int) -> Batch:
  """[B, ...] -> [pieces, B / pieces, ...]. Sequence b goes to piece b % pieces: with the batch split over
  devices in contiguous blocks, every device finds its part of each piece among its own sequences."""
  return jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)


def _scan_sum(
  function: Callable[[Batch, PyTree | None], tuple[PyTree, PyTree]], micros: Batch
) -> tuple[PyTree, PyTree]:
  """`function(micro-batch, sum so far)` gives (what to add up, what to stack) for each entry of the leading axis.
  The sum, of which one term is held at a time, and the stack."""
  first = jax.tree.map(lambda x: x[0], micros)
  if jax.tree.leaves(micros)[0].shape[0] == 1:
    total, apart = function(first, None)
    return total, jax.tree.map(lambda x: x[None], apart)
  shapes, _ = jax.eval_shape(function, first, None)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, micro):
    found, apart = function(micro, total)
    return jax.tree.map(jnp.add, total, found), apart

  return jax.lax.scan(add, zeros, micros)


def _router_trace(logits_PRBLE: Array, batch: Batch, dtype: str) -> dict[str, Array]:
  """What a replay needs of a step, its micro-batches put back into the order of the batch: the reverse of `_cut`."""
  logits_RBPLE = jnp.moveaxis(logits_PRBLE, 0, 2)
  logits_RBLE = logits_RBPLE.reshape(logits_RBPLE.shape[0], -1, *logits_RBPLE.shape[3:])
  limit = float(jnp.finfo(dtype).max)  # the largest number of the type, not infinity, which has no softmax
  return {
    "logits_RBLE": jnp.clip(logits_RBLE, -limit, limit).astype(dtype),
    **{name: batch[name] for name in ("mask_BL", "domain_B", "key_B")},
  }


def _update_balancer(balancer: Balancer, state: nnx.State, step_stats: PyTree) -> nnx.State:
  """One update per layer; layers are the leading axis of both arguments."""
  update = lambda layer, value, observed: balancer.update(value, observed)

  def update_variable(variable):
    value = variable.get_value()
    # The layer index gives vmap its axis where a balancer has neither state nor statistics.
    leaves = jax.tree.leaves((value, step_stats))
    layers = jnp.arange(leaves[0].shape[0] if leaves else 1)
    return variable.replace(jax.vmap(update)(layers, value, step_stats))

  return jax.tree.map(update_variable, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _metrics(sums: _Sums, step_tokens: Array) -> dict[str, Array]:
  loss = sums.nll / step_tokens
  return {
    "loss": loss,
    "total_loss": loss + sum(loss_R.mean() for loss_R in sums.losses.values()),
    **sums.losses,
    "max_vio": stats.max_vio(sums.tokens_per_expert_RE),
    "dropped_fraction": stats.dropped_fraction(sums.tokens_per_expert_RE, sums.kept_per_expert_RE),
    "router_entropy": sums.router_entropy_R / step_tokens,
    "tokens_per_expert": sums.tokens_per_expert_RE,
  }


class EvalSums(NamedTuple):
  """Sums over evaluated batches; add them up, then take ratios."""

  nll: Array
  num_tokens: Array
  tokens_per_expert_RSE: Array  # by domain
  kept_per_expert_RE: Array
  router_entropy_R: Array


def make_eval_step(
  config: Config, vocab_size: int, num_domains: int
) -> Callable[[TrainState, Batch], EvalSums]:
  """The function (state, batch) -> sums. No jitter, no draws, `eval_capacity_factor`, no update."""
  graphdef = _graphdef(config, vocab_size)

  def eval_fn(state: TrainState, batch: Batch) -> EvalSums:
    model = nnx.merge(graphdef, state.params, state.balancer)
    logits_BLV, aux = model(batch["tokens_BL"], batch["mask_BL"], domain_B=batch["domain_B"])
    domain_BS = jax.nn.one_hot(batch["domain_B"], num_domains)
    return EvalSums(
      nll=cross_entropy(logits_BLV, batch),
      num_tokens=batch["mask_BL"].sum().astype(jnp.float32),
      tokens_per_expert_RSE=jnp.einsum("RBE,BS->RSE", aux.tokens_per_expert_BE, domain_BS),
      kept_per_expert_RE=aux.kept_per_expert_E,
      router_entropy_R=aux.router_entropy,
    )

  return eval_fn
