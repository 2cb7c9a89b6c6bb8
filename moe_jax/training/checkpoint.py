"""Orbax checkpoints of a train state and the position in the data, with a digest of every array.

Orbax 0.12 has no digests of its own for this format (its b-tree nodes have checksums, array chunks have none), so a
flipped bit comes back as another number. A digest is computed where the array is, from bits and places, so it is the same on
every mesh and costs one pass over the state.
"""

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.errors import InputError
from moe_jax.training import digests, reading
from moe_jax.training.saving import Alone, Together
from moe_jax.types import PyTree


class Checkpoints:
  """The checkpoints of one run: saved in the background, restored onto any mesh.

  Arrays are copied to host memory, and the rest is done in the background (`saving`). Of several processes, each saves the parts that its
  devices hold, so all must call the same methods in the same order.

  Args:
    folder: created when the first checkpoint is saved; all processes must see the same folder.
    keep: how many of the newest checkpoints to keep.

  Raises:
    InputError: if the name of the folder cannot be used, or is that of a file, or the processes see different checkpoints in it.
  """

  def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    disk.check_name(self.folder)
    self._saves = (Together if jax.process_count() > 1 else Alone)(self.folder, keep)
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

  def prepare(self, state: PyTree) -> None:
    """Does what a first save would take time for, before the first step. Later states have the same structure, shapes and types."""
    self._saves.prepare(state)

  def before_save(self, state: PyTree, steps_follow: bool) -> Any:
    """Returns what the other processes must know before they save `state`, a JSON value.

    They may be told together with other things. `save` of this state must come next.
    """
    return self._saves.before_save(state, steps_follow)

  def save(
    self,
    step: int,
    state: PyTree,
    extra: dict[str, Any],
    *,
    steps_follow: bool = False,
    first: Sequence[pathlib.Path] = (),
    said: Sequence[Any] | None = None,
  ) -> None:
    """Saves `state` (arrays) and `extra` (JSON values). Does nothing if the step is already saved.

    Returns while the save is under way; `state` may be donated then. Waits for the save before. If that has failed,
    waits for this one, too, and then raises what that failed with.

    Args:
      step: of the state.
      state: always of the same structure, shapes and types.
      extra: what is kept beside it.
      steps_follow: whether the caller goes on to compute. On Linux, the writing is then left to a process beside this one, which
        takes little from what is computed (`idle_saver`). Where it is not done when that is necessary, a process that is alone
        writes the checkpoint itself; several wait for theirs, and save again where one has failed (`has_failed`).
      first: files of this process that must be on disk before the checkpoint is there.
      said: `before_save` of all processes, by process. None: they tell each other here.
    """
    if step in self._steps:
      return
    failure = None
    if said is None:
      said = processes.from_all(self.before_save(state, steps_follow))
    try:
      if self._saves.settle(said, steps_follow):
        self._steps = processes.from_first(self._list())
    except Exception as error:  # of the save before
      failure, self._steps = error, self._list()
    self._saves.save(step, state, extra, steps_follow, first)
    self._steps.append(step)
    if failure:
      with contextlib.suppress(Exception):  # the first failure says why
        self.wait()
      raise failure

  @property
  def is_saving(self) -> bool:
    """Whether this process, or the one beside it, still writes."""
    return self._saves.is_writing

  @property
  def has_failed(self) -> bool:
    """Whether a save has failed, and no process has said so yet. Of several, this may be known to one alone."""
    return self._saves.has_failed

  def wait(self) -> None:
    """Waits for a save that is under way. Raises what it failed with, once."""
    try:
      self._saves.wait()
    except Exception:
      self._steps = self._list()
      raise
    if self._saves.is_lost:
      self._steps = self._list()

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
    """Waits for pending saves to finish, as `wait` does, and ends all that was started for them."""
    try:
      self.wait()
    finally:
      self._saves.close()


def _of_any(problem: str) -> str:
  """Returns the problem of the first process that has one, in all; empty: none has."""
  return next(filter(None, processes.from_all(problem)), "")
