"""`InputError`, the exception for errors that the user can fix, and helpers that raise it."""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
  """An invalid flag, field or file that the user can correct.

  The message is one line that says what is wrong, its value, and what would be right. Entry points print the
  message without a traceback and exit with status 2.
  """


STOPPED_STATUS = 75  # exit status of `Stopped`: EX_TEMPFAIL of sysexits.h, try again later
INTERRUPTED_STATUS = (
  130  # exit status after Ctrl-C where there is no step to save: 128 and the number of SIGINT
)


class Stopped(Exception):
  """A run that was asked to stop, and has saved its step.

  The message is one line. Entry points print it without a traceback and exit with `STOPPED_STATUS`. The same command
  continues.
  """


class NonFiniteLoss(InputError):
  """A training run whose loss or gradient is no longer finite."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of libraries that pass on no number; the last is NumPy's.
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", " requested and ")


def of_the_disk(error: BaseException, what: str, then: str = "continues") -> InputError | None:
  """Returns the line for a disk that is full or fails, whichever library met it; None for other errors.

  Args:
    error: of the system, or of a library.
    what: could not be done or written.
    then: what the same command does next.
  """
  number = error.errno if isinstance(error, OSError) else None
  text = " ".join((error.strerror if number and error.strerror else str(error)).split())
  if number in _FULL or any(words in text for words in _FULL_IN_WORDS):
    return InputError(
      f"{what}: no space left to write ({text[:200]}); make room, and the same command {then}"
    )
  if number == errno.EIO:
    return InputError(f"{what}: cannot be read or written ({text}); look at the device, and start again")
  return None


def of_the_system(error: OSError) -> InputError | None:
  """Returns the line for a file or folder that cannot be used, or a full disk; None for an error that says neither."""
  named = isinstance(error.filename, str | bytes) and error.strerror is not None
  name = _short(error.filename) if named else "the disk"
  return of_the_disk(error, name) or (InputError(f"{name}: {error.strerror}") if named else None)


# Errors of a file: it is not there, or what is read is no name or place of one. All others are of a machine, its memory, its
# rights or its network, and say nothing about the bytes on the disk.
_OF_THE_FILE = (
  *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
  *(errno.EINVAL, errno.EOVERFLOW, errno.ESPIPE),  # an offset or a size that the file does not have
  *(errno.EEXIST, errno.ENOTEMPTY),  # not of a read; may be handled on the way to another error
)
# Those of the machine that TensorStore has in its texts without the number. Not every system has every name.
_NAMES = (
  *(
    "EACCES",
    "EPERM",
    "EIO",
    "EMFILE",
    "ENFILE",
    "ESTALE",
    "ETIMEDOUT",
    "ENOMEM",
    "EINTR",
    "EAGAIN",
    "EBUSY",
  ),
  *("ENODEV", "ENXIO", "EROFS", "ENOSPC", "EDQUOT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
  *("ENOTCONN", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ESHUTDOWN", "EREMOTEIO", "EUCLEAN", "EBADMSG"),
  *("ENOLINK", "ENODATA", "ENOKEY", "EPIPE", "EDEADLK", "ENOLCK"),
)
_IN_WORDS = (
  *("RESOURCE_EXHAUSTED", "Out of memory", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
  *(os.strerror(getattr(errno, name)) for name in _NAMES if hasattr(errno, name)),
)


def is_of_the_machine(error: BaseException) -> bool:
  """Returns whether an error says nothing about the bytes that were read: it may pass, and they may be whole."""
  errors: list[BaseException | None] = [error]
  for found in errors:  # grows with what led to each
    if found is None:
      continue
    if isinstance(found, MemoryError):
      return True
    if isinstance(found, OSError) and found.errno:
      if found.errno not in _OF_THE_FILE:
        return True
    else:  # of a library
      text = str(found)
      number = re.search(r"OS error (\d+)", text)
      if (number and int(number[1]) not in _OF_THE_FILE) or any(words in text for words in _IN_WORDS):
        return True
    more = (found.__cause__, found.__context__, *getattr(found, "exceptions", ()))
    errors += [other for other in more if not any(other is known for known in errors)]
  return False


def _short(name: str | bytes) -> str:
  name = os.fsdecode(name)
  name = name if len(name) < 200 else f"{name[:100]}..."
  return os.fsencode(name).decode(errors="backslashreplace")


def unknown_name(what: str, name: str, known: Iterable[str]) -> InputError:
  """Returns the error for a name that is not registered. The message lists the nearest names, then all names."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  return InputError(f"unknown {what} {name!r}: {hint}known: {', '.join(known)}")


def require_option(what: str, option: str, value: Any, allowed: tuple[str, ...]) -> None:
  """Raises `InputError` unless `value` is one of `allowed`."""
  if value not in allowed:
    raise InputError(f"{what}: {option} must be one of {', '.join(allowed)}, got {value!r}")


def in_short(error: Exception) -> str:
  """Returns the type and the beginning of the message of an error of a user's code, for a part of a line."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:200]
