"""Who writes a checkpoint: this process, or one beside it that has only what the steps leave of the cores.

`Alone` is for a run of one process, and `Together` for one of several. `Checkpoints` has one of them.
"""

import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.training import digests, idle_saver
from moe_jax.training.orbax_writer import OrbaxWriter, Unshared
from moe_jax.training.shared_arrays import SharedArrays, parts_of
from moe_jax.types import PyTree

# Seconds that the processes of a run wait for those beside them, which need far fewer when nothing is computed: before
# another save (and more for large states), before one after a signal, and where no other save comes.
_BEFORE_SAVE, _BEFORE_STOP, _AT_END = 30.0, 3.0, 10.0


class _Saves:
  """What both have: Orbax in this process, a thread, and the process beside it.

  Args:
    folder: of the checkpoints.
    keep: how many of the newest to keep.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    self._folder = folder
    self._writer = OrbaxWriter(folder, keep)
    self._thread = ThreadPoolExecutor(1, "moe_jax save")
    # The host of an accelerator has cores to spare, and large states.
    self._saver = idle_saver.IdleSaver(folder, keep, rests=jax.default_backend() == "cpu")
    self._shared: SharedArrays | None = None  # the copy of the state that the process beside this one writes
    self._saving: Future | None = None  # in the thread

  @property
  def _in_thread(self) -> bool:
    return bool(self._saving and not self._saving.done())

  def prepare(self, state: PyTree) -> None:
    """Makes room for the copy of a state, and copies it where that is quick. The first time takes longer than all others."""
    if self._can_share(state) and all(digests.in_host_memory(part) for part in parts_of(state)):
      # Before anything is compiled, the thread gets memory of its own from glibc. Later, that may be what XLA has used:
      # to tidy that up took 25 ms of a first save.
      self._thread.submit(self._shared.copy, state).result()

  def _drop_room(self) -> None:
    if self._shared:
      self._shared.close()
      self._shared = None

  def _can_share(self, state: PyTree) -> bool:
    """Returns whether the process beside this one may write a copy of `state`, for which there is room in `_shared` then."""
    if not idle_saver.AVAILABLE or self._saver.ended:
      return False
    if self._shared is None:
      try:
        self._shared = SharedArrays(state)
      except (OSError, ValueError):
        return False
    return True

  def close(self) -> None:
    """Ends all. No save may be under way."""
    self._saver.close()
    self._thread.shutdown()
    self._drop_room()
    self._writer.close()


class Alone(_Saves):
  """The saves of one process. What the process beside it has not written when it must be there, this one writes."""

  is_lost = False

  @property
  def is_writing(self) -> bool:
    return self._in_thread

  @property
  def has_failed(self) -> bool:
    return bool(self._saving and self._saving.done() and self._saving.exception())

  def before_save(self, state: PyTree, steps_follow: bool) -> None:
    """There is nobody to tell anything."""

  def settle(self, said: Sequence[None], steps_follow: bool) -> bool:
    """Waits for the save before. Raises what it failed with, once. Returns whether it is lost: it is not."""
    del said, steps_follow
    self.wait()
    return False

  def save(
    self, step: int, state: PyTree, extra: dict[str, Any], steps_follow: bool, first: Sequence[pathlib.Path]
  ) -> None:
    if (beside := steps_follow and self._can_share(state)) or self._shared:
      copies = self._shared.copy(state)
      self._saving = self._thread.submit(_after, first, self._write_shared, step, copies, extra, beside)
    else:
      self._saving = self._thread.submit(_after, first, self._write_and_wait, step, _host_copy(state), extra)

  def _write_and_wait(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    self._writer.write(step, state, extra, digests.array_digests(state))
    self._writer.wait()

  def _write_shared(self, step: int, rest: list, extra: dict[str, Any], beside: bool) -> None:
    """Writes what is in shared memory, with `rest`: in a process of its own if `beside` and that works, else here."""
    self._shared.fill(rest)
    if not (beside and self._saver.save(self._shared, step, extra)):
      self._write_and_wait(step, self._shared.tree(), extra)

  def wait(self) -> None:
    if saving := self._saving:
      if self._in_thread:
        self._saver.end()
      try:
        saving.result()
      finally:
        if saving.done():  # not where a signal ended the wait
          self._saving = None
    self._writer.wait()


class Together(_Saves):
  """The saves of several processes, each of its parts of the arrays. All call the same methods in the same order.

  Where the processes beside them have not written a checkpoint when the next one comes, they are waited for, and the processes of the
  run write from then on. A checkpoint that one of them could not write is given up: the arrays on the devices are those of a later
  step, and the copies in host memory could not become arrays of all processes again without room on the devices.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    super().__init__(folder, keep)
    self._port = 0  # at which the group's first process listens; chosen by that of the run
    self._all_can_share = False  # found by `settle`
    self._copying: Future | None = None  # in the thread, from `before_save` on

  @property
  def is_writing(self) -> bool:
    return self._in_thread or self._writer.is_writing

  @property
  def has_failed(self) -> bool:
    """Whether there is reason to save again. A process of the run that fails itself ends all at once."""
    return self.is_lost

  @property
  def is_lost(self) -> bool:
    """Whether the process beside this one could not write the last checkpoint."""
    return bool(self._saving and self._saving.done() and not self._saving.result())

  def before_save(self, state: PyTree, steps_follow: bool) -> list[bool | int]:
    """Returns what all must know of each: whether it is still writing, has lost what it wrote, can share `state`; and a port.

    Begins to copy `state`, if nobody reads what is in its place any more. The others are waited for at the same time.
    """
    found = [self._in_thread, self.is_lost, steps_follow and self._can_share(state)]
    if found == [False, False, True]:
      self._copying = self._thread.submit(self._shared.copy, state)
    return [*found, self._port or idle_saver.free_port()]

  def settle(self, said: Sequence[list[bool | int]], steps_follow: bool) -> bool:
    """Waits for the save before, from `before_save` of all. Returns whether it is lost, which all processes agree on."""
    if self._copying:
      self._copying.exception()  # waits; `save` takes what it returns, or raises
    self._writer.wait()
    busy, lost, can_share, ports = zip(*said, strict=True)
    self._all_can_share, self._port = all(can_share), ports[0]
    if not any(busy + lost):
      if steps_follow and not self._all_can_share:
        self._saver.end()
        self._drop_room()
      return False
    if any(lost):  # the others of the group wait for one that is gone
      self._saver.end()
    self._finish(self._time_for(_BEFORE_SAVE) if steps_follow else _BEFORE_STOP)
    self._saver.end()
    written = processes.from_all(not self.is_lost)  # from here on, nobody beside the run writes
    self._saving, self._all_can_share = None, False
    self._drop_room()
    return not all(written)

  def _time_for(self, seconds: float) -> float:
    return seconds + (self._shared.num_bytes / idle_saver.SLOWEST if self._shared else 0.0)

  def save(
    self, step: int, state: PyTree, extra: dict[str, Any], steps_follow: bool, first: Sequence[pathlib.Path]
  ) -> None:
    if not (steps_follow and self._all_can_share):
      _after(first, self._writer.write, step, state, extra, digests.array_digests(state))
      return
    self._saver.rest()
    self._saving = self._thread.submit(self._write_beside, step, self._copying.result(), extra, first)

  def _can_share(self, state: PyTree) -> bool:
    return distributed.global_state.coordinator_address is not None and super()._can_share(state)

  def _write_beside(
    self, step: int, rest: list, extra: dict[str, Any], first: Sequence[pathlib.Path]
  ) -> bool:
    self._shared.fill(rest)
    try:
      return _after(first, self._saver.save, self._shared, step, extra, idle_saver.group_at(self._port))
    except OSError:  # the next save, which is due now, meets it in the run
      self._saver.end()
      return False

  def wait(self) -> None:
    self._finish(self._time_for(_AT_END))
    self._writer.wait()

  def _finish(self, seconds: float) -> None:
    """Waits until the process beside this one has written, if it is writing. Ends it if that takes longer."""
    if self._saving:
      self._saver.hurry()
      try:
        self._saving.result(seconds)
      except NotYet:
        self._saver.end()
        self._saving.result()


def _after(first: Sequence[pathlib.Path], write: Callable[..., Any], *args: Any) -> Any:
  """Returns `write(*args)` when all files of `first` are on disk."""
  for path in first:
    disk.sync(path)
  return write(*args)


def _host_copy(tree: PyTree) -> PyTree:
  """Copies all arrays to host memory. They stay what they are when the next step reuses those on devices."""
  for leaf in jax.tree.leaves(tree):
    if not digests.in_host_memory(leaf):
      leaf.copy_to_host_async()
  # NumPy's view of an array on a CPU is the array itself.
  copies = jax.tree.map(lambda x: np.array(x) if digests.in_host_memory(x) else np.asarray(x), tree)
  return jax.tree.map(lambda x: x.view(Unshared), copies)
