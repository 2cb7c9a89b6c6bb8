"""What is kept on disk: files written whole, locks with their owners, damaged files that are moved aside.

Used by data, runs, traces and comparisons alike. The digests of checkpoints are in `moe_jax.training.checkpoint`.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TextIO

from moe_jax.errors import InputError, is_of_the_machine

DIGEST = "digest"  # the key of a JSON object under which its own digest is
LOCK = ".lock"  # of a run, in its folder; of the config.json of a comparison, beside it
ASIDE = "damaged"  # where damaged files of a folder are moved to; nothing is ever deleted
WRITING = ".writing-"  # begins the name of a file that is not whole yet; a kill may leave it
_BEAT = 5.0  # seconds between signs of life in the lock file
_OBSERVE = 4 * _BEAT  # without one for so long, an owner on another machine counts as gone


def note(text: str) -> None:
  """Prints one line on stderr: something is not as it should be, and was dealt with."""
  print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """A file to write, which gets its name when it is whole, also after a power cut. Makes its folder."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _named(path):
    handle, temporary = tempfile.mkstemp(prefix=WRITING, dir=path.parent)
    try:
      with os.fdopen(handle, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.chmod(temporary, 0o644)  # mkstemp's files are only for their owner
      os.replace(temporary, path)
    finally:
      pathlib.Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
  """Errors inside that name no file, or one that is not whole yet, name `path`."""
  try:
    yield
  except OSError as error:
    other = isinstance(error.filename, str) and not pathlib.Path(error.filename).name.startswith(WRITING)
    if other or error.strerror is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def whole_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
  """`whole_file` for text in utf-8, with line ends as they are written."""
  with whole_file(path) as file:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    yield text
    text.flush()
    text.detach()


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes text in one rename. Makes the folder."""
  write_whole(path, text.encode())


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file in one rename, so that a file that exists is whole. Makes its folder."""
  with whole_file(path) as file:
    file.write(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes a JSON value in one rename."""
  write_whole(path, json.dumps(value, indent=1).encode())


def read_object(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the JSON object in a file; None if the file is absent, torn or holds something else.

  Raises:
    OSError: with the name of the file, if the machine cannot read it now. The file may be whole, so nothing may be
      written in its place.
  """
  path = pathlib.Path(path)
  try:
    with _named(path):
      value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    if is_of_the_machine(error):
      raise
    return None
  return value if isinstance(value, dict) else None


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with a digest of it, by which damage that leaves it JSON is noticed."""
  return value | {DIGEST: digest_of_json(value)}


def has_its_digest(value: Mapping[str, Any]) -> bool:
  """Returns whether the digest in a JSON object is right. One without a digest has none that is wrong."""
  return DIGEST not in value or value[DIGEST] == digest_of_json(
    {k: v for k, v in value.items() if k != DIGEST}
  )


def digest_of_json(value: Any) -> str:
  """Returns 16 hexadecimal digits that are another for another JSON value."""
  text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)  # as it is read: keys are texts
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def move_aside(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> pathlib.Path | None:
  """Moves a damaged file or folder to `root/damaged`, under a name of its own. None if it cannot be moved."""
  path, folder = pathlib.Path(path), pathlib.Path(root) / ASIDE
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
      target = folder / f"{path.name}-{number}"
      if not target.exists():
        path.rename(target)
        return target
  return None


def set_aside_damaged(
  path: str | os.PathLike[str],
  root: str | os.PathLike[str],
  consequence: str,
  is_whole: Callable[[dict[str, Any]], bool] = lambda value: True,
) -> None:
  """Moves a file aside that should hold a JSON object that `is_whole`, and does not, and says so. None is fine."""
  value = read_object(path)
  if pathlib.Path(path).exists() and (value is None or not is_whole(value)):
    note(f"{path}: is damaged, moved to {move_aside(path, root)}; {consequence}")


def check_name(path: str | os.PathLike[str], flag: str = "") -> None:
  """Raises `InputError` for a name that a library takes for a pattern, or that cannot be printed.

  Args:
    path: of a file or folder.
    flag: that gave it; empty: not known here.
  """
  text = os.fspath(path)
  found = [c for c in text if c in "[]*?" or not c.isprintable()]
  if found:
    name = f"--{flag}={text!r}" if flag else repr(text)
    raise InputError(
      f"{name}: {found[0]!r} in the path is read as a pattern or cannot be printed; choose another name"
    )


def check_folder(path: str | os.PathLike[str], flag: str = "output_dir") -> None:
  """Raises `InputError` for a folder that cannot be made or written, or has a wrong name. Nothing is written."""
  check_name(path, flag)
  text = os.fspath(path)
  try:
    above = pathlib.Path(path).absolute()
    while not above.exists():
      above = above.parent
  except OSError as error:
    raise InputError(f"--{flag}={text[:60]}...: cannot be a folder ({error.strerror})") from None
  if not above.is_dir():
    raise InputError(f"--{flag}={text}: {above} is a file; choose a folder")
  try:
    tempfile.TemporaryFile(dir=above).close()
  except OSError as error:
    raise InputError(
      f"--{flag}={text}: {above} cannot be written ({error.strerror}); choose another folder"
    ) from None


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
  deadline = time.monotonic() + wait
  handle = _open(path)
  while handle is None and time.monotonic() < deadline:
    time.sleep(0.05)
    handle = _open(path)
  if handle is None:
    handle = _from_other_machine(path)
  if handle is None:
    raise InputError(
      f"{what}: in use by {_owner_in_words(path)}; wait for it or stop it, or choose another folder"
    )
  try:
    text = json.dumps(
      {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "since": time.time()}
    )
    with _named(path):
      os.pwrite(handle, text.encode(), 0)
      os.ftruncate(handle, len(text))
      _sign(handle)
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
  note(f"{path.parent}: was used by {_owner_in_words(path)}; looking for {_OBSERVE:g} s whether it still is")
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
  return read_object(path) or {}


def _owner_in_words(path: pathlib.Path) -> str:
  owner = _owner(path)
  if not owner:
    return "another process"
  try:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner.get("since"))))
  except (TypeError, ValueError, OverflowError, OSError):
    since = "a time that cannot be read"
  return f"process {str(owner.get('pid'))[:20]} on {str(owner.get('host'))[:80]} since {since}"
