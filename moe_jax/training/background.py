"""Saves that fail in the background. Orbax says so in pages, much later, and to one process only."""

import logging
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from orbax.checkpoint import multihost

from moe_jax.cluster import watch
from moe_jax.training.stops import in_words


def barrier(folder: pathlib.Path, *, key: str, timeout_ms: int) -> None:
  """Orbax's barrier of the threads that finish a save in `folder`, for `AsyncOptions.barrier_sync_fn`.

  A process that could not write its part comes here while the exception is on its way up. The others would wait 20
  minutes for it, at a barrier to which it does not come. So all processes end here. A process that is alone raises the
  exception at its next save.
  """
  error = sys.exc_info()[1]
  if error is not None:
    line = in_words(error, "", folder)
    text = f"{folder}: a save failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    watch.stop_all(str(line or text), 2 if line else 1, trace="" if line else traceback.format_exc())
  multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


_LEFT = "Attempted to create temporary directory"  # begins its line about one that a save has left


class _NotOfOrbax(logging.Filter):
  """Leaves out what Orbax logs of an exception that it also raises, and that it removes what is left of such a save."""

  def filter(self, record: logging.LogRecord) -> bool:
    of_orbax = "orbax" in record.pathname
    if record.exc_info:
      return not (of_orbax or record.name == "asyncio")
    return not (of_orbax and str(record.msg).startswith(_LEFT))


_filter = _NotOfOrbax()


def silence() -> None:
  """Keeps a failed save from printing its exception many times, once for each array. The run ends with it, in one line."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_filter)  # once, however often it is added
  if not isinstance(sys.unraisablehook, _Hook):
    sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook(NamedTuple):
  """Leaves out that writes which were under way when another one failed find their loop closed."""

  before: Callable[[Any], None]

  def __call__(self, found: Any) -> None:
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
      self.before(found)
