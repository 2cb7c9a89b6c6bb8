"""Imports a user's files, so that the parts they register can be named on the command line."""

import importlib
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Iterable

from moe_jax.errors import InputError


def import_plugins(plugins: Iterable[str]) -> None:
  """Imports files (`my_router.py`) and modules (`my_package.routers`), each once.

  Raises:
    InputError: if a plugin is not found or fails to import. The message has the file and line.
  """
  for plugin in plugins:
    try:
      _import(plugin)
    except InputError as error:
      line = _where(error, plugin)
      raise InputError(f"--plugins={plugin}: {'' if line == plugin else f'{line}: '}{error}") from None
    except Exception as error:
      raise InputError(
        f"--plugins={plugin}: {_where(error, plugin)}: {type(error).__name__}: {error}"
      ) from None


def _import(plugin: str) -> None:
  if not plugin.endswith(".py"):
    try:
      importlib.import_module(plugin)
    except ModuleNotFoundError as error:
      if error.name and plugin.startswith(error.name):
        raise InputError("no such module; a file is named with its .py") from None
      raise
    return
  path = pathlib.Path(plugin).expanduser().resolve()
  if not path.is_file():
    raise InputError("no such file")
  name = f"moe_jax_plugin_{path.stem}"
  known = sys.modules.get(name)
  if known is not None and getattr(known, "__file__", "") == str(path):
    return
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise


def _where(error: Exception, plugin: str) -> str:
  """file:line in the plugin itself, as far as the error says it."""
  if isinstance(error, SyntaxError):
    return f"{error.filename}:{error.lineno}"
  name = pathlib.Path(plugin).name
  own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(name)]
  return f"{own[-1].filename}:{own[-1].lineno}" if own else plugin
