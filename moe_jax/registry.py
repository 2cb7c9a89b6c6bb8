"""Registries of parts by name. They resolve `switch_loss:0.01:scope=sequence` to a `Method`.

A name is resolved once, at the border: on the command line, in a configuration, or in a call. Everything
below holds `Method` objects. Two of them are equal if they would build the same part.

Grammar: NAME[:VALUE ...][:OPTION=VALUE ...]. Plain values fill the options of the factory in order. A value
has the type of the option's default. `,` or `+` joins several methods.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_jax.errors import InputError, unknown_name
from moe_jax.fingerprint import definition, digest, is_builtin, place


@dataclasses.dataclass(frozen=True)
class Method:
  """A factory with its options, not called yet.

  Methods are hashable, and equal if factory, code, options and what is inside are equal. They are the keys under which
  compiled programs are cached, so a function that is redefined under the same name is compiled again.
  """

  factory: Callable[..., Any]
  options: tuple[tuple[str, Any], ...] = ()  # every option of the factory, in the order of its signature
  code: str = ""  # digest of a user's factory; empty for one of this package
  name: str = dataclasses.field(default="", compare=False)
  inner: tuple[tuple[str, "Method"], ...] = ()  # by option: the part that it names, see `Registry`

  def __call__(self, **offered: Any) -> Any:
    """Builds the part. The factory gets those of `offered` that its signature names."""
    takes = _parameters(self.factory)
    options = dict(self.options) | dict(self.inner)
    return self.factory(**{k: v for k, v in offered.items() if k in takes}, **options)

  def __str__(self) -> str:
    """The shortest text that names this method: `switch_loss:0.01`, `sigmoid_topk:normalize=true`."""
    defaults = {name: p.default for name, p in _parameters(self.factory).items()}
    parts = [self.name]
    for i, (name, value) in enumerate(self.options):
      if value != defaults.get(name):
        is_first_number = i == 0 and isinstance(value, int | float) and not isinstance(value, bool)
        parts.append(_to_text(value) if is_first_number else f"{name}={_to_text(value)}")
    return ":".join(parts)

  def takes(self, name: str) -> bool:
    """Returns whether the factory has a parameter of this name."""
    return name in _parameters(self.factory)

  def with_option(self, option: str, text: str) -> "Method":
    """Returns this method with one option read from `text`.

    Raises:
      InputError: if `text` does not have the type of the option.
    """
    value = parse_value(f"{self.name!r}", _parameters(self.factory)[option], text)
    inner = tuple(pair for pair in self.inner if pair[0] != option)  # `Registry.resolve` finds the new one
    return dataclasses.replace(
      self, options=tuple((dict(self.options) | {option: value}).items()), inner=inner
    )

  @property
  def source(self) -> str:
    """Digests of a user's code: that of the factory, then, each behind a `+`, of parts inside. Empty: none is a user's."""
    return self.code + "".join(f"+{method.source}" for _, method in self.inner if method.source)

  @property
  def own_factories(self) -> tuple[Callable[..., Any], ...]:
    """The factories of a user's, that of this method first."""
    inside = (factory for _, method in self.inner for factory in method.own_factories)
    return ((self.factory,) if self.code else ()) + tuple(inside)

  @property
  def fingerprint(self) -> str:
    """What results depend on: name, options and, for a user's code, a digest of its source, see `is_same_code`."""
    return f"{self} [{self.source}]" if self.source else str(self)


Spec = str | Method | Callable[..., Any]


class Registry(Mapping[str, Callable[..., Any]]):
  """The factories of one kind of part, by name.

  Args:
    kind: "router", "balancer", ...; appears in errors.
    factories: those of this package.
    offered: names of parameters that a factory may take. All its other parameters must have defaults: they
      are its options.
    wraps: the option by which a factory names another part of this kind, which it builds inside of its own.
  """

  def __init__(
    self,
    kind: str,
    factories: Mapping[str, Callable[..., Any]],
    offered: Sequence[str] = (),
    wraps: str = "",
  ):
    self.kind, self.offered, self.wraps = kind, tuple(offered), wraps
    self._factories = dict(factories)
    self.builtin = frozenset(factories)  # names of what this package brings

  def __getitem__(self, name: str) -> Callable[..., Any]:
    return self._factories[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._factories)

  def __len__(self) -> int:
    return len(self._factories)

  def register(self, name: str, factory: Callable[..., Any]) -> None:
    """Registers `factory` under a name.

    A new definition of the same function, as in a notebook cell that runs again, replaces the old one.

    Raises:
      InputError: if the name is taken or is not an identifier, or if `factory` is not callable or takes
        parameters that are not offered and have no default, or cannot be hashed. The message says where the factory is
        defined.
    """
    if not name.isidentifier():
      raise InputError(f"{self.kind} {name!r}: a name consists of letters, digits and _")
    if not callable(factory):
      raise InputError(f"{self.kind} {name!r}: {factory!r} is no function or class that makes one")
    other = self._factories.get(name)
    if name in self.builtin or (other is not None and not _same_place(other, factory)):
      whose = "moe_jax" if name in self.builtin else place(other)
      raise InputError(
        f"{self.kind} {name!r} ({place(factory)}): the name is taken by {whose}; choose another"
      )
    self._options(factory, name)
    self._factories[name] = factory

  def resolve(self, spec: Spec) -> Method:
    """Returns the method for a name with options, a factory, or a `functools.partial` of a factory.

    Raises:
      InputError: if the name or an option is unknown, or a value does not have the type of its option.
    """
    if isinstance(spec, Method):
      return spec if spec.inner else dataclasses.replace(spec, inner=self._inner(dict(spec.options)))
    if isinstance(spec, str):
      return self._parse(spec)
    given: dict[str, Any] = {}
    if isinstance(spec, functools.partial):
      if spec.args:
        raise InputError(f"{self.kind} {spec.func!r}: give the options of a partial by name")
      spec, given = spec.func, dict(spec.keywords)
    if not callable(spec):
      raise InputError(f"{self.kind} {spec!r}: must be a name, or a function or class that makes one")
    name = next(
      (n for n, f in self._factories.items() if f is spec),
      getattr(spec, "__name__", definition(spec).__name__),
    )
    return self._method(name, spec, given)

  def resolve_all(self, specs: Spec | Sequence[Spec]) -> tuple[Method, ...]:
    """Returns the methods of a text with `,` or `+` between them, of one spec, or of a sequence of specs."""
    if isinstance(specs, str):
      specs = split_methods(specs)
    elif not isinstance(specs, Sequence):
      specs = [specs]
    return tuple(self.resolve(spec) for spec in specs)

  def _options(self, factory: Callable[..., Any], name: str) -> dict[str, inspect.Parameter]:
    """The options of the factory: its parameters that are not offered."""
    try:
      parameters = _parameters(factory)
    except TypeError:  # of the cache, which programs have, too
      raise InputError(
        f"{self.kind} {name!r} ({place(factory)}): cannot be hashed; give a function"
      ) from None
    except ValueError as error:  # a builtin of unknown signature, or a partial application that does not fit
      raise InputError(f"{self.kind} {name!r}: {error}") from None
    options = {n: p for n, p in parameters.items() if n not in self.offered}
    for option, parameter in options.items():
      if parameter.default is inspect.Parameter.empty:
        raise InputError(
          f"{self.kind} {name!r} ({place(factory)}): takes {option!r}, which is neither offered "
          f"({', '.join(self.offered) or 'nothing is'}) nor an option with a default"
        )
    return options

  def _method(self, name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> Method:
    options = self._options(factory, name)
    for option in given:
      if option not in options:
        raise InputError(f"{self.kind} {name!r}: no option {option!r}; options: {_describe(options)}")
    values = {n: p.default for n, p in options.items()} | dict(given)
    inner = self._inner(values)
    values |= {option: as_inner(method) for option, method in inner if not isinstance(values[option], str)}
    code = "" if is_builtin(factory) else digest(factory)
    return Method(factory, tuple(values.items()), code, name, inner)

  def _inner(self, options: Mapping[str, Any]) -> tuple[tuple[str, Method], ...]:
    """The part that an option names. A text without a known name is left to the factory, which may mean another thing."""
    spec = inner_spec(options.get(self.wraps))
    is_known = spec.partition(":")[0].strip() in self if isinstance(spec, str) else callable(spec)
    return ((self.wraps, self.resolve(spec)),) if is_known else ()

  def _parse(self, spec: str) -> Method:
    name, *fields = [field.strip() for field in spec.split(":")]
    if name not in self:
      raise unknown_name(self.kind, name, self)
    options = self._options(self[name], name)
    given: dict[str, Any] = {}
    for i, field in enumerate(fields):
      option, equals, text = (part.strip() for part in field.partition("="))
      if not equals:
        if i >= len(options):
          raise InputError(f"{self.kind} {spec!r}: takes {len(options)} values: {_describe(options)}")
        option, text = list(options)[i], field
      if option not in options:
        raise InputError(f"{self.kind} {spec!r}: no option {option!r}; options: {_describe(options)}")
      if option in given:
        raise InputError(f"{self.kind} {spec!r}: {option} is given twice")
      given[option] = parse_value(f"{self.kind} {spec!r}", options[option], text)
    return self._method(name, self[name], given)


def split_methods(spec: str) -> list[str]:
  """`"a:1,b:2+c"` -> `["a:1", "b:2", "c"]`."""
  parts = [part.strip() for part in spec.replace("+", ",").split(",")]
  return [part for part in parts if part]


def inner_spec(spec: Any) -> Any:
  """Returns the spec of a part inside of another one, where `;` stands for `:`, as in `low_rank:mixer=attention;window=8`."""
  return spec.replace(";", ":") if isinstance(spec, str) else spec


def as_inner(spec: Spec) -> str:
  """Returns the text of a method as an option of another one, see `inner_spec`."""
  return str(spec).replace(":", ";")


@functools.cache
def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
  """The parameters of a factory, by name."""
  if isinstance(factory, type):  # not the class itself: a metaclass may hide what __init__ takes
    parameters = list(inspect.signature(factory.__init__).parameters.values())[1:]
  else:
    parameters = list(inspect.signature(factory).parameters.values())
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  return {p.name: p for p in parameters if p.kind not in variadic}


def _same_place(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
  """Whether one is a new definition of the other: both have the same name and the same module or file."""
  one, other = definition(one), definition(other)
  if one.__qualname__ != other.__qualname__:
    return False
  file = lambda f: place(f).rpartition(":")[0]
  return one.__module__ == other.__module__ or file(one) == file(other) != ""


def _describe(options: Mapping[str, inspect.Parameter]) -> str:
  return ", ".join(f"{p.name}={p.default}" for p in options.values()) or "none"


def _to_text(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def parse_value(what: str, parameter: inspect.Parameter | dataclasses.Field, text: str) -> Any:
  """Returns `text` as a value of the type of the parameter's default.

  Raises:
    InputError: if it is none. The message starts with `what`.
  """
  kind = type(parameter.default)
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise InputError(f"{what}: {parameter.name} must be true or false, got {text!r}")
    return text.lower() == "true"
  try:
    value = kind(text)
  except (TypeError, ValueError):
    raise InputError(f"{what}: {parameter.name} must be {kind.__name__}, got {text!r}") from None
  if kind is float and not math.isfinite(value):
    raise InputError(f"{what}: {parameter.name} must be finite, got {text!r}")
  return value
