"""Methods by name: `switch_loss:0.01:scope=sequence` -> a call of the registered factory.

Grammar: NAME[:VALUE ...][:OPTION=VALUE ...]. Plain values fill the factory's options in order.
Several methods are joined by `,` or `+`. Values take the type of the option's default.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.errors import InputError, unknown_name


def split_methods(spec: str) -> list[str]:
  """`"a:1,b:2+c"` -> `["a:1", "b:2", "c"]`."""
  parts = [part.strip() for part in spec.replace("+", ",").split(",")]
  return [part for part in parts if part]


def method_name(spec: str) -> str:
  return spec.split(":", 1)[0].strip()


def build(what: str, registry: Mapping[str, Callable[..., Any]], spec: str, *args: Any) -> Any:
  """Calls the factory that `spec` names with `args` first, then the options that `spec` gives.

  Args:
    what: the flag's name, for errors: "router", "balancer", "dispatcher".
    registry: name -> factory. The factory's keyword parameters with defaults are its options.
    spec: see the module docstring.
    *args: positional arguments that every factory of the registry takes.

  Raises:
    InputError: unknown name or option, or a value that does not read as the option's type.
  """
  name, *fields = [field.strip() for field in spec.split(":")]
  if name not in registry:
    raise unknown_name(what, name, registry)
  factory = registry[name]
  parameters = list(inspect.signature(factory).parameters.values())[len(args) :]
  options = {p.name: p for p in parameters}
  given: dict[str, Any] = {}
  for i, field in enumerate(fields):
    option, equals, text = (part.strip() for part in field.partition("="))
    if not equals:
      if i >= len(parameters):
        raise InputError(f"{what} {spec!r}: takes {len(parameters)} values: {_describe(options)}")
      option, text = parameters[i].name, field
    if option not in options:
      raise InputError(f"{what} {spec!r}: no option {option!r}; options: {_describe(options)}")
    if option in given:
      raise InputError(f"{what} {spec!r}: {option} is given twice")
    given[option] = _convert(what, spec, options[option], text)
  return factory(*args, **given)


def _describe(options: Mapping[str, inspect.Parameter]) -> str:
  return ", ".join(f"{p.name}={p.default}" for p in options.values()) or "none"


def _convert(what: str, spec: str, parameter: inspect.Parameter, text: str) -> Any:
  kind = type(parameter.default)
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise InputError(f"{what} {spec!r}: {parameter.name} must be true or false, got {text!r}")
    return text.lower() == "true"
  try:
    value = kind(text)
  except ValueError:
    raise InputError(f"{what} {spec!r}: {parameter.name} must be {kind.__name__}, got {text!r}") from None
  if kind is float and not math.isfinite(value):
    raise InputError(f"{what} {spec!r}: {parameter.name} must be finite, got {text!r}")
  return value
