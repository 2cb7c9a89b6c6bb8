"""moe_jax: Mixture-of-Experts language models in JAX and Flax.

The public names below are imported when they are first used, so `import moe_jax` is fast:

  MoE, Context, Transformer          the MoE layer, its inputs besides activations, and the language model
  Router, Balancer, ExpertNetwork    base classes and records for routing methods of your own
  Objective, NextToken, Terms, Hook  base classes for losses, and for what runs after each optimizer step
  Metric                             a quantity to measure
  matrix, vector, weight, freeze     parameters with logical axes
  project, top_k                     pieces of a router
  update_balancers, balancing_loss, moe_auxes, read_metrics   for a training loop of your own
  make_step, init_state, make_optimizer, Options              an optimizer step made of parts
  Config, ModelConfig, MoEConfig, ...                         frozen dataclasses, see `moe_jax.config`
  Run, Comparison, load_dataset      one training run; several arms over several seeds
  generate, stream, Sampling         text that follows a prompt
  evaluate                           bits per byte and perplexity of a validation split
  preset                             a named configuration
  load, save                         a published checkpoint or a run; a checkpoint that transformers loads
  LayerStream                        a published checkpoint of which one layer is in memory at a time
  account                            parameters, operations and bytes of a model, without making it
  register                           names a part of your own
  InputError                         an error that the user can correct
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> the module that has it
_PUBLIC = {
  **dict.fromkeys(
    (
      "BlockConfig",
      "Config",
      "DataConfig",
      "MeshConfig",
      "MoEConfig",
      "ModelConfig",
      "OptimizerConfig",
      "Segment",
      "TrainConfig",
    ),
    "moe_jax.config",
  ),
  "InputError": "moe_jax.errors",
  "MoE": "moe_jax.nn.moe",
  "Context": "moe_jax.nn.context",
  "Transformer": "moe_jax.nn.transformer",
  "Router": "moe_jax.nn.routers",
  "project": "moe_jax.nn.routers",
  "top_k": "moe_jax.nn.routers",
  "ExpertNetwork": "moe_jax.nn.experts",
  **dict.fromkeys(("matrix", "vector", "weight", "freeze"), "moe_jax.nn.variables"),
  **dict.fromkeys(("update_balancers", "balancing_loss", "moe_auxes", "read_metrics"), "moe_jax.nn.aux"),
  "Balancer": "moe_jax.ops.balancing",
  "Metric": "moe_jax.ops.metrics",
  **dict.fromkeys(("Objective", "NextToken", "Terms"), "moe_jax.training.objectives"),
  "Hook": "moe_jax.training.hooks",
  **dict.fromkeys(("Options", "init_state", "make_step"), "moe_jax.training.step"),
  "make_optimizer": "moe_jax.training.optim",
  "Run": "moe_jax.training.loop",
  "Comparison": "moe_jax.comparison.comparison",
  "load_dataset": "moe_jax.data",
  **dict.fromkeys(("generate", "stream", "Sampling"), "moe_jax.inference.generate"),
  "evaluate": "moe_jax.inference.evaluate",
  "preset": "moe_jax.models",
  "load": "moe_jax.interop.load",
  "save": "moe_jax.interop.save",
  "LayerStream": "moe_jax.interop.stream",
  "account": "moe_jax.analysis.accounting.account",
}

# kind of part -> (the module that has the registry, its name there)
_REGISTRIES = {
  "router": ("moe_jax.nn.routers", "ROUTERS"),
  "experts": ("moe_jax.nn.experts", "EXPERTS"),
  "balancer": ("moe_jax.ops.balancing", "BALANCERS"),
  "dispatcher": ("moe_jax.sharding.dispatchers", "DISPATCHERS"),
  "mixer": ("moe_jax.nn.mixers", "MIXERS"),
  "ffn": ("moe_jax.nn.ffn", "FFNS"),
  "residual": ("moe_jax.nn.residual", "RESIDUALS"),
  "objective": ("moe_jax.training.objectives", "OBJECTIVES"),
  "optimizer": ("moe_jax.training.optim", "OPTIMIZERS"),
  "hook": ("moe_jax.training.hooks", "HOOKS"),
}

__all__ = ["__version__", "register", *_PUBLIC]


def register(kind: str, name: str, part: Any) -> None:
  """Registers a part under a name, for use on the command line (with `--plugins`) and in configurations.

  Args:
    kind: router, experts, balancer, dispatcher, mixer, ffn, residual, objective, optimizer, hook, or metric.
    name: consists of letters, digits and _.
    part: a function or class that builds the part. Its parameters with defaults become options of the name.
      For a metric, the `Metric` itself.

  Raises:
    InputError: if the kind is unknown, the name is taken, or `part` cannot build a part of this kind.
  """
  from moe_jax.errors import unknown_name

  if kind == "metric":
    importlib.import_module("moe_jax.ops.metrics").register(name, part)
    return
  if kind not in _REGISTRIES:
    raise unknown_name("kind of part", kind, [*_REGISTRIES, "metric"])
  module, registry = _REGISTRIES[kind]
  getattr(importlib.import_module(module), registry).register(name, part)


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
  value = getattr(importlib.import_module(_PUBLIC[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted(__all__)
