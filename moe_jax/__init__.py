"""moe_jax: Mixture-of-Experts language models in JAX and Flax.

What a notebook needs is here by name, and imported when it is first used:

  MoE, Context, Transformer          the layer, what it is told besides activations, the language model
  Router, Balancer, ExpertNetwork    contracts of a router, a balancer, the network of experts
  Objective, NextToken, Hook         contracts of what is trained, and of what runs after a step
  Metric                             one thing to measure
  matrix, vector, top_k              for a router or experts of your own
  update_balancers, balancing_loss, read_metrics     for a training loop of your own
  make_step, init_state, make_optimizer              a step made of parts
  Config, ModelConfig, MoEConfig, ...                 frozen dataclasses, see `moe_jax.config`
  Run, Comparison, load_dataset      one training run; several methods over several seeds
  preset                             a named configuration
  register                           gives a part of yours a name
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
  "preset": "moe_jax.models",
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
  """Gives a part of yours a name, for the command line (`--plugins`), presets and configurations.

  Args:
    kind: router, experts, balancer, dispatcher, mixer, ffn, residual, objective, optimizer, hook, or metric.
    name: letters, digits and _.
    part: a function or class that makes the part. Parameters with defaults become options of the name. For a
      metric, the `Metric` itself.

  Raises:
    InputError: an unknown kind, a name that is taken, or a part of the wrong kind.
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
