"""Locks of folders whose file system has none, or whose owner is on another machine or gone."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from moe_jax import disk, locks
from moe_jax.errors import InputError


def test_without_locks_of_the_file_system_an_owner_lives_while_its_process_does(tmp_path, monkeypatch):
  def none(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(locks.fcntl, "flock", none)
  ended = subprocess.Popen(["true"])
  ended.wait()
  path, owner = tmp_path / "lock", {"host": "here", "machine": locks._machine(), "since": 0}
  for pid, age, refused in [
    (os.getppid(), 0, True),
    (os.getppid(), 60, False),
    (ended.pid, 0, False),
    ("x", 0, False),
  ]:
    disk.write_json(path, owner | {"pid": pid})
    os.utime(path, (time.time() - age,) * 2)
    with (
      pytest.raises(InputError, match="in use by") if refused else contextlib.nullcontext(),
      locks.hold(path, "it"),
    ):
      assert not refused


@pytest.mark.parametrize("since", [1e300, "x", None, [1], float("nan")])
def test_a_lock_with_an_absurd_time_is_named_and_taken_over(since, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(locks, "_OBSERVE", 0.01)
  disk.write_json(tmp_path / "lock", {"pid": 1, "host": "n", "machine": "other", "since": since})
  with locks.hold(tmp_path / "lock", "it"):
    assert "process 1 on n since " in capsys.readouterr().err


def test_a_lock_of_another_machine_is_taken_over_when_it_shows_no_life(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(locks, "_OBSERVE", 0.4)
  path = tmp_path / "lock"
  disk.write_json(path, {"pid": 1, "host": "node7", "machine": "node7 boot", "since": 0})
  alive = threading.Event()

  def beat():
    while not alive.wait(0.02):
      os.utime(path)

  thread = threading.Thread(target=beat)
  thread.start()
  with pytest.raises(InputError, match="in use by process 1 on node7 since"), locks.hold(path, "it"):
    pass
  alive.set()
  thread.join()
  with locks.hold(path, "it"), locks.hold(path, "what it holds it may hold again"):
    assert disk.read_object(path)["pid"] == os.getpid()
  assert path.read_text() == "" and "node7" in capsys.readouterr().err


RACE = """
import errno, sys, time
from moe_jax import locks
from moe_jax.errors import InputError

def none(*arguments):
  raise OSError(errno.ENOLCK, "No locks available")

locks.fcntl.flock = none
locks._SETTLE = 1.0
claim = locks._claim

def claim_late(*arguments):  # both have found the file without an owner
  print("ready", flush=True)
  sys.stdin.readline()
  return claim(*arguments)

locks._claim = claim_late
try:
  with locks.hold(sys.argv[1], "it"):
    print("holds", flush=True)
    sys.stdin.readline()
except InputError as error:
  print(error, flush=True)
"""


def test_without_locks_of_the_file_system_one_of_two_starts_in_the_same_instant_holds(tmp_path):
  path = tmp_path / "lock"
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  starts = [subprocess.Popen([sys.executable, "-c", RACE, str(path)], **pipes) for _ in range(2)]
  try:
    assert [start.stdout.readline() for start in starts] == ["ready\n"] * 2
    for start in starts:
      start.stdin.write("\n")
      start.stdin.flush()
    said = sorted(start.stdout.readline() for start in starts)
    assert said[0] == "holds\n"
    assert "began in the same instant; wait for it or stop it" in said[1]
    assert path.read_text()  # the one that does not hold it leaves it as it is
  finally:
    for start in starts:
      start.communicate("\n")


OWNER = """
import os, subprocess, sys
from moe_jax import locks
with locks.hold(sys.argv[1], "the run"):
  subprocess.Popen(["sleep", "2"], pass_fds=locks.handles())
  os._exit(0)
"""


def test_what_is_left_of_an_owner_is_waited_for(tmp_path):
  """A process that has its lock file, too, and will end: the one beside a run, while the kernel takes its memory back."""
  path = tmp_path / "run.lock"
  subprocess.run([sys.executable, "-c", OWNER, path], check=True)
  started = time.monotonic()
  with locks.hold(path, "the run"):
    assert 0.2 < time.monotonic() - started < 15
