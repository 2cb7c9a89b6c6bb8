"""Identity of a user's code: where it is defined, and a digest that changes when the code does."""

import dis
import functools
import hashlib
import inspect
import linecache
import pathlib
import types
from collections.abc import Callable
from typing import Any

_PACKAGE = __name__.partition(".")[0]


def is_builtin(code: Callable[..., Any]) -> bool:
  """Returns whether `code` is part of this package."""
  return (getattr(inspect.unwrap(code), "__module__", None) or "").partition(".")[0] == _PACKAGE


@functools.cache
def of_package() -> str:
  """Returns a digest of the sources of this package. It tells two commits, or an edit, apart where the version does not."""
  root, found = pathlib.Path(__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    source = path.read_bytes()
    found.update(f"{path.relative_to(root).as_posix()}\0{len(source)}\0".encode() + source)
  return found.hexdigest()[:12]


def place(code: Callable[..., Any]) -> str:
  """Returns `file:line` of a definition, or its module if Python does not know the file."""
  code = inspect.unwrap(code)
  try:
    return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
  except (OSError, TypeError):
    return getattr(code, "__module__", None) or "an unknown place"


def digest(code: Callable[..., Any]) -> str:
  """Returns a digest of the source of `code`, and of what it uses of its module.

  That is functions, classes and plain constants. What it imports from other modules is not included.

  A comparison folder stores it, to notice that the code behind a name has changed. For code without source,
  such as a function typed into an interpreter, the digest is of its instructions.
  """
  parts: list[str] = []
  _collect(inspect.unwrap(code), parts, set())
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _collect(code: Any, parts: list[str], seen: set[int]) -> None:
  if id(code) in seen:
    return
  seen.add(id(code))
  parts.append(_source(code))
  for base in getattr(code, "__bases__", ()):
    if base.__module__ == code.__module__:
      _collect(base, parts, seen)
  for function in _functions(code):
    if function is not code:
      parts.append(_source(function))
    for name, value in _used(function):
      if isinstance(value, types.FunctionType | type):
        if value.__module__ == code.__module__:
          _collect(value, parts, seen)
      elif _is_plain(value):
        parts.append(f"{name}={value!r}")


def _source(code: Any) -> str:
  """Returns the text that a function was compiled from.

  For a class, its plain attributes; its functions follow.
  """
  if isinstance(code, type):
    plain = {k: v for k, v in vars(code).items() if isinstance(v, int | float | str) and k[:2] != "__"}
    return f"{code.__qualname__} {[base.__qualname__ for base in code.__bases__]} {plain}"
  # Not inspect.getsource: where a cell names a module, it reads the module's file instead.
  lines = linecache.getlines(code.__code__.co_filename, code.__globals__)
  block = lines[code.__code__.co_firstlineno - 1 :]
  return "".join(inspect.getblock(block)) if block else _instructions(code.__code__)


def _instructions(code: types.CodeType) -> str:
  nested = [_instructions(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
  return f"{code.co_code.hex()} {code.co_names} {nested}"


def _is_plain(value: Any) -> bool:
  """Returns whether `repr(value)` is the same in every process."""
  if isinstance(value, tuple):
    return all(map(_is_plain, value))
  return isinstance(value, int | float | str | bytes | None)


def _functions(code: Any) -> list[types.FunctionType]:
  """Returns the functions that a function or a class consists of."""
  if isinstance(code, types.FunctionType):
    return [code]
  members = vars(code).values() if isinstance(code, type) else ()
  inner = [getattr(m, "__func__", getattr(m, "fget", m)) for m in members]  # of static methods and properties
  return [f for f in inner if isinstance(f, types.FunctionType)]


def _used(function: types.FunctionType) -> list[tuple[str, Any]]:
  """(name, value) of the globals and outer variables that a function reads, nested functions included."""
  names, waiting = set(), [function.__code__]
  while waiting:
    code = waiting.pop()
    names.update(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
  found = [(name, function.__globals__[name]) for name in sorted(names) if name in function.__globals__]
  for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
    try:
      found.append((name, cell.cell_contents))
    except ValueError:  # not assigned yet
      continue
  return found
