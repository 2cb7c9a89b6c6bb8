"""Builds parts that are given as a name, a factory, or the module itself."""

from typing import Any

from flax import nnx

from moe_jax.errors import InputError
from moe_jax.fingerprint import place
from moe_jax.registry import Registry, Spec


def made(registry: Registry, part: Spec | nnx.Module, kind: type[nnx.Module], **offered: Any) -> nnx.Module:
  """Returns `part` if it is a module, and otherwise what its factory builds from `offered`.

  Raises:
    InputError: if the result is not a `kind`.
  """
  if isinstance(part, nnx.Module):
    made_by, module = "", part
  else:
    method = registry.resolve(part)
    made_by, module = f" {method.name!r} ({place(method.factory)})", method(**offered)
  if not isinstance(module, kind):
    raise InputError(
      f"{registry.kind}{made_by}: makes a {type(module).__name__}, which is no {kind.__name__}"
    )
  return module
