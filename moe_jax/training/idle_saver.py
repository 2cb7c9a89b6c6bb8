"""Checkpoints that a process of its own writes, with what a run's steps leave of the cores.

A save takes some 60 ms of a processor, whatever the size of a small state, and much of it is Python. In a thread of the run, it
delays the step that comes next. The process has the policy of Linux for what is idle, rests most of the time, and has no
lock of the interpreter in common with the run; the arrays are in memory that both share. Where it cannot be
started, ends, fails, or is not done in time, the run writes a checkpoint itself.

Of several processes, each has one, and these form a group of their own.

`idle_process` is what it does.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
from jax._src import distributed

from moe_jax import locks
from moe_jax.cluster.placement import is_loopback, split_address
from moe_jax.training import idle_process
from moe_jax.training.shared_arrays import SharedArrays

AVAILABLE = all(hasattr(os, name) for name in ("memfd_create", "SCHED_IDLE"))  # on Linux
_RUN, _REST = 0.002, 0.050  # seconds that the process may run, and then rests
_POLICY = getattr(os, "SCHED_IDLE", 0)  # of the process
_LATER = 8  # rests before it begins
# Seconds in which a checkpoint must be on disk, and bytes in a second for what is larger. Where other programs leave the process
# nothing, the run cannot wait for it until the next save.
_LATEST, SLOWEST = 120.0, 2e7


class Group(NamedTuple):
  """The processes beside those of one run, as `jax.distributed` starts them."""

  address: str  # of the first process
  bind: str  # where that one listens
  count: int
  index: int  # of this process
  num_devices: int  # of this process


def free_port() -> int:
  """Returns a port of this machine at which nobody listens."""
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def group_at(port: int) -> Group:
  """Returns the group beside the processes of this run, of which the first can listen at `port`."""
  host, _ = split_address(distributed.global_state.coordinator_address)
  host = f"[{host}]" if ":" in host else host
  bind = f"{host if is_loopback(host.strip('[]')) else '[::]'}:{port}"
  return Group(f"{host}:{port}", bind, jax.process_count(), jax.process_index(), jax.local_device_count())


class IdleSaver:
  """The side of the run. The process starts with the first save, and ends with the thread that made it.

  Args:
    folder: of the checkpoints.
    keep: how many of the newest to keep.
    rests: whether the process rests most of the time, because steps are computed on the cores that it would have.
  """

  def __init__(self, folder: pathlib.Path, keep: int, rests: bool):
    self._folder, self._keep, self._rests = folder, keep, rests
    self._process: subprocess.Popen | None = None
    self._starting = threading.Lock()
    self._ending = threading.Event()
    self._no_rest = threading.Event()
    self._in_a_hurry = False
    if not rests:
      self._no_rest.set()

  def save(self, shared: SharedArrays, step: int, extra: dict[str, Any], group: Group | None = None) -> bool:
    """Returns whether the process has written a checkpoint of the arrays. If it has not, it is gone.

    Always called by one and the same thread, and always with the same `shared` and `group`.
    """
    self._no_rest.wait(_LATER * _REST)  # the step that comes next has waited for the copy already
    try:
      self._start(shared, group)
      request = {"step": step, "tree": shared.numbered, "extra": extra, "arrays": shared.spec}
      self._process.stdin.write(json.dumps(request).encode() + b"\n")
      self._process.stdin.flush()
      if self._wait(b"saved\n", _LATEST + shared.num_bytes / SLOWEST):
        return True
    except OSError:
      pass
    self.end()
    return (self._folder / str(step)).is_dir()  # it got its name when it was whole

  def _start(self, shared: SharedArrays, group: Group | None) -> None:
    with self._starting:
      if self.ended:
        raise ProcessLookupError
      if self._process:
        return
      self._process = start(self._folder, self._keep, shared, group)
    # Only from then on it ends with the run where it rests, too.
    if not self._wait(b"ready\n", _LATEST, may_rest=False):
      raise ProcessLookupError

  def _wait(self, line: bytes, seconds: float, may_rest: bool = True) -> bool:
    """Returns whether the process has said `line` in time, which for a checkpoint takes many rests.

    They end by the clock, so those beside other processes of the run work in the same moments. Steps, in which one process waits for
    another, are then late by one of them, and not by one after the other.
    """
    output, period, is_idle = self._process.stdout, _RUN + _REST, True
    latest = time.monotonic() + seconds
    while not select.select([output], [], [], _RUN)[0]:
      if time.monotonic() > latest:
        return False
      if self._in_a_hurry and is_idle:
        is_idle = False
        _set_policy(self._process.pid, os.SCHED_OTHER)
      if may_rest and not self._no_rest.is_set():
        self._process.send_signal(signal.SIGSTOP)
        self._no_rest.wait(period - time.time() % period)
        self._process.send_signal(signal.SIGCONT)
    if not is_idle:
      _set_policy(self._process.pid, _POLICY)
    return output.readline() == line

  @property
  def ended(self) -> bool:
    """Whether it writes nothing any more."""
    return self._ending.is_set()

  def hurry(self) -> None:
    """Lets the process work without rests, and as others do, until it is done: the run waits for it."""
    self._in_a_hurry = True
    self._no_rest.set()

  def rest(self) -> None:
    """Lets the process rest again in the next save."""
    self._in_a_hurry = False
    if self._rests and not self.ended:
      self._no_rest.clear()

  def end(self) -> None:
    """Ends the process at once, and starts no other. A save that is under way returns in its thread."""
    self._ending.set()
    self._no_rest.set()
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


def _set_policy(process: int, policy: int) -> None:
  """Gives all threads of a process a policy, if the system allows it: not everybody may leave that for what is idle."""
  with contextlib.suppress(OSError):
    for thread in os.listdir(f"/proc/{process}/task"):
      os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def start(folder: pathlib.Path, keep: int, shared: SharedArrays, group: Group | None) -> subprocess.Popen:
  """Starts the process. It ends with the calling thread. What it would print, the run finds out itself.

  Raises:
    OSError: if the system starts no more processes.
  """
  # It computes nothing, and what is said to JAX is for the run: where it listens, what it must not do.
  own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_FLAGS"))}
  places = dict.fromkeys(os.path.abspath(place) for place in sys.path)  # an empty one is the working folder
  # Without the second, JAX would cut numbers of 64 bits in half.
  own |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(places)}
  said = {
    "folder": str(folder),
    "keep": keep,
    "handle": shared.handle,
    "num_bytes": shared.num_bytes,
    "parent": os.getpid(),
    "group": group and group._asdict(),
  }
  process = subprocess.Popen(
    [sys.executable, "-P", idle_process.__file__, json.dumps(said)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    pipesize=2**20,  # a request of thousands of arrays waits there until it is read
    # It must not write into a folder that another process has. A lock is held until all who have its file are gone.
    pass_fds=[shared.handle, *locks.handles()],
    env=own,
    # Signals from the terminal are for the run. In a session of its own, Linux would give it as much of the cores as the run
    # (sched_autogroup), whatever its policy.
    process_group=0,
  )
  _set_policy(process.pid, _POLICY)  # the start of Python itself takes 30 ms, which a step would wait for
  return process
