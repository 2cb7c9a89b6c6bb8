"""Reads one checkpoint. Tells bytes that are damaged from a machine that cannot read them now."""

import contextlib
import gc
import logging
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from moe_jax import disk
from moe_jax.errors import InputError, is_of_the_machine
from moe_jax.training import digests
from moe_jax.types import PyTree


class Found(NamedTuple):
  """What reading a checkpoint gave. Where one of the two texts is not empty, `state` and `kept` are not whole."""

  state: PyTree = None
  kept: dict[str, Any] | None = None  # what was saved beside the arrays: their digests, and `extra`
  damaged: str = ""  # what is wrong with the bytes
  failed: str = ""  # why this process cannot read them, which may pass


def read_checkpoint(folder: pathlib.Path, target: PyTree) -> Found:
  """Reads the checkpoint of one step, without Orbax's manager, whose barriers would wait for a process that cannot read.

  Args:
    folder: of the step.
    target: the shape, type and layout of every array.

  Raises:
    InputError: if it holds other arrays, is of a version without digests, or should be on devices of other processes.
  """
  if not all(leaf.sharding.addressable_devices for leaf in jax.tree.leaves(target)):
    raise InputError(
      f"{folder}: process {jax.process_index()} has none of the devices that the arrays should be on; choose devices of "
      "every process"
    )
  beside = read_beside(folder)
  if beside.damaged or beside.failed:
    return beside
  _check_same_arrays(folder, beside.kept["arrays"], target)
  with _without_echo():
    handler = ocp.StandardCheckpointHandler()
    try:
      state = handler.restore(folder / "state", args=ocp.args.StandardRestore(target))
      return Found(state, beside.kept)
    except Exception as error:  # whatever damaged bytes lead to
      found = _of(error, "its arrays cannot be read")
      time.sleep(0.3)  # other reads that were under way fail, too
    finally:
      handler.close()
    gc.collect()  # reads that Orbax has dropped end here, unheard
  return found


def read_beside(folder: pathlib.Path) -> Found:
  """Reads what was saved beside the arrays of one step. `state` is None.

  Raises:
    InputError: if the checkpoint is of a version without digests.
  """
  try:
    kept = disk.parse_json((folder / "extra" / "metadata").read_text())
    old = not {disk.DIGEST, "arrays"} & kept.keys()
    if not old and not (disk.DIGEST in kept and disk.has_its_digest(kept)):
      return Found(damaged="its position in the data does not have the digest that was saved")
  except (OSError, MemoryError, ValueError, AttributeError, RecursionError) as error:
    return _of(error, "its position in the data cannot be read")
  if old:
    raise InputError(f"{folder}: a checkpoint of another version of moe_jax, without digests; train anew")
  return Found(kept=kept)


def differing(saved: dict[str, list], restored: dict[str, list]) -> str:
  """Returns which arrays do not have the digest that was saved, in words; empty: all have."""
  different = [name for name, value in saved.items() if restored[name] != value]
  if not different:
    return ""
  return (
    f"{len(different)} of {len(saved)} arrays do not have the digest that was saved, such as {different[0]}"
  )


def _of(error: Exception, what: str) -> Found:
  text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
  return Found(failed=text) if is_of_the_machine(error) else Found(damaged=f"{what}: {text}")


def _check_same_arrays(folder: pathlib.Path, saved: dict[str, list], target: PyTree) -> None:
  expected = digests.kinds_of_arrays(target)
  kinds = {name: kind for name, (kind, _) in saved.items()}
  different = sorted(name for name in kinds | expected if kinds.get(name) != expected.get(name))
  if different:
    name = different[0]
    raise InputError(
      f"{folder}: a checkpoint of another configuration or version of moe_jax "
      f"({len(different)} arrays differ, such as {name}: saved {kinds.get(name, 'nothing')}, "
      f"expected {expected.get(name, 'nothing')}); choose an empty folder, or what wrote this one"
    )


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
  """Keeps the reads that Orbax drops when one of them fails from printing a page each."""
  hook, log = sys.unraisablehook, logging.getLogger("asyncio")
  before = log.disabled
  sys.unraisablehook, log.disabled = lambda _: None, True
  try:
    yield
  finally:
    sys.unraisablehook, log.disabled = hook, before
