"""Locks of folders, with their owners. Used by runs, traces and comparisons alike."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from moe_jax import disk
from moe_jax.errors import InputError

LOCK = ".lock"  # of a run, in its folder; of the config.json of a comparison, beside it
_BEAT = 5.0  # seconds between signs of life in the lock file
_OBSERVE = 4 * _BEAT  # without one for so long, an owner on another machine counts as gone
_ENDING = 20.0  # seconds for the process that wrote the checkpoints of an owner that is gone, and has little time to end
# Seconds until processes that start in the same instant have all written. Where a file system has no locks, each of the
# up to 200 runs that a comparison locks takes so long.
_SETTLE = 0.1


def _machine() -> str:
  """Names the machine since it was started, and the container: where a process number means a process."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
  return " ".join(parts)


_held: dict[pathlib.Path, int] = {}  # the open lock files of this process
_beating = threading.Lock()


@contextlib.contextmanager
def hold(path: str | os.PathLike[str], what: str, wait: float = 0.0) -> Iterator[None]:
  """Holds a lock file while inside. What this process holds already, it may hold again.

  The file names the owner: process, host and time. A lock whose owner is gone is taken over: on this machine at once,
  for the kernel drops it with its process; on another machine if the file shows no sign of life for 20 s. Where the file
  system has no locks, an owner on this machine is gone if there is no such process, or without a sign of life for 20 s.

  Args:
    path: the lock file; made if absent, and left empty.
    what: what is locked, for the message.
    wait: seconds to wait for another owner.

  Raises:
    InputError: if another process holds the lock.
  """
  path = pathlib.Path(path).absolute()
  if path in _held:
    yield
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  then = "wait for it or stop it, or choose another folder"
  deadline = time.monotonic() + wait
  handle = _open(path)
  if handle is None and _has_ended(path):
    deadline += _ENDING
  while handle is None and time.monotonic() < deadline:
    time.sleep(0.05)
    handle = _open(path)
  if handle is None:
    handle = _from_other_machine(path)
  if handle is None:
    raise InputError(f"{what}: in use by {_owner_in_words(path)}; {then}")
  try:
    claimed = _claim(path, handle)
  except BaseException:
    os.close(handle)
    raise
  if not claimed:
    os.close(handle)
    raise InputError(f"{what}: {_owner_in_words(path)} began in the same instant; {then}")
  try:
    with _beating:
      _held[path] = handle
      if len(_held) == 1:
        threading.Thread(target=_beat, daemon=True).start()
    yield
  finally:
    with _beating:
      _held.pop(path, None)
      with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
      os.close(handle)


def handles() -> list[int]:
  """Returns the numbers of the open lock files of this process. A process that inherits one keeps the lock, too."""
  with _beating:
    return list(_held.values())


def _open(path: pathlib.Path) -> int | None:
  """Returns the locked file; None if a process has the lock, or may have it on another machine."""
  handle, has_locks = _lock(path)
  owner = _owner(path)
  if handle is None or not owner:
    return handle
  is_here = owner.get("machine") == _machine()
  if not is_here or (not has_locks and _is_process(owner.get("pid")) and _is_recent(path)):
    os.close(handle)
    return None
  return handle


def _lock(path: pathlib.Path) -> tuple[int | None, bool]:
  """Returns (the open file, whether the file system has locks); None for the file if a process has locked it."""
  handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(handle)
    return None, True
  except OSError:
    return handle, False
  return handle, True


def _claim(path: pathlib.Path, handle: int) -> bool:
  """Writes this process into a lock file as its owner. Returns whether it is the owner.

  Where the file system has no locks, several processes may have found the file without an owner. The last one to write
  is the owner, and each looks only when the others have written.
  """
  mine = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "since": time.time()}
  # All of one length: a longer text under a shorter one of a process that began in the same instant would be neither's.
  text = json.dumps(mine).ljust(1024)
  with disk.named(path):
    os.pwrite(handle, text.encode(), 0)
    os.ftruncate(handle, len(text))
    _sign(handle)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except OSError:
    time.sleep(_SETTLE)
    return _owner(path) == mine


def _has_ended(path: pathlib.Path) -> bool:
  """Returns whether the owner that a locked file names was on this machine, and what is left of it is on its way out."""
  owner = _owner(path)
  pid = owner.get("pid")
  return owner.get("machine") == _machine() and pid != os.getpid() and not _is_process(pid)


def _is_process(pid: Any) -> bool:
  """Returns whether there is such a process on this machine, other than this one."""
  if type(pid) is not int or not 0 < pid < 2**31 or pid == os.getpid():
    return False
  try:
    os.kill(pid, 0)  # asks, and sends nothing
  except ProcessLookupError:
    return False
  except OSError:  # of another user
    pass
  return True


def _is_recent(path: pathlib.Path) -> bool:
  return abs(time.time() - _last_sign(path) / 1e9) < _OBSERVE


def _from_other_machine(path: pathlib.Path) -> int | None:
  """Returns the locked file if its owner is on another machine, and shows no sign of life for a while."""
  owner = _owner(path)
  if not owner or owner.get("machine") == _machine():
    return None
  disk.note(
    f"{path.parent}: was used by {_owner_in_words(path)}; looking for {_OBSERVE:g} s whether it still is"
  )
  seen, deadline = _last_sign(path), time.monotonic() + _OBSERVE
  while time.monotonic() < deadline:
    time.sleep(min(_BEAT / 2, _OBSERVE / 4))
    if _last_sign(path) != seen:
      return None
  return _lock(path)[0]


def _last_sign(path: pathlib.Path) -> int:
  with path.open() as file:  # opened anew: a network file system then asks its server
    return os.fstat(file.fileno()).st_mtime_ns


def _sign(handle: int) -> None:
  now = time.time_ns()  # of this machine, not of a file server
  os.utime(handle, ns=(now, now))


def _beat() -> None:
  while True:
    time.sleep(_BEAT)
    with _beating:
      if not _held:
        return
      for handle in _held.values():
        with contextlib.suppress(OSError):
          _sign(handle)


def _owner(path: pathlib.Path) -> dict[str, Any]:
  return disk.read_object(path) or {}


def _owner_in_words(path: pathlib.Path) -> str:
  owner = _owner(path)
  if not owner:
    return "another process"
  try:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner.get("since"))))
  except (TypeError, ValueError, OverflowError, OSError):
    since = "a time that cannot be read"
  return f"process {str(owner.get('pid'))[:20]} on {str(owner.get('host'))[:80]} since {since}"
