"""`InputError`, the exception for errors that the user can fix, and helpers that raise it."""

import difflib
import os
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
  """An invalid flag, field or file that the user can correct.

  The message is one line that says what is wrong, its value, and what would be right. Entry points print the
  message without a traceback and exit with status 2.
  """


STOPPED_STATUS = 75  # exit status of `Stopped`: EX_TEMPFAIL of sysexits.h, try again later


class Stopped(Exception):
  """A run that was asked to stop, and has saved its step.

  The message is one line. Entry points print it without a traceback and exit with `STOPPED_STATUS`. The same command
  continues.
  """


class NonFiniteLoss(InputError):
  """A training run whose loss or gradient is no longer finite."""


def of_the_system(error: OSError) -> InputError | None:
  """Returns the line for a file or folder that cannot be used; None if the error names none."""
  if not isinstance(error.filename, str | bytes) or error.strerror is None:
    return None
  name = os.fsdecode(error.filename)
  name = name if len(name) < 200 else f"{name[:100]}..."
  name = os.fsencode(name).decode(errors="backslashreplace")
  return InputError(f"{name}: {error.strerror}")


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
