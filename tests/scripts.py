"""Runs scripts as users do, many command lines in one child process: starting one is what takes the time."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Each script defines its flags anew, and some ask for so many devices: neither outlives its command line.
_CHILD = """
import contextlib, gc, io, json, resource, runpy, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
gc.set_threshold(50_000, 20, 10)  # as in conftest.py
import jax.extend.backend
from absl import app, flags
found = []
for path, *arguments in json.load(sys.stdin):
  for name in list(flags.FLAGS):
    if not flags.FLAGS.find_module_defining_flag(name).startswith(("absl.", "array_record.", "grain.")):
      delattr(flags.FLAGS, name)
  jax.clear_caches()
  jax.extend.backend.clear_backends()
  sys.argv, status = [path, *arguments], 0
  with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
    try:
      runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
      status = end.code or 0
  found.append([status, out.getvalue(), err.getvalue()])
json.dump(found, sys.stdout)
"""


class Ended(NamedTuple):
  status: int
  stdout: str
  stderr: str


def run_scripts(*commands: list[str], timeout: float = 240, file_bytes: int = -1) -> list[Ended]:
  """How each command line ended: a script's path in the checkout, then its arguments.

  Files cannot have more than `file_bytes`, which stands for a full disk; -1: no limit.
  """
  done = subprocess.run(
    [sys.executable, "-c", _CHILD, str(file_bytes)],
    input=json.dumps(commands),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    timeout=timeout,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return [Ended(*ended) for ended in json.loads(done.stdout)]


def assert_one_line(ended: Ended, message: str) -> None:
  """Wrong input: exit status 2, nothing printed, and one line on stderr that holds `message`."""
  assert (ended.status, ended.stdout) == (2, ""), ended
  assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
  assert message in ended.stderr, ended.stderr
