"""Orbax checkpoints of a train state and the position in the data, with a digest of every array.

Orbax 0.12 has no digests of its own for this format (its b-tree nodes have checksums, array chunks have none), so a
flipped bit comes back as another number. A digest is computed where the array is, from bits and places, so it is the same on
every mesh and costs one pass over the state.
"""

import contextlib
import os
import pathlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.errors import InputError
from moe_jax.training import digests, idle_saver, reading
from moe_jax.training.orbax_writer import OrbaxWriter, Unshared
from moe_jax.types import PyTree


class Checkpoints:
  """The checkpoints of one run: saved in the background, restored onto any mesh.

  One process copies the arrays to host memory, and a thread does the rest. Of several, each saves the parts that its
  devices hold, so all must call the same methods in the same order; digests are then computed together, before the rest goes to
  Orbax's threads.

  Args:
    folder: created when the first checkpoint is saved; all processes must see the same folder.
    keep: how many of the newest checkpoints to keep.

  Raises:
    InputError: if the name of the folder cannot be used, or is that of a file, or the processes see different checkpoints in it.
  """

  def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    disk.check_name(self.folder)
    self._writer = OrbaxWriter(self.folder, keep)
    self._thread = ThreadPoolExecutor(1, "moe_jax save")
    self._saver = idle_saver.IdleSaver(self.folder, keep)
    self._shared: idle_saver.SharedArrays | None = None  # the copy of the state that the process writes
    self._saving: Future[None] | None = None
    self._steps = self._list()
    processes.check_agree(
      self._steps,
      f"{self.folder}: steps of the checkpoints",
      "the folder must be on a file system that all processes share",
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, or None. It may still be under way, or damaged."""
    return max(self._steps, default=None)

  def _list(self) -> list[int]:
    if not self.folder.is_dir():
      if self.folder.exists():
        raise InputError(
          f"{self.folder}: is a file, and the folder of checkpoints should be there; move it away"
        )
      return []
    return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

  def save(self, step: int, state: PyTree, extra: dict[str, Any], *, steps_follow: bool = False) -> None:
    """Saves `state` (arrays) and `extra` (JSON values). Does nothing if the step is already saved.

    Returns while the save is under way; `state` may be donated then. Waits for the save before. If that has failed,
    waits for this one, too, and then raises what that failed with.

    Args:
      step: of the state.
      state: always of the same structure, shapes and types.
      extra: what is kept beside it.
      steps_follow: whether the caller goes on to compute. One process on Linux then leaves the writing to another, which
        takes little from what is computed (`idle_saver`). It is not waited for: where that becomes necessary, this
        process writes the checkpoint, and all that come later.
    """
    if step in self._steps:
      return
    failure = None
    try:
      self.wait()
    except Exception as error:  # of the save before
      failure = error
    if jax.process_count() > 1:
      self._writer.write(step, state, extra)
    elif (beside := steps_follow and self._can_share(state)) or self._shared:
      self._saving = self._thread.submit(self._write_shared, step, self._shared.copy(state), extra, beside)
    else:
      self._saving = self._thread.submit(self._write_and_wait, step, _host_copy(state), extra)
    self._steps.append(step)
    if failure:
      with contextlib.suppress(Exception):  # the first failure says why
        self.wait()
      raise failure

  @property
  def is_saving(self) -> bool:
    """Whether a save of this process, if it is the only one, is under way."""
    return bool(self._saving and not self._saving.done())

  @property
  def has_failed(self) -> bool:
    """Whether a save has failed and nobody knows yet. Of several processes, one that fails ends all at once."""
    return bool(self._saving and self._saving.done() and self._saving.exception())

  def _can_share(self, state: PyTree) -> bool:
    """Returns whether a process of its own may write a copy of `state`, for which there is room in `_shared` then."""
    if not idle_saver.AVAILABLE or self._saver.ended:
      return False
    if self._shared is None:
      try:
        self._shared = idle_saver.SharedArrays(state)
      except OSError:
        return False
    return True

  def _write_and_wait(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    self._writer.write(step, state, extra)
    self._writer.wait()

  def _write_shared(self, step: int, rest: list, extra: dict[str, Any], beside: bool) -> None:
    """Writes what is in shared memory, with `rest`: in a process of its own if `beside` and that works, else here."""
    self._shared.fill(rest)
    if not (beside and self._saver.save(self._shared, step, extra)):
      self._write_and_wait(step, self._shared.tree(), extra)

  def wait(self) -> None:
    """Waits for a save that is under way. Raises what it failed with, once."""
    try:
      if saving := self._saving:
        if self.is_saving:
          self._saver.end()
        try:
          saving.result()
        finally:
          if saving.done():  # not where a signal ended the wait
            self._saving = None
      self._writer.wait()
    except Exception:
      self._steps = self._list()
      raise

  def restore(
    self, abstract_state: PyTree, shardings: PyTree, *, move_damaged: bool = False
  ) -> tuple[PyTree, dict[str, Any]]:
    """Returns (state, extra) of the newest whole checkpoint, with each array laid out by its entry in `shardings`.

    A damaged checkpoint is passed over, and one line says so.

    Args:
      abstract_state: the arrays that are expected.
      shardings: of each.
      move_damaged: whether to move a damaged checkpoint to the folder `damaged` of the run, so that its step can be
        saved again. Only for the owner of the run.

    Raises:
      InputError: if a checkpoint holds other arrays than `abstract_state`, none is whole, processes read different
        files, or a process cannot read one for a reason that says nothing about its bytes. Nothing is moved then.
    """
    self.wait()
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      abstract_state,
      shardings,
    )
    damaged = []
    for step in sorted(self._steps, reverse=True):
      found = reading.read_checkpoint(self.folder / str(step), target)
      self._check_readable(step, found.failed)
      problem = _of_any(found.damaged)
      if not problem:  # a digest of arrays that all hold together cannot tell whose files they are of
        what = f"{self.folder / str(step)}: digest of what was saved"
        processes.check_agree(found.kept[disk.DIGEST], what, "all processes must read the same files")
        problem = _of_any(reading.differing(found.kept["arrays"], digests.array_digests(found.state)))
      if not problem:
        return found.state, found.kept["extra"]
      damaged.append(f"the checkpoint of step {step} is damaged ({problem})")
      place = self._pass_over(step, move_damaged)
      if processes.is_first():
        disk.note(f"{self.folder}: {damaged[-1]} and passed over{place}")
    raise InputError(
      f"{self.folder}: no checkpoint is whole: {'; '.join(damaged)}; "
      f"{'the same command now begins anew, or restore' if move_damaged else 'restore'} the folder from a copy"
    )

  def _check_readable(self, step: int, failed: str) -> None:
    """Raises `InputError` in all processes if one of them cannot read a checkpoint that may be whole."""
    failures = processes.from_all(failed)
    if any(failures):
      index = next(i for i, text in enumerate(failures) if text)
      who = f"process {index} " if len(failures) > 1 else ""
      raise InputError(
        f"{self.folder / str(step)}: {who}cannot read it now ({failures[index]}), which does not say that it is damaged; "
        "nothing was changed, and the same command continues from it when it can be read. To continue from the one "
        "before it, move this folder away"
      )

  def _pass_over(self, step: int, move: bool) -> str:
    """Returns where the checkpoint of `step` was moved, in words."""
    self._steps.remove(step)
    if not move:
      return ""
    place = ""
    with processes.refused_together():  # where it stays, its step could not be saved again
      if processes.is_first():
        place = str(disk.move_aside(self.folder / str(step), self.folder.parent))
    return f", moved to {processes.from_first(place)}"

  def close(self) -> None:
    """Waits for pending saves to finish and closes the manager."""
    try:
      self.wait()
    finally:
      self._saver.close()
      self._thread.shutdown()
      if self._shared:
        self._shared.close()
        self._shared = None
      self._writer.close()


def _of_any(problem: str) -> str:
  """Returns the problem of the first process that has one, in all; empty: none has."""
  return next(filter(None, processes.from_all(problem)), "")


def _host_copy(tree: PyTree) -> PyTree:
  """Copies all arrays to host memory. They stay what they are when the next step reuses those on devices."""
  for leaf in jax.tree.leaves(tree):
    if not digests.in_host_memory(leaf):
      leaf.copy_to_host_async()
  # NumPy's view of an array on a CPU is the array itself.
  copies = jax.tree.map(lambda x: np.array(x) if digests.in_host_memory(x) else np.asarray(x), tree)
  return jax.tree.map(lambda x: x.view(Unshared), copies)
