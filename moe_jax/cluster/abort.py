"""One line in place of the page with which JAX aborts a process that has lost process 0.

JAX's C++ code prints a stack trace and aborts. No callback, exception or thread of Python comes before that (docs/adr/0007). So what
C++ prints goes through another process, which runs this file and outlives the abort. Python prints as before.
"""

import contextlib
import os
import subprocess
import sys

# Of the line with which the page begins, and of the one before it.
PAGE = b"the JAX distributed service detected fatal errors"
BEFORE = b"Polled an error from coordination service"

_stderr = 2  # the number of what was standard error when the process began


def write(line: str) -> None:
  """Prints one line on standard error at once, whatever Python's streams are about to do."""
  if os.isatty(_stderr):  # below what stands there; and the cursor is back, which progress bars hide
    line = f"\x1b[?25h\n{line}"
  os.write(_stderr, f"{line}\n".encode())


def in_one_line(line: str) -> None:
  """Starts the process that prints `line` for JAX's page, and everything else as it comes. It ends with this one."""
  global _stderr
  if sys.stderr is not sys.__stderr__ or sys.stderr.fileno() != 2:
    return  # someone reads it already
  sys.stderr.flush()
  own = os.dup(2)
  with contextlib.suppress(OSError):  # where no process can be started, the page is as it was
    reader = subprocess.Popen(
      [sys.executable, "-I", "-S", __file__, line],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=own,
      start_new_session=True,  # signals from the terminal are not for it
    )
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    _stderr = own
    sys.stderr = os.fdopen(own, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)


def _pass_on(line: str) -> None:
  for text in sys.stdin.buffer:
    if PAGE in text:
      os.write(2, f"error: {line}\n".encode())
      for _ in sys.stdin.buffer:  # the page
        pass
    elif BEFORE not in text:
      os.write(2, text)


if __name__ == "__main__":
  _pass_on(sys.argv[1])
