"""Parts given by name, by factory, or as the module itself."""

from typing import Any

from flax import nnx

from moe_jax.registry import Registry, Spec


def made(registry: Registry, part: Spec | nnx.Module, **offered: Any) -> nnx.Module:
  """`part` if it is a module already, else what its factory makes of what it is offered."""
  return part if isinstance(part, nnx.Module) else registry.resolve(part)(**offered)
