"""Checkpoints that a process of its own writes, with what a run's steps leave of the cores.

A save takes some 60 ms of a processor, whatever the size of a small state, and much of it is Python. In a thread of the run, it
delays the step that comes next. The process has the policy of Linux for what is idle, rests most of the time, and has no
lock of the interpreter in common with the run; the arrays are in memory that both share. It can only help: where it cannot be
started, ends, fails, or is not done in time, the caller has all it needs to write the checkpoint itself.

`idle_process` is what it does.
"""

import contextlib
import json
import mmap
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import locks
from moe_jax.training import digests, idle_process
from moe_jax.types import PyTree

AVAILABLE = all(hasattr(os, name) for name in ("memfd_create", "SCHED_IDLE"))  # on Linux
_RUN, _REST = 0.002, 0.050  # seconds that the process may run, and then rests
_LATER = 4  # rests before it begins
_ALIGNED = 64  # bytes at which arrays begin


class SharedArrays:
  """Room for one copy of a tree of arrays, in memory that a process of its own can read.

  Args:
    tree: arrays, or their shapes and types.

  Raises:
    OSError: if the system has no such memory.
  """

  def __init__(self, tree: PyTree):
    leaves, self._structure = jax.tree.flatten(tree)
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    starts = np.cumsum([0] + [-(-size // _ALIGNED) * _ALIGNED for size in sizes]).tolist()
    self.num_bytes = max(starts[-1], 1)
    self.handle = os.memfd_create("checkpoint")
    try:
      os.ftruncate(self.handle, self.num_bytes)
      memory = mmap.mmap(self.handle, self.num_bytes)
    except BaseException:
      os.close(self.handle)
      raise
    self.spec = [[x.dtype.name, list(x.shape), start] for x, start in zip(leaves, starts[:-1], strict=True)]
    self.arrays = idle_process.arrays_in(memory, self.spec)
    tree = ocp.tree.serialize_tree(
      jax.tree.unflatten(self._structure, range(len(leaves))), keep_empty_nodes=True
    )
    # The tree as JSON: dicts, lists, and the number of each array in its place.
    self.numbered = jax.tree.map(_as_json, tree, is_leaf=_is_empty)

  def copy(self, tree: PyTree) -> list[np.ndarray | None]:
    """Copies what is in host memory already. Returns copies of all other arrays, which `fill` puts into their places."""
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
      if not digests.in_host_memory(leaf):
        leaf.copy_to_host_async()
    rest: list[np.ndarray | None] = []
    for place, leaf in zip(self.arrays, leaves, strict=True):
      if digests.in_host_memory(leaf):
        np.copyto(place, leaf)
      rest.append(None if digests.in_host_memory(leaf) else np.asarray(leaf))
    return rest

  def fill(self, rest: list[np.ndarray | None]) -> None:
    """Takes over the copies that `copy` returned, one after the other, so that only one is in memory twice."""
    for index, place in enumerate(self.arrays):
      if rest[index] is not None:
        np.copyto(place, rest[index])
        rest[index] = None

  def tree(self) -> PyTree:
    """The arrays, as they are now."""
    return jax.tree.unflatten(self._structure, self.arrays)

  def close(self) -> None:
    """Gives the memory back, when the last array is gone."""
    self.arrays = []
    os.close(self.handle)


class IdleSaver:
  """The side of the run. The process starts with the first save, and ends with the thread that made it.

  Args:
    folder: of the checkpoints.
    keep: how many of the newest to keep.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    self._folder, self._keep = folder, keep
    self._process: subprocess.Popen | None = None
    self._starting = threading.Lock()
    self._ending = threading.Event()

  def save(self, shared: SharedArrays, step: int, extra: dict[str, Any]) -> bool:
    """Returns whether the process has written a checkpoint of the arrays. If it has not, it is gone.

    Always called by one and the same thread, and always with the same `shared`.
    """
    self._ending.wait(_LATER * _REST)  # the step that comes next has waited for the copy already
    try:
      self._start(shared)
      request = {"step": step, "tree": shared.numbered, "extra": extra, "arrays": shared.spec}
      self._process.stdin.write(json.dumps(request).encode() + b"\n")
      self._process.stdin.flush()
      if self._wait():
        return True
    except OSError:
      pass
    self.end()
    return (self._folder / str(step)).is_dir()  # it got its name when it was whole

  def _start(self, shared: SharedArrays) -> None:
    with self._starting:
      if self.ended:
        raise ProcessLookupError
      if self._process is None:
        self._process = start(self._folder, self._keep, shared)

  def _wait(self) -> bool:
    """Returns whether the checkpoint was written, which takes many rests."""
    output = self._process.stdout
    while not select.select([output], [], [], _RUN)[0]:
      self._process.send_signal(signal.SIGSTOP)
      self._ending.wait(_REST)
      self._process.send_signal(signal.SIGCONT)
    return output.readline() == b"saved\n"

  @property
  def ended(self) -> bool:
    """Whether it writes nothing any more."""
    return self._ending.is_set()

  def end(self) -> None:
    """Ends the process at once, and starts no other. A save that is under way returns in its thread."""
    self._ending.set()
    with self._starting:
      if self._process:
        self._process.kill()
        self._process.wait()

  def close(self) -> None:
    """Ends the process. No save may be under way."""
    self.end()
    if self._process:
      self._process.stdout.close()
      with contextlib.suppress(OSError):  # what it has not read
        self._process.stdin.close()


def _is_empty(node: Any) -> bool:
  return node is None or (isinstance(node, dict | list | tuple) and not node)


def _as_json(node: Any) -> Any:
  """Returns a leaf, which is a number, or an empty node, as Orbax tells them apart."""
  if isinstance(node, int | dict):
    return node
  return [] if type(node) in (list, tuple) else None


def start(folder: pathlib.Path, keep: int, shared: SharedArrays) -> subprocess.Popen:
  """Starts the process. It ends with the calling thread. What it would print, the run finds out itself.

  Raises:
    OSError: if the system starts no more processes.
  """
  own = dict(os.environ)
  own.pop("XLA_FLAGS", None)  # it computes nothing
  own |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  process = subprocess.Popen(
    [
      *(sys.executable, "-P", idle_process.__file__, str(folder), str(keep)),
      *(str(shared.handle), str(shared.num_bytes), str(os.getpid())),
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    # It must not write into a folder that another process has. A lock is held until all who have its file are gone.
    pass_fds=[shared.handle, *locks.handles()],
    env=own,
    start_new_session=True,  # signals from the terminal are for the run
  )
  process.stdout.readline()  # from here on, it ends with the run also where it rests
  return process
