"""What is kept on disk: files written whole, digests of JSON, damaged files that are moved aside.

Used by data, runs, traces and comparisons alike. The digests of checkpoints are in `moe_jax.training.checkpoint`.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TextIO

from moe_jax.errors import InputError, is_of_the_machine

DIGEST = "digest"  # the key of a JSON object under which its own digest is
ASIDE = "damaged"  # where damaged files of a folder are moved to; nothing is ever deleted
WRITING = ".writing-"  # begins the name of a file that is not whole yet; a kill may leave it


class Taken(InputError):
  """A folder that was to be made is there already, with something in it."""


def note(text: str) -> None:
  """Prints one line on stderr: something is not as it should be, and was dealt with."""
  print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """A file to write, which gets its name when it is whole, also after a power cut. Makes its folder."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with named(path):
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


def sync(path: str | os.PathLike[str]) -> None:
  """Returns when all that was written to a file is on disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    with named(pathlib.Path(path)):
      os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def named(path: pathlib.Path) -> Iterator[None]:
  """Errors inside that name no file, or one that is not whole yet, name `path`."""
  try:
    yield
  except OSError as error:
    other = isinstance(error.filename, str) and not pathlib.Path(error.filename).name.startswith(WRITING)
    if other or error.strerror is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A new folder to fill, which gets its name when it is whole. A kill leaves it beside, under a name of its own.

  Args:
    path: absent, or an empty folder.

  Raises:
    Taken: when it is whole, if another command was quicker.
  """
  path = pathlib.Path(path).resolve()  # what a link names is replaced, and not the link
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{WRITING}{path.name}-", dir=path.parent))
  try:
    yield folder
    folder.chmod(0o755)  # mkdtemp's folders are only for their owner
    try:
      folder.rename(path)
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
      raise Taken(f"{path}: another command has made it in the meantime; choose another folder") from None
  finally:
    shutil.rmtree(folder, ignore_errors=True)


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


def check_not_file(folder: pathlib.Path) -> None:
  """Raises `InputError` if the folder of a model is a file, such as one of those in it."""
  if folder.is_file():
    raise InputError(f"{folder}: is a file; give the folder that it is in: {folder.parent}")


def parse_json(text: str | bytes) -> Any:
  """Returns a JSON value. Raises `ValueError` if the text is none, or is nested too deeply to be read."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError("nested too deeply") from None


def read_object(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the JSON object in a file; None if the file is absent, torn or holds something else.

  Raises:
    OSError: with the name of the file, if the machine cannot read it now. The file may be whole, so nothing may be
      written in its place.
  """
  path = pathlib.Path(path)
  try:
    with named(path):
      value = parse_json(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
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


def move_aside(
  path: str | os.PathLike[str], root: str | os.PathLike[str], what: str = "is damaged"
) -> pathlib.Path:
  """Moves a damaged file or folder to `root/damaged`, under a name of its own, and returns that.

  Args:
    path: of the file or folder.
    root: the folder that has `damaged/`.
    what: is the matter with it, for the error.

  Raises:
    InputError: if it cannot be moved. So nothing is written over it.
  """
  path, folder = pathlib.Path(path), pathlib.Path(root) / ASIDE
  try:
    folder.mkdir(parents=True, exist_ok=True)
    target = next(t for i in itertools.count(1) if not (t := folder / f"{path.name}-{i}").exists())
    path.rename(target)
  except OSError as error:
    reason = "which is no folder" if folder.exists() and not folder.is_dir() else f"({error.strerror})"
    raise InputError(f"{path}: {what}, and cannot be moved to {folder} {reason}; move it away") from error
  return target


def set_aside_damaged(
  path: str | os.PathLike[str],
  root: str | os.PathLike[str],
  consequence: str,
  is_whole: Callable[[dict[str, Any]], bool] = lambda value: True,
) -> None:
  """Moves a file aside that should hold a JSON object that `is_whole`, and does not, and says so. None is fine.

  Raises:
    InputError: if it cannot be moved.
  """
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
      if above.is_symlink():
        raise InputError(
          f"--{flag}={text}: {above} is a link to {os.readlink(above)}, which is not there; make that folder, or choose "
          "another one"
        )
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


def check_file(path: str | os.PathLike[str], flag: str) -> None:
  """Raises `InputError` for a file that cannot be written, before what it is to hold is made. Nothing is written."""
  if pathlib.Path(path).is_dir():
    raise InputError(f"--{flag}={os.fspath(path)}: is a folder; name a file")
  check_folder(pathlib.Path(path).parent, flag)
