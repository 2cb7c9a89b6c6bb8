"""One optimizer step and one evaluation step, as pure functions made of parts.

The result of a step does not depend on how its batch is cut. The objective is divided by the targets of the
whole step, each balancing loss is weighted by its micro-batch's share of the tokens, and hooks run once, on
the summed aux of the whole step. By what they are, `scope=micro_batch` of a balancing loss and the tiles of rows of
`fp8_products` are exceptions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.nn.aux import (
  added,
  balancing_loss,
  by_layer,
  losses_by_name,
  mixer_auxes,
  moe_auxes,
  nothing,
  num_moe_layers,
  read_metrics,
  segments_of,
)
from moe_jax.nn.context import Context
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import balancer_stats
from moe_jax.ops.metrics import METRICS
from moe_jax.training.hooks import Hook, init_hooks, run_hooks
from moe_jax.training.objectives import Batch, Objective
from moe_jax.training.optim import trained
from moe_jax.types import Array, MoEAux, PyTree, StepStats


class TrainState(NamedTuple):
  """Everything that a step reads and changes."""

  step: Array  # int32, optimizer steps done
  key: Array  # uint32 [2], the data of the random key of the run; steps fold in their number
  params: nnx.State
  variables: nnx.State  # the other variables of the model: the state of balancers
  opt_state: PyTree
  hooks: tuple[PyTree, ...]  # the state of each hook


Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def init_state(
  model: nnx.Module, optimizer: optax.GradientTransformation, hooks: Sequence[Hook], seed: Array | int
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: has the initial parameters.
    optimizer: optax, over the model's `nnx.Param`s.
    hooks: those of the step.
    seed: determines everything that is drawn in training.
  """
  params, variables = nnx.state(model, nnx.Param, ...)
  return TrainState(
    step=jnp.int32(0),
    key=jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)),
    params=params,
    variables=variables,
    opt_state=optimizer.init(params),
    hooks=init_hooks(model, hooks),
  )


class Options(NamedTuple):
  """Options of a step."""

  accumulation: int = 1  # micro-batches per optimizer step
  num_domains: int = 1  # S of the text, for metrics by domain
  vocab_size: int = 0  # V, for objectives that draw ids
  schedule: Callable[[Array], Array] | None = None  # the learning rate of a step, which is only logged
  gradients: bool = False  # return the gradients, as the metric `gradients`
  # float16 or float32: return the metric `router_trace`, the fields of `router_trace.Steps` except the step
  record_logits: str = ""


def make_step(
  model: nnx.Module,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  hooks: Sequence[Hook] = (),
  options: Options | None = None,
) -> Step:
  """Returns the function (state, batch of the whole step) -> (state, metrics). It is not jitted.

  Args:
    model: only its structure is used, so it may be abstract.
    objective: what is minimised, in addition to the balancing losses of the model's layers.
    optimizer: optax, over the model's `nnx.Param`s.
    hooks: run in order, after the optimizer and the updates of balancers, which every step has.
    options: further options.

  Metrics are those of the whole step: `loss` (of the objective, per target), `total_loss`, an entry [R] for
  each balancing loss, `grad_norm`, `learning_rate`, and the metrics that `moe_jax.ops.metrics` declares for
  training [R, ...]. If a hook reads attention scores, also `attention_score`, the largest of all layers and heads.
  """
  options = options or Options()
  graphdef = nnx.graphdef(model)
  needs_whole_step = options.accumulation > 1 and _needs_whole_step(model)
  record_scores = any(hook.reads_scores for hook in hooks)

  def terms(params: nnx.State, variables: nnx.State, micro: Batch, step_stats: StepStats | None):
    merged = nnx.merge(graphdef, params, variables)
    context = _context(micro, options, step_stats)._replace(record_scores=record_scores)
    return objective(merged, micro, context)

  def loss_fn(params, variables, micro, step_stats, of_step):
    loss, aux = terms(params, variables, micro, step_stats)
    aux = _weighed(aux, micro["mask_BL"].sum() / of_step["tokens"])
    return loss / of_step["targets"] + balancing_loss(aux), (loss, _without_logits(aux), _logits(aux))

  def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    batch = prepared(state, batch, objective, options.vocab_size)
    of_step = {"tokens": _at_least_1(batch["mask_BL"]), "targets": _at_least_1(objective.num_targets(batch))}
    together = _sequences_per_group(model, batch["tokens_BL"].shape[1])
    micros = _cut(batch, options.accumulation, together)
    whole = None
    if needs_whole_step:
      observe = lambda micro, _: (
        balancer_stats(terms(state.params, state.variables, micro, None).aux),
        None,
      )
      whole, _ = _scan_sum(observe, micros)

    def one(micro: Batch, before: PyTree | None):
      step_stats = StepStats(whole, None if before is None else balancer_stats(before[2]))
      args = state.params, state.variables, micro, step_stats, of_step
      gradients, (loss, aux, logits) = jax.grad(loss_fn, has_aux=True)(*args)
      return (trained(gradients), loss, aux), logits

    (gradients, loss, aux), logits_J = _scan_sum(one, micros)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    updated = nnx.merge(graphdef, params, state.variables)
    hook_states = run_hooks(updated, hooks, state.hooks, aux)
    params, variables = nnx.state(updated, nnx.Param, ...)
    metrics = _metrics(loss / of_step["targets"], aux) | {"grad_norm": optax.tree.norm(gradients)}
    if options.schedule:
      metrics["learning_rate"] = options.schedule(state.step)
    if options.gradients:
      metrics["gradients"] = gradients
    if options.record_logits:
      metrics["router_trace"] = _router_trace(logits_J, batch, together, options.record_logits)
    return TrainState(state.step + 1, state.key, params, variables, opt_state, hook_states), metrics

  return step_fn


def prepared(state: TrainState, batch: Batch, objective: Objective, vocab_size: int) -> Batch:
  """Returns the batch that the objective prepares, with a key for each sequence.

  Draws therefore do not depend on how the batch is cut.
  """
  step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  num_sequences = batch["tokens_BL"].shape[0]
  key_B = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(num_sequences))
  batch = objective.prepare(batch, key_B, vocab_size)
  key_data = jnp.broadcast_to(jax.random.key_data(step_key), (num_sequences, 2))
  return batch | {"key_B": jax.random.key_data(key_B), "step_key_B": key_data}


def _context(micro: Batch, options: Options, step_stats: StepStats | None) -> Context:
  return Context.of_batch(
    micro,
    key_B=jax.random.wrap_key_data(micro["key_B"]),
    step_key=jax.random.wrap_key_data(micro["step_key_B"][0]),
    num_domains=options.num_domains,
    step_stats=step_stats,
    train=True,
    record_logits=bool(options.record_logits),
  )


def _needs_whole_step(model: nnx.Module) -> bool:
  return any(m.balancer.needs_whole_step for _, m in nnx.iter_modules(model) if isinstance(m, MoE))


def _at_least_1(count: Array) -> Array:
  return jnp.maximum(jnp.sum(count), 1).astype(jnp.float32)


def _map_moe(function: Callable[[Any], Any], aux: PyTree) -> PyTree:
  """Applies `function` to every `MoEAux` of a tree."""
  is_moe = lambda leaf: isinstance(leaf, MoEAux)
  return jax.tree.map(lambda leaf: function(leaf) if is_moe(leaf) else leaf, aux, is_leaf=is_moe)


def _weighed(aux: PyTree, share: Array) -> PyTree:
  """Returns aux that can be added: losses times the share of the step's tokens, and counts by expert."""

  def of_layer(layer):
    losses = {name: share * loss for name, loss in layer.losses.items()}
    return layer._replace(losses=losses, tokens_per_expert_BE=layer.tokens_per_expert_BE.sum(axis=-2))

  return _map_moe(of_layer, aux)


def _without_logits(aux: PyTree) -> PyTree:
  return _map_moe(lambda layer: layer._replace(logits_BLE=None, selected_BLE=None), aux)


def _logits(aux: PyTree) -> list[list[Array]]:
  """Returns those of each segment and block of its pattern, as `by_layer` takes them; [] if none are recorded."""
  found = [[b.logits_BLE for b in blocks if b.logits_BLE is not None] for blocks in segments_of(aux)]
  return [blocks for blocks in found if blocks]


def _sequences_per_group(model: nnx.Module, length: int) -> int:
  """Returns how many neighbouring sequences must stay together, so that each layer's groups are those of the whole step."""
  layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, MoE)]
  return math.lcm(*(max(layer.tokens_per_group(length) // length, 1) for layer in layers))


def _cut(batch: Batch, pieces: int, together: int) -> Batch:
  """[B, ...] -> [pieces, B / pieces, ...]. `together` neighbouring sequences are a block; block b goes to piece b % pieces.

  The batch is split over devices in contiguous parts of whole groups, so every device has its part of each piece.
  """

  def cut(x: Array) -> Array:
    blocks = x.reshape(-1, pieces, together, *x.shape[1:]).swapaxes(0, 1)
    return blocks.reshape(pieces, -1, *x.shape[1:])

  return jax.tree.map(cut, batch)


def _scan_sum(
  function: Callable[[Batch, PyTree | None], tuple[PyTree, PyTree]], micros: Batch
) -> tuple[PyTree, PyTree]:
  """Returns a sum (of a `Maximum` the maximum) and a stack over the leading axis of `micros`.

  Only one term of the sum is stored at a time.

  Args:
    function: maps (micro-batch, sum so far) to (term of the sum, entry of the stack).
    micros: micro-batches on a leading axis.
  """
  first = jax.tree.map(lambda x: x[0], micros)
  if jax.tree.leaves(micros)[0].shape[0] == 1:
    total, apart = function(first, None)
    return total, jax.tree.map(lambda x: x[None], apart)
  shapes, _ = jax.eval_shape(function, first, None)
  start = nothing(shapes)

  def add(total, micro):
    found, apart = function(micro, total)
    return added(total, found), apart

  return jax.lax.scan(add, start, micros)


def _metrics(loss: Array, aux: PyTree) -> dict[str, Array]:
  losses = losses_by_name(aux)
  values = read_metrics(aux) if num_moe_layers(aux) else {}
  shown = {name: x for name, x in values.items() if METRICS[name].training is not None}
  scores = [own.largest_score_N.value.max() for own in mixer_auxes(aux)]
  if scores:
    shown["attention_score"] = jnp.stack(scores).max()
  return {"loss": loss, "total_loss": loss + balancing_loss(aux), **losses, **shown}


def _router_trace(logits_J: list[list[Array]], batch: Batch, together: int, dtype: str) -> dict[str, Array]:
  """Returns what a replay needs of a step, in the order of the batch before `_cut`."""

  def in_order(logits_JRBLE: Array) -> Array:
    pieces, layers, _, *rest = logits_JRBLE.shape
    blocks = jnp.moveaxis(logits_JRBLE.reshape(pieces, layers, -1, together, *rest), 0, 2)
    return blocks.reshape(layers, -1, *rest)

  limit = float(jnp.finfo(dtype).max)  # the largest number of the type, not infinity, which has no softmax
  logits_RBLE = by_layer(jax.tree.map(in_order, logits_J))
  return {
    "logits_RBLE": jnp.clip(logits_RBLE, -limit, limit).astype(dtype),
    **{name: batch[name] for name in ("mask_BL", "domain_B", "key_B")},
  }


class EvalSums(NamedTuple):
  """Sums over an evaluated batch. Add those of all batches, then read them."""

  nll: Array
  num_targets: Array
  num_tokens: Array
  metrics: list[list[dict[str, PyTree]]]  # for each segment and block of its pattern: name -> stacked sums


def make_eval_step(
  model: nnx.Module, objective: Objective, num_domains: int, vocab_size: int
) -> Callable[[TrainState, Batch], EvalSums]:
  """Returns the function (state, batch) -> sums. It is not jitted, and updates nothing.

  The layers draw nothing and use `eval_capacity_factor`. An objective that draws its targets gets keys that
  depend only on the text, so every evaluation uses the same targets.
  """
  graphdef = nnx.graphdef(model)

  def eval_fn(state: TrainState, batch: Batch) -> EvalSums:
    batch = objective.prepare(batch, _keys_of_text(batch["tokens_BL"]), vocab_size)
    context = Context.of_batch(batch, num_domains=num_domains)
    loss, aux = objective.evaluate(nnx.merge(graphdef, state.params, state.variables), batch, context)
    return EvalSums(
      nll=loss,
      num_targets=objective.num_targets(batch).astype(jnp.float32),
      num_tokens=batch["mask_BL"].sum().astype(jnp.float32),
      metrics=[[layer.metrics for layer in moe_auxes(segment)] for segment in aux],
    )

  return eval_fn


def _keys_of_text(tokens_BL: Array) -> Array:
  """Returns a key for each sequence that depends only on its text, and not on the rest of the batch."""
  place_L = jnp.arange(1, tokens_BL.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
  checksum_B = jnp.sum((tokens_BL.astype(jnp.uint32) + 1) * place_L[None], axis=1, dtype=jnp.uint32)
  return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(checksum_B)
