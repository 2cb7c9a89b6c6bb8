"""The pure steps, jitted on a mesh with the layouts of their arguments, compiled once per configuration."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_jax import sharding
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.nn.methods import check_causal, check_methods, group_size, layer_kind, router_of
from moe_jax.training.step import (
  EvalSums,
  TrainState,
  init_state,
  make_eval_step,
  make_train_step,
  with_balancers_of,
)


def check_run(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises `InputError` for what only the whole configuration shows: methods that do not fit together,
  and divisibility by groups and mesh."""
  length, moe = config.data.sequence_length, config.model.moe
  micro = config.data.batch_size // config.train.accumulation
  check_methods(moe)
  check_causal(moe)
  if config.train.record_router_logits and not layer_kind(moe).routes:
    raise InputError(
      f"--record_router_logits={config.train.record_router_logits}: --layer={moe.layer} has no router"
    )
  group = group_size(moe, length)
  if micro * length % group or (length % group and group % length):
    raise InputError(
      f"--group_size={group}: must divide sequence_length={length}, or be a multiple of it that divides "
      f"the {micro * length} tokens of a micro-batch"
    )
  sharding.check_divides(mesh, config.model, micro_batch=micro, num_groups=micro * length // group)


class CompiledSteps(NamedTuple):
  """The jitted functions of a run on a mesh, and the layout of its state."""

  init: Callable[[int], TrainState]
  train: Callable[[TrainState, dict], tuple[TrainState, dict]]
  evaluate: Callable[[TrainState, dict], EvalSums]
  abstract_state: TrainState
  state_shardings: TrainState


def compile_steps(
  config: Config, vocab_size: int, num_domains: int, mesh: jax.sharding.Mesh
) -> CompiledSteps:
  """The steps of `config` on `mesh`; runs that differ only in seeds share them, compiled once.

  Raises:
    InputError: the text has more domains than a router by task has rows.
  """
  num_tasks = router_of(config.model.moe).num_tasks
  if 0 < num_tasks < num_domains:
    raise InputError(
      f"--router={config.model.moe.router}: has {num_tasks} tasks, and the text {num_domains} domains"
    )
  record = min(config.train.record_router_logits, 1)  # how often is not the step's affair
  train = dataclasses.replace(config.train, seed=0, tensorboard=True, record_router_logits=record)
  data = dataclasses.replace(config.data, data_seed=0)
  return _compile_steps(dataclasses.replace(config, train=train, data=data), vocab_size, num_domains, mesh)


@functools.lru_cache(maxsize=64)
def _compile_steps(
  config: Config, vocab_size: int, num_domains: int, mesh: jax.sharding.Mesh
) -> CompiledSteps:
  abstract = jax.eval_shape(lambda: init_state(config, vocab_size, 0))
  shardings = sharding.state_shardings(mesh, abstract)
  batch, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  options = sharding.compiler_options(mesh.devices.flat[0].platform) or None
  plain_moe = dataclasses.replace(config.model.moe, balancers="none", dispatcher="sorted", jitter=0.0)
  plain_init = _compile_init(
    dataclasses.replace(config, model=dataclasses.replace(config.model, moe=plain_moe)), vocab_size, mesh
  )
  return CompiledSteps(
    init=lambda seed: jax.device_put(with_balancers_of(config, plain_init(seed)), shardings),
    train=jax.jit(
      make_train_step(config, vocab_size),
      in_shardings=(shardings, batch),
      out_shardings=(shardings, everywhere),
      donate_argnums=0,
      compiler_options=options,
    ),
    evaluate=jax.jit(
      make_eval_step(config, vocab_size, num_domains),
      in_shardings=(shardings, batch),
      out_shardings=everywhere,
      compiler_options=options,
    ),
    abstract_state=abstract,
    state_shardings=shardings,
  )


@functools.lru_cache(maxsize=64)
def _compile_init(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> Callable[[int], TrainState]:
  """Compiling the initialisers takes longer than running them: methods share it, and on CPU LLVM hurries."""
  shardings = sharding.state_shardings(mesh, jax.eval_shape(lambda: init_state(config, vocab_size, 0)))
  hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  init = lambda seed: init_state(config, vocab_size, seed)
  return jax.jit(init, out_shardings=shardings, compiler_options=hurry)
