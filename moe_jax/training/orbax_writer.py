"""Writes checkpoints with Orbax, with a digest of every array, in whichever process that is."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import disk
from moe_jax.errors import InputError
from moe_jax.training import background
from moe_jax.types import PyTree

_CHUNK = 2**26  # bytes of a large array that are written, and can be read, as one


class Unshared(np.ndarray):
  """An array that nobody changes. Orbax copies each array before it writes, in case somebody does."""

  def __deepcopy__(self, memo: dict[int, Any]) -> np.ndarray:
    return self


class OrbaxWriter:
  """Orbax's manager of the checkpoints in one folder, made with the first that is written.

  Args:
    folder: created if it is not there.
    keep: how many of the newest checkpoints to keep.
    collectives: whether processes that write together wait for each other with collectives of their devices, and end together where
      one fails, as those of a run do. If not, the store of `jax.distributed` is enough.
  """

  def __init__(self, folder: pathlib.Path, keep: int, *, collectives: bool = True):
    self._folder, self._keep, self._collectives = folder, keep, collectives
    self._manager: ocp.CheckpointManager | None = None

  def write(self, step: int, state: PyTree, extra: dict[str, Any], found: dict[str, list]) -> None:
    """Begins to write a checkpoint. All processes must call it with their parts of the arrays.

    Args:
      step: of the state.
      state: arrays.
      extra: JSON values of the first process.
      found: the digests of the arrays, as `digests.array_digests` returns them. Those of the first process count.

    Raises:
      InputError: if there is one of that step, or of a later one.
    """
    if self._manager is None:
      self._manager = self._new_manager()
    kept = {"arrays": found, "extra": extra}
    parts = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state, parts),
      extra=ocp.args.JsonSave(disk.with_digest(kept)),
    )
    if not self._manager.save(step, args=items):
      raise InputError(
        f"{self._folder}: step {step} was not saved, because Orbax finds it or a later step there; move that folder away"
      )

  def _new_manager(self) -> ocp.CheckpointManager:
    background.silence()
    if self._collectives:
      among = ocp.options.MultiprocessingOptions()
      barrier = functools.partial(background.barrier, self._folder)
    else:
      among = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
      barrier = None
      self._folder.mkdir(parents=True, exist_ok=True)  # Orbax refuses to
    handlers = {
      "state": ocp.StandardCheckpointHandler(multiprocessing_options=among),
      "extra": ocp.JsonCheckpointHandler(multiprocessing_options=among),
    }
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep,
      create=self._collectives,
      cleanup_tmp_directories=True,  # of saves whose process was killed
      async_options=ocp.options.AsyncOptions(barrier_sync_fn=barrier),
      multiprocessing_options=among,
    )
    return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

  @property
  def is_writing(self) -> bool:
    """Whether threads of this process still write."""
    return bool(self._manager and self._manager.is_saving_in_progress())

  def wait(self) -> None:
    """Waits until all is written. Raises what that failed with."""
    if self._manager:
      self._manager.wait_until_finished()

  def close(self) -> None:
    if self._manager:
      self._manager.close()
