"""Identity of a user's code: where it is defined, and a digest that changes when the code does."""

import ast
import dis
import functools
import hashlib
import inspect
import linecache
import pathlib
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_CODE = (types.FunctionType, types.MethodType, type)
_STARTED = time.time()  # files that are newer may have been edited after they were imported
_OF_LIBRARIES = ("__", "_pytree__", "_object__")  # attributes that Python and Flax give to classes


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


def definition(code: Callable[..., Any]) -> Any:
  """Returns the function or class behind a decorator or a partial application; of an object that can be called, its class."""
  code = inspect.unwrap(code)
  while isinstance(code, functools.partial):
    code = inspect.unwrap(code.func)
  is_code = isinstance(code, (*_CODE, types.BuiltinFunctionType))
  return code if is_code else type(code)


def place(code: Callable[..., Any]) -> str:
  """Returns `file:line` of a definition, or its module if Python does not know the file."""
  code = definition(code)
  try:
    return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
  except (OSError, TypeError):
    return getattr(code, "__module__", None) or "an unknown place"


def digest(code: Callable[..., Any]) -> str:
  """Returns a digest of the source of `code`, and of what it uses of its module.

  That is functions, also decorated ones, classes, and constants: numbers, text and arrays. Also those in tuples, lists and dicts, and
  among the attributes of objects whose class is in the module. What it imports from other modules is not included. Of a partial
  application, its arguments are, and of an object that can be called, its class and such constants among its attributes.

  A comparison folder stores it, to notice that the code behind a name has changed. For code without source,
  such as a function typed into an interpreter, the digest is of its instructions, and so it is for code whose file was edited since
  it was imported.
  """
  code, parts = inspect.unwrap(code), []
  if not isinstance(code, _CODE):
    return digest_of_all([code])
  _collect(code, parts, set())
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def digest_of_all(parts: Iterable[Any]) -> str:
  """Returns a digest of functions, and of what partial applications and objects that can be called are made of.

  What JAX, NumPy and this package define counts by its name: another version of them is no other code of the user.
  """
  return hashlib.sha256("\0".join(_identity(part) for part in parts).encode()).hexdigest()[:12]


def _identity(part: Any) -> str:
  if isinstance(part, str):
    return part
  value, arguments = _inside(part)
  name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
  if isinstance(value, types.FunctionType | type):
    is_library = name.partition(".")[0] in (_PACKAGE, "jax", "numpy")
    of_value = name if is_library else digest(value)
  elif isinstance(value, tuple):
    of_value = str([_identity(each) for each in value])
  elif _is_plain(value):
    of_value = _text(value)
  elif not isinstance(value, types.BuiltinFunctionType) and hasattr(value, "__dict__"):
    plain = {key: _text(each) for key, each in vars(value).items() if _is_plain(each)}
    of_value = f"{_identity(type(value))} {plain}"
  else:
    of_value = name
  return str([of_value, *map(_identity, arguments)])


def _collect(code: Any, parts: list[str], seen: set[int]) -> None:
  if id(code) in seen:
    return
  seen.add(id(code))
  parts.append(_source(code))
  for base in getattr(code, "__bases__", ()):
    if base.__module__ == code.__module__:
      _collect(base, parts, seen)
  for name, found in sorted(vars(code).items()) if isinstance(code, type) else ():
    if (
      not name.startswith(_OF_LIBRARIES)
      and not _is_plain(found)
      and not isinstance(_inside(found)[0], (*_CODE, types.BuiltinFunctionType))
    ):
      _collect_value(name, found, code.__module__, parts, seen)
  for function in _functions(code):
    if function is not code:
      parts.append(_source(function))
    defaults = {"defaults": function.__defaults__, "kwdefaults": function.__kwdefaults__}
    for name, found in [*((k, v) for k, v in defaults.items() if v), *_used(function)]:
      _collect_value(name, found, code.__module__, parts, seen)


def _collect_value(name: str, found: Any, module: str, parts: list[str], seen: set[int]) -> None:
  """Adds what a name stands for, as far as it is defined in `module`."""
  value, constants = _inside(found)
  for constant in (value, *constants):
    if isinstance(constant, types.MethodType):
      _collect_value(name, constant.__func__, module, parts, seen)
      constant = constant.__self__
    if isinstance(constant, types.FunctionType | type):
      if constant.__module__ == module:
        _collect(constant, parts, seen)
    elif _is_plain(constant):
      parts.append(f"{name}={_text(constant)}")
    elif id(constant) not in seen:
      seen.add(id(constant))
      for key, part in _parts_of(constant, module):
        _collect_value(f"{name}.{key}", part, module, parts, seen)


def _parts_of(value: Any, module: str) -> list[tuple[str, Any]]:
  """Returns what containers hold, and the class and the attributes of an object of a class of `module`, each with a name."""
  if isinstance(value, tuple | list):
    return [(str(i), part) for i, part in enumerate(value)]
  if isinstance(value, dict):
    return [(_text(key) if _is_plain(key) else str(i), part) for i, (key, part) in enumerate(value.items())]
  if type(value).__module__ != module and not isinstance(value, types.SimpleNamespace):
    return []
  return [("class", type(value)), *sorted(getattr(value, "__dict__", {}).items())]


def _inside(value: Any) -> tuple[Any, list[Any]]:
  """Returns what decorators and partial applications stand for, and the arguments that these have."""
  arguments: list[Any] = []
  while True:
    if isinstance(value, functools.partial | functools.partialmethod):
      arguments += [*value.args, *value.keywords.items()]
      value = value.func
    elif isinstance(value, functools.cached_property):
      value = value.func
    elif isinstance(value, property):
      value = value.fget
    elif isinstance(value, staticmethod | classmethod):
      value = value.__func__
    elif not isinstance(value, type) and callable(getattr(value, "__wrapped__", None)):
      if isinstance(value, types.FunctionType) and _file(value) == _file(value.__wrapped__):
        arguments.append(value.__wrapped__)  # a decorator of the same file counts, too
        return value, arguments
      value = value.__wrapped__
    else:
      return value, arguments


def _file(function: Any) -> str:
  code = getattr(function, "__code__", None)
  return code.co_filename if code else ""


def _source(code: Any) -> str:
  """Returns the text that a function was compiled from.

  For a class, its plain attributes; its functions follow.
  """
  if isinstance(code, type):
    plain = {k: _text(v) for k, v in vars(code).items() if _is_plain(v) and not k.startswith(_OF_LIBRARIES)}
    return f"{code.__qualname__} {[base.__qualname__ for base in code.__bases__]} {plain}"
  # Not inspect.getsource: where a cell names a module, it reads the module's file instead.
  file, first = code.__code__.co_filename, code.__code__.co_firstlineno
  linecache.checkcache(file)  # of a file that was edited and imported again, the old text is there
  lines = linecache.getlines(file, code.__globals__)
  if not lines[first - 1 :] or _is_stale(code.__code__, lines):
    return _instructions(code.__code__)
  if code.__name__ == "<lambda>" and (last := _last_line(lines, first)):
    return "".join(lines[first - 1 : last])
  return "".join(inspect.getblock(lines[first - 1 :]))


def _last_line(lines: list[str], first: int) -> int:
  """Returns the last line of the lambdas that begin in line `first`; 0 if none are found. A block of lines would end with the first one."""
  try:
    nodes = ast.walk(ast.parse("".join(lines)))
  except SyntaxError:
    return 0
  return max((x.end_lineno or 0 for x in nodes if isinstance(x, ast.Lambda) and x.lineno == first), default=0)


def _is_stale(code: types.CodeType, lines: list[str]) -> bool:
  """Returns whether `code` was compiled from other text than its file has now, which may be newer than this process."""
  try:
    if pathlib.Path(code.co_filename).stat().st_mtime < _STARTED:
      return False
    waiting = [compile("".join(lines), code.co_filename, "exec", dont_inherit=True)]
  except (OSError, SyntaxError, ValueError):
    return pathlib.Path(code.co_filename).is_file()
  place = lambda c: (c.co_qualname, c.co_firstlineno)
  while waiting:
    found = waiting.pop()
    if place(found) == place(code) and _instructions(found) == _instructions(code):
      return False
    waiting += [c for c in found.co_consts if isinstance(c, types.CodeType)]
  return True


def _instructions(code: types.CodeType) -> str:
  nested = [_instructions(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
  return f"{code.co_code.hex()} {code.co_names} {nested}"


def _is_plain(value: Any) -> bool:
  """Returns whether `_text(value)` is the same in every process."""
  if isinstance(value, tuple | list):
    return all(map(_is_plain, value))
  if isinstance(value, dict):
    return all(map(_is_plain, [*value, *value.values()]))
  if isinstance(value, set | frozenset):
    return all(map(_is_plain, value))
  return isinstance(value, int | float | complex | str | bytes | range | None) or hasattr(
    value, "__array_interface__"
  )


def _text(value: Any) -> str:
  """Returns `repr(value)`, with every number of an array, which `repr` may leave out."""
  if isinstance(value, tuple | list):
    return f"{type(value).__name__}{[_text(part) for part in value]}"
  if isinstance(value, dict):
    return str({_text(key): _text(part) for key, part in value.items()})
  if isinstance(value, set | frozenset):
    return f"{type(value).__name__}{sorted(map(_text, value))}"
  if hasattr(value, "__array_interface__"):
    return f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"
  return repr(value)


def _functions(code: Any) -> list[types.FunctionType]:
  """Returns the functions that a function or a class consists of."""
  if isinstance(code, types.FunctionType):
    return [code]
  members = vars(code).values() if isinstance(code, type) else ()
  inner = [_inside(member) for member in members]
  return [f for value, more in inner for f in (value, *more) if isinstance(f, types.FunctionType)]


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
