"""The jitted steps of a run on a mesh, with the layouts of their arguments.

Each configuration is compiled once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from moe_jax.errors import InputError
from moe_jax.nn.build import different_blocks, naming, resolve, routed_part
from moe_jax.nn.leaks import check_causal
from moe_jax.nn.moe import MoE
from moe_jax.nn.own_experts import check_cut
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import BalancerState, abstract
from moe_jax.ops.metrics import METRICS
from moe_jax.registry import Method
from moe_jax.training.hooks import HOOKS, Hook, make_hooks
from moe_jax.training.objectives import OBJECTIVES, Objective
from moe_jax.training.optim import OPTIMIZERS, learning_rate_schedule, make_optimizer
from moe_jax.training.own_leaks import check_own_leaks
from moe_jax.training.own_metrics import check_own_metrics
from moe_jax.training.own_objectives import check_own_objective
from moe_jax.training.own_steps import check_own_step
from moe_jax.training.selection import select_trained
from moe_jax.training.step import EvalSums, Options, Step, TrainState, init_state, make_eval_step, make_step


def resolve_config(config: Config) -> Config:
  """Returns `config` with a `Method` in place of every name, checked.

  The model is causal if the objective is.

  Raises:
    InputError: if a field is wrong, a name is unknown, or parts do not fit together.
  """
  config.check()
  with naming("objective", config.train.objective):
    objective = OBJECTIVES.resolve(config.train.objective)
    causal = objective().causal
    check_looks_ahead(config.model, objective)
  with naming("hooks", config.train.hooks):
    hooks = HOOKS.resolve_all(config.train.hooks)
    make_hooks(hooks)
  with naming("optimizer", config.optimizer.optimizer):
    optimizer = OPTIMIZERS.resolve(config.optimizer.optimizer)
    make_optimizer(dataclasses.replace(config.optimizer, optimizer=optimizer), num_steps=1)
  return dataclasses.replace(
    config,
    model=resolve(dataclasses.replace(config.model, causal=causal)),
    optimizer=dataclasses.replace(config.optimizer, optimizer=optimizer),
    train=dataclasses.replace(config.train, objective=objective, hooks=hooks),
  )


def check_looks_ahead(model: ModelConfig, objective: Method) -> None:
  """Raises `InputError` if the model has modules of multi-token prediction that nothing trains, or the reverse."""
  looks_ahead = objective().looks_ahead
  if model.mtp_depth and not looks_ahead:
    raise InputError(
      f"--mtp_depth={model.mtp_depth}: --objective={objective} does not train these modules; use "
      "--objective=next_tokens, or 0"
    )
  if looks_ahead and not model.mtp_depth:
    raise InputError(f"--objective={objective}: the model predicts one token; use --mtp_depth=1 or more")


def check_run(config: Config, mesh: jax.sharding.Mesh) -> Config:
  """Returns the resolved configuration of a run on `mesh`.

  Raises:
    InputError: if `resolve_config` raises one, if a causal model would look at later tokens (a user's parts are measured
      on a small model), if `trained` matches no parameter, if groups or the mesh do not divide the batch or the model, if
      a user's experts cannot be computed in the parts that the mesh cuts them into, or if a hook, an optimizer or a metric of
      a user's fails, or its state could not be saved, or if an objective of a user's is no sum over targets.
  """
  config = resolve_config(config)
  if config.optimizer.trained != "all":
    select_trained(abstract_model(config, vocab_size=8), config.optimizer.trained)
  length = config.data.sequence_length
  micro = config.data.batch_size // config.train.accumulation
  check_causal(config.model)
  check_own_leaks(config.model)
  blocks = different_blocks(config.model)
  routed = [routed_part(block) for block in blocks]
  if config.train.record_router_logits and not any(routed):
    raise InputError(
      f"--record_router_logits={config.train.record_router_logits}: --ffn={config.model.ffn} has no router"
    )
  if config.train.record_router_logits and len({layer.num_scored_experts for layer in routed if layer}) > 1:
    raise InputError(
      f"--record_router_logits={config.train.record_router_logits}: layers have different numbers of experts, and a trace "
      "has one; use 0"
    )
  groups, parts = {length}, sharding.num_parts("mlp", mesh.shape)
  for layer in filter(None, routed):
    check_own_metrics(layer.num_scored_experts, micro, length)
    with naming("group_size", layer.group_size):
      groups.add(layer.tokens_per_group(length))
    if layer.dispatcher.spells_exchange:
      layer.experts.check_parts(parts)
  for group in groups:
    if micro * length % group or (length % group and group % length):
      raise InputError(
        f"--group_size={group}: must divide sequence_length={length}, or be a multiple of it that divides "
        f"the {micro * length} tokens of a micro-batch"
      )
    sharding.check_divides(mesh, config.model, micro_batch=micro, num_groups=micro * length // group)
  for block, layer in zip(blocks, routed, strict=True):
    if layer is not None and layer.dispatcher.spells_exchange:
      with naming("experts", block.moe.experts):
        check_cut(block.moe, layer.experts, parts)
  with naming("objective", config.train.objective):
    check_own_objective(config.train.objective)
  check_own_step(config, make_init, make_train_step)
  return config


class CompiledSteps(NamedTuple):
  """The jitted functions of a run on a mesh, and the layout of its state."""

  init: Callable[[int], TrainState]
  init_from: Callable[[nnx.State, nnx.State, int], TrainState]  # (parameters, other variables, seed) -> state
  train: Step
  evaluate: Callable[[TrainState, dict], EvalSums]
  abstract_state: TrainState
  state_shardings: TrainState
  model: Transformer  # abstract: its structure, without parameters


def compile_steps(
  config: Config, vocab_size: int, num_domains: int, mesh: jax.sharding.Mesh, gradients: bool = False
) -> CompiledSteps:
  """The steps of `config` on `mesh`; runs that differ only in seeds, or in how often they log, evaluate and
  save, share them, compiled once.

  Compiled programs are cached by the methods of `config` and not by their names, so a method that is
  redefined is compiled again.

  Args:
    config: resolved here if it is not resolved yet.
    vocab_size: V of the text.
    num_domains: S of the text.
    mesh: the mesh of devices.
    gradients: whether to return the gradients with the metrics of a step.

  Raises:
    InputError: if the text has more domains than a task-level router has tasks.
  """
  config = resolve_config(config)
  for block in different_blocks(config.model):
    layer = routed_part(block)
    if layer is not None and 0 < layer.router.num_tasks < num_domains:
      raise InputError(
        f"--router={block.moe.router}: has {layer.router.num_tasks} tasks, and the text {num_domains} domains"
      )
  record = min(config.train.record_router_logits, 1)
  train = dataclasses.replace(config.train, record_router_logits=record, **_NOT_COMPILED)
  data = dataclasses.replace(config.data, data_seed=0)
  config = dataclasses.replace(config, train=train, data=data)
  return _compile_steps(config, vocab_size, num_domains, mesh, gradients, tuple(METRICS.items()))


# What the loop does around the steps, and how often; the seed is an argument of `init`.
_NOT_COMPILED = {
  "seed": 0,
  "init_from": "",
  "log_every": 1,
  "eval_every": 0,
  "eval_batches": 0,
  "checkpoint_every": 0,
  "checkpoint_minutes": 0.0,
  "max_minutes": 0.0,
  "ignore_memory_check": False,
  "tail_fraction": 1.0,
  "tensorboard": True,
}


def objective_of(config: Config) -> Objective:
  """Returns the objective of a resolved configuration."""
  return config.train.objective()


def hooks_of(config: Config) -> tuple[Hook, ...]:
  """Returns the hooks of a resolved configuration."""
  return make_hooks(config.train.hooks)


def make_model(config: Config, vocab_size: int, seed: jax.Array | int = 0) -> Transformer:
  """Returns the newly initialised model of a resolved configuration, for a text with `vocab_size` ids."""
  num_ids = vocab_size + objective_of(config).num_extra_ids
  return Transformer(config.model, num_ids, rngs=nnx.Rngs(jax.random.key(seed)))


def abstract_model(config: Config, vocab_size: int) -> Transformer:
  """Returns the model without parameter values, computing nothing."""
  return abstract(lambda: make_model(config, vocab_size))


def make_train_step(config: Config, vocab_size: int, num_domains: int, gradients: bool = False) -> Step:
  """Returns the training step of a resolved configuration. It is not jitted."""
  schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
  options = Options(
    accumulation=config.train.accumulation,
    num_domains=num_domains,
    vocab_size=vocab_size,
    schedule=schedule,
    gradients=gradients,
    record_logits=config.train.router_logits_dtype if config.train.record_router_logits else "",
  )
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  model = select_trained(abstract_model(config, vocab_size), config.optimizer.trained)
  return make_step(model, objective_of(config), optimizer, hooks_of(config), options)


def make_init(config: Config, vocab_size: int) -> Callable[[jax.Array | int], TrainState]:
  """Returns the function seed -> state before the first step, for a resolved configuration.

  It is not jitted.
  """
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  hooks = hooks_of(config)

  def init(seed: jax.Array | int) -> TrainState:
    model = select_trained(make_model(config, vocab_size, seed), config.optimizer.trained)
    return init_state(model, optimizer, hooks, seed)

  return init


def make_init_from(config: Config, vocab_size: int) -> Callable[..., TrainState]:
  """Returns the function (parameters, other variables, seed) -> state before the first step. It is not jitted."""
  graphdef = nnx.graphdef(abstract_model(config, vocab_size))
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  hooks = hooks_of(config)

  def init_from(params: nnx.State, variables: nnx.State, seed: jax.Array | int) -> TrainState:
    return init_state(nnx.merge(graphdef, params, variables), optimizer, hooks, seed)

  return init_from


@functools.lru_cache(maxsize=64)
def _compile_steps(
  config: Config,
  vocab_size: int,
  num_domains: int,
  mesh: jax.sharding.Mesh,
  gradients: bool,
  unused_metrics: tuple,
) -> CompiledSteps:
  model = abstract_model(config, vocab_size)
  abstract = jax.eval_shape(make_init(config, vocab_size), 0)
  shardings = sharding.state_shardings(mesh, abstract)
  batch, metrics = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  compiler = sharding.compiler_options(mesh.devices.flat[0].platform) or None
  plain_init = _compile_init(_plain(config), vocab_size, mesh)
  return CompiledSteps(
    init=lambda seed: jax.device_put(_with_balancers_of(model, abstract, plain_init(seed)), shardings),
    init_from=jax.jit(make_init_from(config, vocab_size), out_shardings=shardings),
    train=jax.jit(
      make_train_step(config, vocab_size, num_domains, gradients),
      in_shardings=(shardings, batch),
      out_shardings=(shardings, metrics),
      donate_argnums=0,
      compiler_options=compiler,
    ),
    evaluate=_compile_evaluation(_evaluated(config), vocab_size, num_domains, mesh, unused_metrics),
    abstract_state=abstract,
    state_shardings=shardings,
    model=model,
  )


def _evaluated(config: Config) -> Config:
  """Returns the configuration that arms share which differ only in what training alone reads."""
  moe = dataclasses.replace(config.model.moe, capacity_factor=1.0, jitter=0.0)
  model = dataclasses.replace(config.model, moe=moe, remat="none")
  return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, num_steps=1))


@functools.lru_cache(maxsize=64)
def _compile_evaluation(
  config: Config, vocab_size: int, num_domains: int, mesh: jax.sharding.Mesh, unused_metrics: tuple
) -> Callable[[TrainState, dict], EvalSums]:
  shardings = sharding.state_shardings(mesh, jax.eval_shape(make_init(config, vocab_size), 0))
  model = abstract_model(config, vocab_size)
  return jax.jit(
    make_eval_step(model, objective_of(config), num_domains, vocab_size),
    in_shardings=(shardings, sharding.batch_sharding(mesh)),
    out_shardings=sharding.replicated(mesh),
    compiler_options=sharding.compiler_options(mesh.devices.flat[0].platform) or None,
  )


def _plain(config: Config) -> Config:
  """Returns the configuration that arms share for their initial parameters.

  They may differ in balancers, dispatchers and batches, and in how a step is cut.
  """
  train = dataclasses.replace(config.train, accumulation=1, record_router_logits=0)
  model = dataclasses.replace(config.model, remat="none", scan_layers=True)
  if not model.segments:
    moe = dataclasses.replace(
      model.moe,
      balancers="none",
      dispatcher="dropless",  # a router that leaks where capacity drops assignments is causal with it
      capacity_factor=1.0,
      eval_capacity_factor=1.0,
      jitter=0.0,
    )
    model = resolve(dataclasses.replace(model, moe=moe))
  return dataclasses.replace(config, model=model, train=train, data=DataConfig(), mesh=MeshConfig())


@functools.lru_cache(maxsize=64)
def _compile_init(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> Callable[[int], TrainState]:
  """Compiles the initialisers.

  Arms share them, because compiling takes longer than running, so LLVM does not optimise.
  """
  init = make_init(config, vocab_size)
  shardings = sharding.state_shardings(mesh, jax.eval_shape(init, 0))
  hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(init, out_shardings=shardings, compiler_options=hurry)


def _with_balancers_of(model: Transformer, abstract: TrainState, state: TrainState) -> TrainState:
  """Returns `state` with the initial state of the balancers of `model`."""
  # Other variables, such as the table of a router, are there already.
  others = {path: v for path, v in nnx.to_flat_state(state.variables) if not isinstance(v, BalancerState)}
  initial = dict(nnx.to_flat_state(abstract.variables)) | others
  for path, layer in nnx.iter_modules(model):
    if isinstance(layer, MoE):
      own = (*path, "balancer_state")
      one_layer = layer.balancer.init(layer.num_scored_experts)
      fill = lambda leaf, like: jnp.broadcast_to(leaf, like.shape).astype(like.dtype)
      value = jax.tree.map(fill, one_layer, initial[own].get_value())
      initial[own] = initial[own].replace(value)
  return state._replace(variables=nnx.from_flat_state(initial))
